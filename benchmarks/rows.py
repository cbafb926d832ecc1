"""The rows of a group: hierkernels' backends and the peers, as functions of the same inputs.

A row may have several candidates (memory layouts, kernels of one library): the quickest counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from hierkernels import dispatch
from hierkernels.ops.attention import reference
from hierkernels.testing import Inputs

BACKEND_ROWS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
PEER_ROWS = ("eager", "sdpa", "compiled", "flex")

Function = Callable[[Inputs], torch.Tensor]  # inputs -> out (B, Hq, Nq, Dv)


class Unsupported(Exception):
    """The row cannot compute the case; the message says why."""


@dataclass(frozen=True)
class Candidate:
    """One way to compute a row: the function, the inputs in the layout it wants, and its name."""

    function: Function
    inputs: Inputs
    label: str = ""


def candidates(row: str, inputs: Inputs, direction: str) -> Iterator[Candidate]:
    """The ways to compute a row. Raises Unsupported."""
    if row in dispatch.BACKENDS:
        yield _backend(row, inputs)
    elif row == "eager":
        yield Candidate(_eager, inputs)
    elif row == "compiled":
        yield Candidate(torch.compile(_eager, dynamic=False, fullgraph=True), inputs)
    elif row == "sdpa":
        yield from _sdpa(inputs, direction)
    elif row == "flex":
        yield _flex(inputs, direction)
    else:
        raise ValueError(f"unknown row {row!r}")


def _backend(name: str, inputs: Inputs) -> Candidate:
    try:
        dispatch.resolve("attention", inputs.call(), name)
    except NotImplementedError as error:
        raise Unsupported(str(error)) from error
    return Candidate(lambda i: i.run(name)[0], inputs)


def _eager(inputs: Inputs) -> torch.Tensor:
    return reference.attention(inputs.call())[0]


def _tokens_first(inputs: Inputs) -> Inputs:
    """The same values with the memory order (B, N, H, D)."""
    q, k, v, dout = (
        t.transpose(1, 2).contiguous().transpose(1, 2)
        for t in (inputs.q, inputs.k, inputs.v, inputs.dout)
    )
    return replace(inputs, q=q, k=k, v=v, dout=dout)


def _visible(inputs: Inputs) -> torch.Tensor | None:
    """Bool, broadcastable to the scores, of everything that hides keys; None if nothing does."""
    case = inputs.case
    visible = None
    if case.visible < case.Nq * case.Nk:
        visible = case.visible_range.mask(case.Nq, case.Nk, inputs.q.device)[None, None]
    padding = None if inputs.padding is None else inputs.padding[:, None, None, :]
    for part in (inputs.mask, padding):
        if part is not None:
            visible = part if visible is None else visible & part
    return visible


def _sdpa(inputs: Inputs, direction: str) -> Iterator[Candidate]:
    """F.scaled_dot_product_attention: is_causal where that says it all, else one merged mask.

    The mask is made outside of the timing, except where the bias needs a gradient.
    """
    case = inputs.case
    if case.softcap or case.dropout_p or case.lse_grad:
        raise Unsupported("F.scaled_dot_product_attention has no softcap, seeded dropout or lse")
    options = {"scale": case.scale, "enable_gqa": case.Hq != case.Hkv}
    plain = inputs.bias is None and inputs.mask is None and inputs.padding is None
    whole = case.visible == case.Nq * case.Nk
    causal = case.is_causal and case.window is None and case.key_range is None
    visible: torch.Tensor | None = None
    merged: torch.Tensor | None = None
    if plain and causal and case.Nq == case.Nk:
        options["is_causal"] = True
    elif not (plain and whole):
        visible = _visible(inputs)
        merged = visible if inputs.bias is None else _merge(inputs.bias, visible)

    def attend(i: Inputs) -> torch.Tensor:
        mask = merged
        if i.bias is not None and i.bias.requires_grad:
            mask = _merge(i.bias, visible)
        return F.scaled_dot_product_attention(i.q, i.k, i.v, attn_mask=mask, **options)

    yield Candidate(attend, inputs, "heads first")
    yield Candidate(attend, _tokens_first(inputs), "tokens first")
    if inputs.q.is_cuda:
        for kernel in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
            yield Candidate(_with_kernel(attend, kernel), _tokens_first(inputs), kernel.lower())


def _merge(bias: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    return bias if visible is None else bias.masked_fill(~visible, float("-inf"))


def _with_kernel(function: Function, kernel: str) -> Function:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(i: Inputs) -> torch.Tensor:
        with sdpa_kernel(getattr(SDPBackend, kernel)):
            return function(i)

    return attend


def _flex(inputs: Inputs, direction: str) -> Candidate:
    """Compiled flex_attention; its block mask is made outside of the timing."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case, device = inputs.case, inputs.q.device
    if direction == "backward" and device.type == "cpu":
        raise Unsupported("flex_attention has no backward on the CPU")
    if case.key_range is not None:
        raise Unsupported("written for causal and window ranges only")
    if case.softcap or case.dropout_p or case.lse_grad:
        raise Unsupported("not written for softcap, dropout and gradients of lse")
    own = case.Nk - case.Nq
    left, right = case.window or (None, None)
    right = 0 if case.is_causal else right
    mask, padding = inputs.mask, inputs.padding

    def mask_mod(b, h, i, j):
        visible = j >= 0
        if right is not None:
            visible = visible & (j <= i + own + right)
        if left is not None:
            visible = visible & (j >= i + own - left)
        if mask is not None:
            visible = visible & mask[tuple(_index(mask, b, h, i, j))]
        if padding is not None:
            visible = visible & padding[b, j]
        return visible

    batches = case.B if padding is not None or "b" in case.mask else None
    heads = case.Hq if "h" in case.mask else None
    block_mask = None
    if case.visible < case.Nq * case.Nk or mask is not None or padding is not None:
        block_mask = create_block_mask(mask_mod, batches, heads, case.Nq, case.Nk, device=device)
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def attend(i: Inputs) -> torch.Tensor:
        bias = i.bias

        def score_mod(score, b, h, q, k):
            return score + bias[tuple(_index(bias, b, h, q, k))]

        return compiled(
            i.q, i.k, i.v, score_mod=None if bias is None else score_mod, block_mask=block_mask,
            scale=case.scale, enable_gqa=case.Hq != case.Hkv,
        )  # fmt: skip

    return Candidate(attend, inputs)


def _index(t: torch.Tensor, *indices: torch.Tensor) -> Iterator[torch.Tensor | int]:
    """The indices of a broadcast tensor: 0 in dimensions of size 1."""
    for size, index in zip(t.shape, indices, strict=True):
        yield 0 if size == 1 else index
