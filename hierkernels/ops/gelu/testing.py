"""Inputs from a named case, and errors against the float64 oracle; used by tests."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from hierkernels.ops.gelu.api import make_call, run
from hierkernels.ops.gelu.spec import Case
from hierkernels.testing import Errors, Results, Standard, judge


@dataclass(frozen=True)
class Inputs:
    """The tensors of one case; the values depend on the case's name alone."""

    case: Case
    x: torch.Tensor  # (R, C)
    dout: torch.Tensor  # (R, C) or (R, C / 2), of all results side by side

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another dtype."""
        return replace(self, x=self.x.to(dtype), dout=self.dout.to(dtype))


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device | str = "cpu") -> Inputs:
    """Normally distributed tensors for a case, drawn on the CPU, so equal on every device."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=wide)

    x = (normal(case.R, case.C) * case.gain).to(dtype).to(device)
    if case.strided:
        x = x.T.contiguous().T
    dout = normal(case.R, case.C // 2 if case.form == "gated" else case.C)
    return Inputs(case, x, dout.to(dtype).to(device))


def compute(inputs: Inputs, backend: str | None, gradients: bool = True) -> Results:
    """out of a backend, halves side by side, and the gradient of sum(out dout), detached."""
    x = inputs.x.detach().requires_grad_(gradients)
    first, second = run(make_call(x, inputs.case.form), backend)
    out = torch.cat((first, second), dim=-1) if inputs.case.form == "halves" else first
    if not gradients:
        return {"out": out}
    return {"out": out.detach(), "dx": torch.autograd.grad(out, x, inputs.dout)[0]}


def oracle(inputs: Inputs, gradients: bool = True) -> Results:
    """The reference in float64, on the values that the inputs have."""
    return compute(inputs.to(torch.float64), "reference", gradients)


@torch.no_grad()
def _term_sizes(inputs: Inputs, expected: Results) -> Results:
    """Of each result its size, and of a slope that of its two terms."""
    precise = inputs.to(torch.float64)
    sizes = {k: t.abs() for k, t in expected.items()}
    if not precise.x.numel():
        return sizes
    x, dout = precise.x, precise.dout.abs()
    cdf = 0.5 * torch.erfc(-x * 0.5**0.5)
    slope = cdf + x.abs() * torch.exp(-0.5 * x * x) * (0.5 / torch.pi) ** 0.5
    if inputs.case.form != "gated":
        return sizes | {"dx": dout * slope}
    a, b = x.abs().chunk(2, dim=-1)
    right = b * cdf.chunk(2, dim=-1)[1]
    return sizes | {"dx": torch.cat((dout * right, dout * a * slope.chunk(2, dim=-1)[1]), dim=-1)}


def make_standard(inputs: Inputs, gradients: bool = True) -> Standard:
    """What results are judged by."""
    return judge(
        inputs, gradients, oracle, compute, lambda expected, _: _term_sizes(inputs, expected), {}
    )


def check_accuracy(
    inputs: Inputs, results: Mapping[str, torch.Tensor], standard: Standard | None = None
) -> dict[str, Errors]:
    """Errors of a backend's results against the oracle; AssertionError if one breaks the rule."""
    return (standard or make_standard(inputs)).check(results)
