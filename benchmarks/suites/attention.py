"""hk.attention against eager PyTorch, torch.compile of it, SDPA and flex_attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F

from benchmarks.suite import (
    BACKEND_ROWS,
    Candidate,
    MemorySweep,
    OpProblem,
    Suite,
    Sweep,
    Unsupported,
)
from hierkernels import dispatch, testing
from hierkernels.ops.attention import reference
from hierkernels.ops.attention.spec import SPEED, Case
from hierkernels.testing import Inputs

Function = Callable[[Inputs], torch.Tensor]  # inputs -> out (B, Hq, Nq, Dv)

CHECK_SCORES = 2**22  # a case with more (query, key) pairs is checked on some of its queries
CHECK_START, CHECK_STEP = 7, 61  # prime, so that the queries fall on every place of a tile
CHECK_SEQUENCES = 256  # a larger batch is checked on some of its sequences
SEQUENCE_STEP = 13

# Peers that compile for each shape take most of a run: the quick set has one of them, once.
# The eager reference takes long, and gigabytes, beyond 1024 tokens: the full set has it.
FLEX_IN_QUICK = ("long-1x8x2048x64",)
FLOAT32_IN_QUICK = (*FLEX_IN_QUICK, "bias-1x8x1024x64-hqk")
EAGER_SCORES_IN_QUICK = 8 * 1024**2

MEMORY_HEADS, MEMORY_CHANNELS = 1, 64  # one head: eager at N = 16384 then needs some 6 GB


def _memory_case(n: int) -> Case:
    heads, d = MEMORY_HEADS, MEMORY_CHANNELS
    return Case(f"memory-n{n}", 1, heads, heads, n, n, d, d, is_causal=True)


def _memory_needs(row: str, n: int) -> float:
    """Eager PyTorch holds up to six (N, N) tensors at a time."""
    return 6 * MEMORY_HEADS * n * n * 4 if row == "eager" else 0


class AttentionSuite(Suite):
    """Causal, grouped, biased, masked, padded and windowed attention, long and short."""

    name = "attention"
    peers: ClassVar = {
        "eager": "eager reference",
        "sdpa": "F.scaled_dot_product_attention",
        "compiled": "torch.compile",
        "flex": "flex_attention",
    }
    yardstick = "sdpa"
    charted = ("long", "short")
    cases = SPEED
    sweeps = (
        Sweep(
            "time",
            "Causal attention, (1, 8, N, 64)",
            "N",
            {c.name: c.Nq for c in SPEED if c.name == f"long-1x8x{c.Nq}x64"},
        ),
    )
    memory = MemorySweep(
        f"causal, (1, {MEMORY_HEADS}, N, {MEMORY_CHANNELS})",
        _memory_case,
        rows=("cpu", "eager"),
        lengths=(1024, 2048, 4096, 8192, 16384),
        quick_lengths=(1024, 16384),
        needs=_memory_needs,
    )

    def quick_dtypes(self, case: Case) -> Sequence[torch.dtype]:
        return (torch.float32,) if case.name in FLOAT32_IN_QUICK else super().quick_dtypes(case)

    def rows(self, case: Case, device: str, full: bool) -> list[str]:
        peers = list(self.peers)
        if not full:
            peers.remove("compiled")
            if case.name not in FLEX_IN_QUICK:
                peers.remove("flex")
            if case.B * case.Hq * case.Nq * case.Nk > EAGER_SCORES_IN_QUICK:
                peers.remove("eager")
        return [*BACKEND_ROWS[device], *peers]

    def shape(self, case: Case) -> list[int]:
        return [case.B, case.Hq, case.Hkv, case.Nq, case.Nk, case.D, case.Dv]

    def inputs(self, case: Case, dtype: torch.dtype, device: str) -> Inputs:
        return testing.make_inputs(case, dtype, device)

    def problem(self, case: Case, dtype: torch.dtype, device: str) -> OpProblem:
        inputs = self.inputs(case, dtype, device)
        if case.B * case.Hq * case.Nq * case.Nk > CHECK_SCORES:
            queries = {"out": 2, "dq": 2, "dbias": 2}
            standard = testing.make_standard(inputs.thin(CHECK_START, CHECK_STEP))
            return OpProblem(inputs, standard, queries, slice(CHECK_START, None, CHECK_STEP))
        if case.B > CHECK_SEQUENCES and not case.dropout_p:  # whose mask has the sequence's index
            sequences = dict.fromkeys(("out", "dq", "dk", "dv", "dbias"), 0)
            some = slice(CHECK_START, None, SEQUENCE_STEP)
            return OpProblem(
                inputs, testing.make_standard(some_sequences(inputs, some)), sequences, some
            )
        return OpProblem(inputs, testing.make_standard(inputs), {"out": 2})

    def candidates(self, row: str, inputs: Inputs, direction: str) -> Iterator[Candidate]:
        if row in dispatch.BACKENDS:
            yield backend_candidate(row, inputs)
        elif row == "eager":
            yield Candidate(_eager, inputs)
        elif row == "compiled":
            yield Candidate(torch.compile(_eager, dynamic=False, fullgraph=True), inputs)
        elif row == "sdpa":
            yield from _sdpa(inputs)
        elif row == "flex":
            yield flex_candidate(inputs, direction)
        else:
            raise ValueError(f"unknown row {row!r}")


def some_sequences(inputs: Inputs, sequences: slice) -> Inputs:
    """The problem of some sequences; the others do not touch them."""

    def cut(t: torch.Tensor | None) -> torch.Tensor | None:
        return t if t is None or t.shape[0] == 1 else t[sequences]

    q, k, v, dout = (t[sequences] for t in (inputs.q, inputs.k, inputs.v, inputs.dout))
    return replace(
        inputs,
        case=replace(inputs.case, B=q.shape[0]),
        q=q,
        k=k,
        v=v,
        bias=cut(inputs.bias),
        mask=cut(inputs.mask),
        padding=cut(inputs.padding),
        dout=dout,
        dlse=cut(inputs.dlse),
    )


def backend_candidate(name: str, inputs: Inputs) -> Candidate:
    try:
        dispatch.resolve("attention", inputs.call(), name)
    except NotImplementedError as error:
        raise Unsupported(str(error)) from error
    return Candidate(lambda i: i.run(name)[0], inputs)


def _eager(inputs: Inputs) -> torch.Tensor:
    return reference.attention(inputs.call())[0]


def tokens_first(inputs: Inputs) -> Inputs:
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


def sdpa_function(inputs: Inputs) -> Function:
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

    return attend


def _sdpa(inputs: Inputs) -> Iterator[Candidate]:
    attend = sdpa_function(inputs)
    yield Candidate(attend, inputs, "heads first")
    yield Candidate(attend, tokens_first(inputs), "tokens first")
    if inputs.q.is_cuda:
        for kernel in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
            yield Candidate(with_kernel(attend, kernel), tokens_first(inputs), kernel.lower())


def _merge(bias: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    return bias if visible is None else bias.masked_fill(~visible, float("-inf"))


def with_kernel(function: Function, kernel: str) -> Function:
    """The function with one of F.scaled_dot_product_attention's kernels, a name of SDPBackend."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(i: Inputs) -> torch.Tensor:
        with sdpa_kernel(getattr(SDPBackend, kernel)):
            return function(i)

    return attend


def flex_candidate(inputs: Inputs, direction: str) -> Candidate:
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


SUITE = AttentionSuite()
