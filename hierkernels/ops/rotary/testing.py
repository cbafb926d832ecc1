"""Inputs from a named case, and errors against the float64 oracle; used by tests."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from hierkernels.ops.rotary.api import make_call, run
from hierkernels.ops.rotary.spec import Case
from hierkernels.testing import Errors, Results, Standard, judge


@dataclass(frozen=True)
class Inputs:
    """The tensors of one case; the values depend on the case's name alone."""

    case: Case
    x: torch.Tensor  # (B, H, N, D)
    cos: torch.Tensor  # (N, D / 2), float32 or float64
    sin: torch.Tensor
    dout: torch.Tensor  # as x, the gradient that backward starts from

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    def to(self, dtype: torch.dtype) -> Inputs:
        """x and dout in another dtype; the tables keep their values."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return replace(
            self, x=self.x.to(dtype), dout=self.dout.to(dtype), cos=self.cos.to(wide),
            sin=self.sin.to(wide),
        )  # fmt: skip


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device | str = "cpu") -> Inputs:
    """Normally distributed tensors and tables of positions, drawn on the CPU."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal() -> torch.Tensor:
        drawn = torch.randn(case.B, case.H, case.N, case.D, generator=generator, dtype=wide)
        return drawn.to(dtype).to(device)

    angles = torch.outer(torch.arange(case.N), 100.0 ** -torch.linspace(0, 1, case.D // 2))
    growth = torch.linspace(0.5, 2, case.D // 2) if case.scaled else torch.ones(case.D // 2)
    cos, sin = ((t * growth).to(wide).to(device) for t in (angles.cos(), angles.sin()))
    return Inputs(case, _lay_out(normal(), case.layout), cos, sin, normal())


def _lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in the memory order that a case names."""
    if layout == "bnhd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "part":
        return torch.cat((x, x), dim=-1)[..., : x.shape[-1]]
    if layout == "dbhn":
        return x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    return x


def compute(inputs: Inputs, backend: str | None, gradients: bool = True) -> Results:
    """out of a backend, and the gradient of sum(out dout), detached."""
    x = inputs.x.detach().requires_grad_(gradients)
    out = run(make_call(x, inputs.cos, inputs.sin), backend)
    if not gradients:
        return {"out": out}
    return {"out": out.detach(), "dx": torch.autograd.grad(out, x, inputs.dout)[0]}


def oracle(inputs: Inputs, gradients: bool = True) -> Results:
    """The reference in float64, on the values that the inputs have."""
    return compute(inputs.to(torch.float64), "reference", gradients)


@torch.no_grad()
def _term_sizes(inputs: Inputs, power: int) -> Results:
    """Of each result the size of its two terms: (sum |term|^power)^(1 / power)."""
    precise = inputs.to(torch.float64)
    cos, sin = precise.cos.abs() ** power, precise.sin.abs() ** power
    sizes = {}
    for name, t in (("out", precise.x), ("dx", precise.dout)):
        a, b = (t.abs() ** power).chunk(2, dim=-1)
        sizes[name] = torch.cat((a * cos + b * sin, b * cos + a * sin), dim=-1) ** (1 / power)
    return sizes


def make_standard(inputs: Inputs, gradients: bool = True) -> Standard:
    """What results are judged by."""
    return judge(
        inputs, gradients, oracle, compute, lambda _, power: _term_sizes(inputs, power), {}
    )


def check_accuracy(
    inputs: Inputs, results: Mapping[str, torch.Tensor], standard: Standard | None = None
) -> dict[str, Errors]:
    """Errors of a backend's results against the oracle; AssertionError if one breaks the rule."""
    return (standard or make_standard(inputs)).check(results)
