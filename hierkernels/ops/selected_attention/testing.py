"""Inputs from a named case of selected attention, and errors against the float64 oracle.

The rule is that of hierkernels/testing.py.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from hierkernels.ops.selected_attention import api, reference
from hierkernels.ops.selected_attention.call import SelectedCall
from hierkernels.ops.selected_attention.patterns import draw_indices
from hierkernels.ops.selected_attention.spec import Case
from hierkernels.testing import (
    Errors,
    Results,
    Standard,
    compute,
    judge,
    lay_out,
    oracle,
)


@dataclass(frozen=True)
class Inputs:
    """The tensors of one case; the values depend on the case's name and the seed alone."""

    case: Case
    q: torch.Tensor  # (B, Hq, Nq, D)
    k: torch.Tensor  # (B, Hkv, Nk, D)
    v: torch.Tensor  # (B, Hkv, Nk, Dv)
    indices: torch.Tensor  # (B, Hkv or Hq, Nq, n)
    weights: torch.Tensor | None  # as indices
    dout: torch.Tensor  # (B, Hq, Nq, Dv), the gradient that backward starts from
    dlse: torch.Tensor | None  # (B, Hq, Nq), if the case has lse_grad

    @property
    def dtype(self) -> torch.dtype:
        return self.q.dtype

    def arguments(self) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        """The case as hk.selected_attention takes it."""
        case = self.case
        options = {
            "block_size": case.S, "block_weights": self.weights, "include_own_block": case.own,
            "is_causal": case.is_causal, "scale": case.scale,
        }  # fmt: skip
        return (self.q, self.k, self.v, self.indices), options

    def call(self) -> SelectedCall:
        """The case as every backend receives it."""
        tensors, options = self.arguments()
        return api.make_call(*tensors, **options)

    def run(self, backend: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) of a backend, through the public operator."""
        return api.run(self.call(), backend)

    def differentiable(self) -> dict[str, torch.Tensor]:
        """The inputs that have a gradient, by the name of it."""
        tensors = {"dq": self.q, "dk": self.k, "dv": self.v}
        return tensors if self.weights is None else tensors | {"dweights": self.weights}

    def requires_grad(self) -> Inputs:
        """The same values as fresh leaves that require gradients; strides are kept."""
        leaves: dict[str, Any] = {
            k[1:]: t.detach().requires_grad_() for k, t in self.differentiable().items()
        }
        return replace(self, **leaves)

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another dtype."""
        lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        dlse = None if self.dlse is None else self.dlse.to(lse_dtype)
        tensors: dict[str, Any] = {k[1:]: t.to(dtype) for k, t in self.differentiable().items()}
        return replace(self, dout=self.dout.to(dtype), dlse=dlse, **tensors)


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> Inputs:
    """Normally distributed tensors for a case, drawn on the CPU, so equal on every device.

    Weights lie in [0.5, 1.5].
    """
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()) + seed)
    precise = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, gain: float = 1.0) -> torch.Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=precise)
        return (drawn * gain).to(dtype).to(device)

    q, k, v = lay_out(
        normal(case.B, case.Hq, case.Nq, case.D, gain=case.gain),
        normal(case.B, case.Hkv, case.Nk, case.D),
        normal(case.B, case.Hkv, case.Nk, case.Dv),
        case.layout,
    )
    dout = normal(case.B, case.Hq, case.Nq, case.Dv)
    dlse = None
    if case.lse_grad:
        dlse = torch.randn(dout.shape[:3], generator=generator, dtype=precise).to(device)
    indices = draw_indices(case.pattern, case.indices_shape, case.S, case.Nk, generator)
    weights = None
    if case.weights:
        drawn = torch.rand(case.indices_shape, generator=generator, dtype=precise)
        weights = (drawn + 0.5).to(dtype).to(device)
    return Inputs(case, q, k, v, indices.to(device), weights, dout, dlse)


@torch.no_grad()
def term_sizes(
    inputs: Inputs, expected: Mapping[str, torch.Tensor], power: int
) -> dict[str, torch.Tensor]:
    """For each result, the size of the terms it is summed from: (sum |term|^power)^(1 / power).

    power 2 is what rounding each term once can move the sum by, in units of eps: independent errors
    add in quadrature. power 1 bounds what the order of the summation can.
    """
    call = inputs.to(torch.float64).call()
    scores = reference.masked_scores(call)
    group = call.group

    def size(t: torch.Tensor) -> torch.Tensor:
        return t.to(torch.float64).abs() ** power

    def per_kv_head(t: torch.Tensor) -> torch.Tensor:
        return t.unflatten(1, (-1, group)).sum(2)

    p = size(reference.probabilities(scores, expected["lse"].to(torch.float64)))
    k, v = (size(t.repeat_interleave(group, dim=1)) for t in (call.k, call.v))
    q, do, scale = size(call.q), size(inputs.dout), size(torch.tensor(call.scale))
    # lse = maximum + log of a sum: either may be the larger term.
    largest = expected["lse"].to(torch.float64).nan_to_num(neginf=0.0).abs().clamp(min=1)
    if scores.shape[-1]:
        largest = torch.maximum(largest, scores.nan_to_num(neginf=0.0).abs().amax(-1))
    sizes = {"out": p @ v, "lse": size(largest)}
    if "dq" in expected:
        delta = (size(expected["out"]) * do).sum(-1, keepdim=True)
        if inputs.dlse is not None:
            delta = delta + size(inputs.dlse)[..., None]
        ds = p * (do @ v.mT + delta)
        if call.weights is not None:
            products = (q @ k.mT) * scale
            sizes["dweights"] = reference.weights_gradient(call, ds * products)
            weights = reference.key_weights(call)
            assert weights is not None
            ds = ds * size(weights)
        sizes["dq"] = (ds @ k) * scale
        sizes["dk"] = per_kv_head(ds.mT @ q) * scale
        sizes["dv"] = per_kv_head(p.mT @ do)
    return {name: t ** (1 / power) for name, t in sizes.items()}


@torch.no_grad()
def unseen(inputs: Inputs) -> Results:
    """Bool, where a result is exactly 0: queries that see no key, keys that no query sees."""
    call = inputs.call()
    seen = reference.visible(call)
    no_key = ~seen.any(-1)[..., None]
    no_query = ~seen.any(-2).unflatten(1, (-1, call.group)).any(2)[..., None]
    hidden = {"out": no_key, "dq": no_key, "dk": no_query, "dv": no_query}
    if inputs.weights is not None:
        hidden["dweights"] = reference.weights_gradient(call, seen.to(torch.float32)) == 0
    return hidden


def make_standard(inputs: Inputs, gradients: bool = True) -> Standard:
    """What results of selected attention are judged by."""
    return judge(
        inputs,
        gradients,
        oracle,
        compute,
        lambda expected, power: term_sizes(inputs, expected, power),
        unseen(inputs),
    )


def check_accuracy(
    inputs: Inputs, results: Mapping[str, torch.Tensor], standard: Standard | None = None
) -> dict[str, Errors]:
    """Errors of a backend's results against the oracle; AssertionError if one breaks the rule."""
    gradients = any(name.startswith("d") for name in results)
    return (standard or make_standard(inputs, gradients)).check(results)
