"""Inputs from a named case, and errors against the float64 oracle; used by tests and benchmarks.

The accuracy rule is that of hierkernels/testing.py: error <= 2 x the error of the same formula in
eager PyTorch at that dtype, plus the rounding of each result's terms.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from hierkernels.ops.causal_sgu import api, reference
from hierkernels.ops.causal_sgu.call import SguCall
from hierkernels.ops.causal_sgu.spec import Case
from hierkernels.testing import Errors, Results, Standard, judge

# Where relu's argument is nearer to its kink than this share of its terms, its slope is a toss-up.
_KINK = 0.03


@dataclass(frozen=True)
class Inputs:
    """The tensors of one case; the values depend on the case's name and the seed alone."""

    case: Case
    residual: torch.Tensor  # (B, N, C)
    gate: torch.Tensor  # (B, N, C)
    weight: torch.Tensor  # (H, S, S) or (H, w, 2 w)
    bias: torch.Tensor  # (H, S) or (H, w)
    gate_residual: torch.Tensor | None  # (B, N, C)
    dout: torch.Tensor  # (B, N, C), the gradient that backward starts from

    @property
    def dtype(self) -> torch.dtype:
        return self.gate.dtype

    def arguments(self) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        """The case as hk.causal_sgu takes it."""
        options = {
            "window": self.case.window,
            "gate_residual": self.gate_residual,
            "activation": self.case.activation,
        }
        return (self.residual, self.gate, self.weight, self.bias), options

    def call(self) -> SguCall:
        """The case as every backend receives it."""
        tensors, options = self.arguments()
        return api.make_call(*tensors, **options)

    def run(self, backend: str | None) -> torch.Tensor:
        """out of a backend, through the public operator."""
        return api.run(self.call(), backend)

    def differentiable(self) -> dict[str, torch.Tensor]:
        """The inputs that have a gradient, by the name of it."""
        tensors = {
            "dresidual": self.residual, "dgate": self.gate, "dweight": self.weight,
            "dbias": self.bias,
        }  # fmt: skip
        if self.gate_residual is not None:
            tensors["dgate_residual"] = self.gate_residual
        return tensors

    def requires_grad(self) -> Inputs:
        """The same values as fresh leaves that require gradients; strides are kept."""
        leaves: dict[str, Any] = {
            k[1:]: t.detach().requires_grad_() for k, t in self.differentiable().items()
        }
        return replace(self, **leaves)

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another dtype, the parameters too."""
        tensors: dict[str, Any] = {k[1:]: t.to(dtype) for k, t in self.differentiable().items()}
        return replace(self, dout=self.dout.to(dtype), **tensors)


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> Inputs:
    """Normally distributed tensors for a case, drawn on the CPU, so equal on every device.

    The weight's future is NaN: nobody may read it. Its past is scaled to give mixed gates of about
    unit size. With relu, dout is 0 where the slope is a toss-up.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()) + seed)
    precise = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, gain: float = 1.0, to: torch.dtype = dtype) -> torch.Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=precise)
        return (drawn * gain).to(to).to(device)

    shape = (case.B, case.N, case.C)
    residual, gate = _lay_out(normal(*shape), normal(*shape), case.layout)
    H, rows, columns = case.weight_shape
    parameters = case.weight_dtype(dtype)
    gain = max(min(case.N, columns), 1) ** -0.5
    weight = normal(H, rows, columns, gain=gain, to=parameters)
    future = torch.ones(rows, columns, dtype=torch.bool, device=device).triu(1 + columns - rows)
    weight.masked_fill_(future, float("nan"))
    bias = normal(H, rows, to=parameters)
    gate_residual = normal(*shape) if case.gate_residual else None
    inputs = Inputs(case, residual, gate, weight, bias, gate_residual, normal(*shape))
    if case.activation == "relu":
        precise_inputs = inputs.to(torch.float64)
        z = reference.preactivation(precise_inputs.call())
        sure = z.abs() > _KINK * _mix_size(precise_inputs, 2)
        inputs = replace(inputs, dout=inputs.dout * sure)
    return inputs


