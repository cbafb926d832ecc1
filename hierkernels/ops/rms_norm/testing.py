"""Inputs from a named case, and errors against the float64 oracle; used by tests."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from hierkernels.ops.rms_norm import reference
from hierkernels.ops.rms_norm.api import make_call, run
from hierkernels.ops.rms_norm.call import NormCall
from hierkernels.ops.rms_norm.spec import Case
from hierkernels.testing import Errors, Results, Standard, judge


@dataclass(frozen=True)
class Inputs:
    """The tensors of one case; the values depend on the case's name alone."""

    case: Case
    x: torch.Tensor  # (B, N, C)
    weight: torch.Tensor  # (C)
    bias: torch.Tensor | None  # (C)
    dout: torch.Tensor  # (B, N, C), the gradient that backward starts from
    to_dtype: torch.dtype  # of the result

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest of the results and gradients."""
        return self.to_dtype if self.x.dtype == torch.float32 else self.x.dtype

    def call(self) -> NormCall:
        """The case as every backend receives it."""
        options = {
            "bias": self.bias,
            "eps": self.case.eps,
            "eps_is_added": self.case.added,
            "shift": self.case.shift,
            "dtype": self.to_dtype,
        }
        return make_call(self.x, self.weight, **options)  # type: ignore[arg-type]

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values, all in another dtype."""
        tensors: dict = {k[1:]: t.to(dtype) for k, t in self.differentiable().items()}
        return replace(self, dout=self.dout.to(dtype), to_dtype=dtype, **tensors)

    def differentiable(self) -> dict[str, torch.Tensor]:
        """The inputs that have a gradient, by the name of it."""
        tensors = {"dx": self.x, "dweight": self.weight}
        return tensors if self.bias is None else tensors | {"dbias": self.bias}


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device | str = "cpu") -> Inputs:
    """Normally distributed tensors for a case, drawn on the CPU, so equal on every device."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    precise = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=precise)

    x = normal(case.B, case.N, case.C)
    if case.zeros:
        x[:, ::3] = 0
        x[:, 1::3] *= 0.1
    if case.far:
        x += 10
    x = x.to(dtype).to(device)
    if case.strided:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    of_parameters = torch.float32 if case.mixed else dtype
    weight = normal(case.C).to(of_parameters).to(device)
    bias = normal(case.C).to(of_parameters).to(device) if case.bias else None
    to = case.to or torch.promote_types(dtype, weight.dtype)
    return Inputs(case, x, weight, bias, normal(*x.shape).to(to).to(device), to)


def compute(inputs: Inputs, backend: str | None, gradients: bool = True) -> Results:
    """out of a backend, and the gradients of sum(out dout), detached."""
    leaves = {k: t.detach().requires_grad_(gradients) for k, t in inputs.differentiable().items()}
    values: dict = {k[1:]: t for k, t in leaves.items()}
    out = run(replace(inputs, **values).call(), backend)
    if not gradients:
        return {"out": out}
    grads = torch.autograd.grad(out, list(leaves.values()), inputs.dout.to(out.dtype))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def oracle(inputs: Inputs, gradients: bool = True) -> Results:
    """The reference in float64, on the values that the inputs have."""
    return compute(inputs.to(torch.float64), "reference", gradients)


@torch.no_grad()
def _term_sizes(inputs: Inputs, expected: Results, power: int) -> Results:
    """Of each result the size of the terms it is summed from: (sum |term|^power)^(1 / power)."""
    precise = inputs.to(torch.float64)
    call, dout = precise.call(), precise.dout.abs()
    s = reference.shifted(call)
    if call.bias is None:
        mean, size = s.new_zeros(()), s.abs()
    else:  # what is left of s is a difference
        mean = s.mean(-1, keepdim=True)
        size = s.abs() + mean.abs()
    length = torch.linalg.vector_norm(s - mean, dim=-1, keepdim=True).clamp(min=call.floor)
    length = (length.square() + call.addend).sqrt()
    unit, weight = size / length, call.weight.abs() * call.scale
    terms = (dout * unit * call.scale) ** power
    sizes = {"out": unit * weight, "dweight": terms.sum((0, 1)) ** (1 / power)}
    if call.bias is not None:
        sizes["out"] = sizes["out"] + call.bias.abs()
        sizes["dbias"] = (dout**power).sum((0, 1)) ** (1 / power)
    # What is taken away is a projection: a sum over the row, times the unit row.
    along = ((dout * weight * unit) ** power).sum(-1, keepdim=True) ** (1 / power)
    grad = dout * weight + unit * along
    if call.bias is not None:
        grad = grad + (grad**power).mean(-1, keepdim=True) ** (1 / power)
    moved = replace(precise, x=grad / length)
    if call.shift:
        moved_back = torch.zeros_like(moved.x)
        N, kept = call.x.shape[1], call.kept
        by = min(call.shift, N)
        moved_back[..., :kept] = moved.x[..., :kept]
        moved_back[:, : N - by, kept:] = moved.x[:, by:, kept:]
        moved = replace(moved, x=moved_back)
    return sizes | {"dx": moved.x}


def make_standard(inputs: Inputs, gradients: bool = True) -> Standard:
    """What results are judged by."""
    return judge(
        inputs, gradients, oracle, compute,
        lambda expected, power: _term_sizes(inputs, expected, power), {},
    )  # fmt: skip


def check_accuracy(
    inputs: Inputs, results: Mapping[str, torch.Tensor], standard: Standard | None = None
) -> dict[str, Errors]:
    """Errors of a backend's results against the oracle; AssertionError if one breaks the rule."""
    return (standard or make_standard(inputs)).check(results)