def _lay_out(
    residual: torch.Tensor, gate: torch.Tensor, layout: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same values in the memory order that a case names."""
    if layout == "bnc":
        return residual, gate
    if layout == "halves":
        first, second = torch.cat((residual, gate), -1).chunk(2, -1)
        return first, second
    if layout == "cbn":
        return residual.permute(2, 0, 1).contiguous().permute(1, 2, 0), gate.mT.contiguous().mT
    if layout == "unaligned":
        return F.pad(residual, (1, 0))[..., 1:], F.pad(gate, (1, 0))[..., 1:]
    if layout == "broadcast":
        return residual[:1].expand_as(residual), gate[:1].expand_as(gate)
    raise ValueError(f"unknown layout {layout!r}")


def compute(inputs: Inputs, backend: str | None, gradients: bool = True) -> Results:
    """out of a backend, and the gradients of sum(out dout), detached."""
    if not gradients:
        with torch.no_grad():
            return {"out": inputs.run(backend)}
    inputs = inputs.requires_grad()
    out = inputs.run(backend)
    return {"out": out.detach(), **differentiate(inputs, out)}


def differentiate(inputs: Inputs, out: torch.Tensor) -> Results:
    """The gradients of sum(out dout)."""
    wanted = inputs.differentiable()
    grads = torch.autograd.grad(out, list(wanted.values()), inputs.dout.to(out.dtype))
    return dict(zip(wanted, grads, strict=True))


def oracle(inputs: Inputs, gradients: bool = True) -> Results:
    """The reference in float64, on the values that the inputs have."""
    return compute(inputs.to(torch.float64), "reference", gradients)


def _powers(inputs: Inputs, power: int) -> Inputs:
    """|values|^power without an activation: sums of these are the sizes of the terms."""
    tensors = {k[1:]: t.abs() ** power for k, t in inputs.differentiable().items()}
    case = replace(inputs.case, activation=None)
    return replace(inputs, case=case, dout=inputs.dout.abs() ** power, **tensors)


def _mix_size(inputs: Inputs, power: int) -> torch.Tensor:
    """The size of the terms of the pre-activation: (sum |term|^power)^(1 / power)."""
    return reference.preactivation(_powers(inputs, power).call()) ** (1 / power)


@torch.no_grad()
def term_sizes(inputs: Inputs, power: int, gradients: bool) -> dict[str, torch.Tensor]:
    """For each result, the size of the terms it is summed from: (sum |term|^power)^(1 / power).

    power 2 is what rounding each term once can move the sum by, in units of eps: independent errors
    add in quadrature. power 1 bounds what the order of the summation can.
    """
    inputs = inputs.to(torch.float64)
    mix = _mix_size(inputs, power)
    sizes = {"out": inputs.residual.abs() * mix}
    if not gradients:
        return sizes
    sizes["dresidual"] = inputs.dout.abs() * mix
    # d mix = dout residual act'(z): rounded itself, and moved by what z is, as |act''| <= 1.
    bent = inputs.case.activation in ("gelu", "silu", "tanh", "sigmoid")
    dmix = (inputs.dout * inputs.residual).abs() * (1 + mix if bent else 1)
    products = replace(_powers(inputs, power), dout=dmix**power)
    products = replace(products, residual=torch.ones_like(products.residual))
    call = products.call()
    _, dgate, dweight, dbias, _ = reference.backward(
        call, torch.zeros_like(dmix), products.dout, (True,) * 5
    )
    assert dgate is not None and dweight is not None and dbias is not None
    sums = {"dgate": dgate, "dweight": dweight, "dbias": dbias}
    sizes |= {name: t ** (1 / power) for name, t in sums.items()}
    sizes["dgate_residual"] = dmix
    return sizes


@torch.no_grad()
def unseen(inputs: Inputs) -> Results:
    """Bool, where a gradient is exactly 0: weights of the future, and those beyond the tokens."""
    H, rows, columns = inputs.weight.shape
    N, look_back = inputs.case.N, columns - rows
    i = torch.arange(rows, device=inputs.weight.device)[:, None]
    j = torch.arange(columns, device=inputs.weight.device)
    used = (j - look_back <= i) & (i < N) & (j - look_back < N)
    if look_back:  # only buckets after the first look back
        used &= (j >= look_back) | (i < N - rows)
    hidden = (~used).expand(H, rows, columns)
    return {"dweight": hidden, "dbias": (i[:, 0] >= N).expand(H, rows)}


def make_standard(inputs: Inputs, gradients: bool = True) -> Standard:
    """What results of the gating unit are judged by."""
    return judge(
        inputs,
        gradients,
        oracle,
        compute,
        lambda _, power: term_sizes(inputs, power, gradients),
        unseen(inputs) if gradients else {},
    )


def check_accuracy(
    inputs: Inputs, results: Mapping[str, torch.Tensor], standard: Standard | None = None
) -> dict[str, Errors]:
    """Errors of a backend's results against the oracle; AssertionError if one breaks the rule."""
    gradients = any(name.startswith("d") for name in results)
    return (standard or make_standard(inputs, gradients)).check(results)
