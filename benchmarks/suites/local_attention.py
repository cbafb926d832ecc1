"""hk.local_attention against dense attention, flex_attention and the package local-attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
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
from benchmarks.suites.attention import backend_candidate
from hierkernels import dispatch
from hierkernels.ops.local_attention import reference, testing
from hierkernels.ops.local_attention.spec import SPEED, LocalCase
from hierkernels.ops.local_attention.testing import LocalInputs
from hierkernels.testing import Standard

# Dense rows grow with the square of N. What compiles takes longer than all else: the quick set
# has flex_attention at one length, and torch.compile of the dense reference not at all.
DENSE_ROWS = ("eager", "sdpa", "compiled")
DENSE_TOKENS, DENSE_TOKENS_IN_QUICK = 4096, 1024
FLEX_IN_QUICK = ("local-length-1x8x8192x64-w128",)

QUERIES_OF_A_CHUNK = 133  # at least; prime, so that a chunk ends within a tile
MANY_TOKENS = 768  # of a chunk: then there are two chunks, not three


def _memory_case(n: int) -> LocalCase:
    return LocalCase(
        f"memory-n{n}", 1, 1, 1, n, n, 64, 64, is_causal=True, width=128, exact_window=True
    )


def _memory_needs(row: str, n: int) -> float:
    """Eager PyTorch holds up to six (N, N) tensors at a time."""
    return 6 * n * n * 4 if row == "eager" else 0


@dataclass(frozen=True)
class ChunkProblem(OpProblem):
    """A long sequence, judged on a few chunks of it.

    A query sees its neighbourhood only, so the oracle computes chunks that start at a bucket, as
    the sequences of a batch. Judged are the queries whose keys all lie in their chunk, dout is 0 at
    all others, and gradients must be 0 outside of the chunks.
    """

    starts: tuple[int, ...] = ()
    in_chunk: torch.Tensor | None = None  # (chunks, tokens of a chunk) bool, True = judged

    def cut(self, name: str, t: torch.Tensor) -> torch.Tensor:
        if name == "dbias":
            return t
        assert self.in_chunk is not None
        chunks = _chunks(t, self.starts, self.in_chunk.shape[1])
        if name == "out":
            return chunks.transpose(1, 2)[self.in_chunk]
        outside = torch.ones(t.shape[2], dtype=torch.bool, device=t.device)
        for start in self.starts:
            outside[start : start + self.in_chunk.shape[1]] = False
        if t[:, :, outside].any():
            raise AssertionError(f"{name}: not exactly 0 where no query has a gradient")
        return chunks


def _chunks(t: torch.Tensor, starts: tuple[int, ...], tokens: int) -> torch.Tensor:
    """(1, H, N, D) -> (chunks, H, tokens, D)."""
    return torch.cat([t[:, :, start : start + tokens] for start in starts])


def _chunk_problem(inputs: LocalInputs, tokens: int) -> ChunkProblem:
    case = inputs.case
    N, w, before = case.Nq, case.width, case.look_backward * case.width
    after = 0 if case.is_causal else (case.forward_buckets + 1) * w
    starts: tuple[int, ...] = (0, (N - tokens) // 2 // w * w, N - tokens)
    if tokens > MANY_TOKENS:
        starts = starts[::2]
    device = inputs.q.device
    judged = torch.zeros(len(starts), tokens, dtype=torch.bool, device=device)
    for row, start in zip(judged, starts, strict=True):
        row[before if start else 0 : None if start + tokens == N else tokens - after] = True
    every = torch.arange(tokens, device=device) + torch.tensor(starts, device=device)[:, None]
    q, k, v, dout = (
        _chunks(t, starts, tokens) for t in (inputs.q, inputs.k, inputs.v, inputs.dout)
    )
    part = replace(
        inputs,
        case=replace(case, B=len(starts), Nq=tokens, Nk=tokens),
        q=q,
        k=k,
        v=v,
        dout=dout * judged[:, None, :, None],
    )
    standard = testing.make_standard(part)
    # Of the other queries, out would be that of a sequence that starts at the chunk.
    out = {"out": standard.expected["out"].transpose(1, 2)[judged]}
    no_key = {"out": standard.unseen["out"].expand((*q.shape[:3], 1)).transpose(1, 2)[judged]}
    standard = Standard(standard.expected | out, standard.allowed, standard.unseen | no_key)
    return ChunkProblem(inputs, standard, {"out": 2}, every[judged], starts, judged)


class LocalAttentionSuite(Suite):
    """Exact causal windows over length, window and head size, and a few options."""

    name = "local_attention"
    peers: ClassVar = {
        "eager": "eager reference (dense)",
        "sdpa": "F.scaled_dot_product_attention, dense mask",
        "compiled": "torch.compile of the reference",
        "flex": "flex_attention",
        "package": "local-attention",
    }
    yardstick = "package"
    cases = SPEED
    sweeps = (
        Sweep(
            "time",
            "Local attention, causal, (1, 8, N, 64), w = 128",
            "N",
            {c.name: c.Nq for c in SPEED if c.group == "local-length"},
        ),
        Sweep(
            "window",
            "Local attention, causal, (1, 8, 8192, 64)",
            "w",
            {
                c.name: c.width
                for c in SPEED
                if c.group == "local-window" or c.name == "local-length-1x8x8192x64-w128"
            },
        ),
        Sweep(
            "head-dim",
            "Local attention, causal, (1, 8, 8192, D), w = 128",
            "D",
            {
                c.name: c.D
                for c in SPEED
                if c.group == "local-head-dim" or c.name == "local-length-1x8x8192x64-w128"
            },
        ),
    )
    memory = MemorySweep(
        "causal, (1, 1, N, 64), w = 128",
        _memory_case,
        rows=("cpu", "package", "eager"),
        lengths=(1024, 4096, 16384, 65536),
        quick_lengths=(),
        needs=_memory_needs,
    )

    def rows(self, case: LocalCase, device: str, full: bool) -> list[str]:
        peers = list(self.peers)
        if case.Nq > (DENSE_TOKENS if full else DENSE_TOKENS_IN_QUICK):
            peers = [row for row in peers if row not in DENSE_ROWS]
        if not full:
            left_out = ("compiled",) if case.name in FLEX_IN_QUICK else ("compiled", "flex")
            peers = [row for row in peers if row not in left_out]
        return [*BACKEND_ROWS[device], *peers]

    def shape(self, case: LocalCase) -> list[int]:
        return [case.B, case.Hq, case.Hkv, case.Nq, case.Nk, case.D, case.Dv, case.width]

    def inputs(self, case: LocalCase, dtype: torch.dtype, device: str) -> LocalInputs:
        return testing.make_inputs(case, dtype, device)

    def problem(self, case: LocalCase, dtype: torch.dtype, device: str) -> OpProblem:
        inputs = self.inputs(case, dtype, device)
        w = case.width
        reach = case.look_backward * w
        if not case.is_causal:
            reach += (case.forward_buckets + 1) * w
        tokens = reach + QUERIES_OF_A_CHUNK
        tokens += (case.Nq - tokens) % w  # so that the last chunk starts at a bucket
        if case.B == 1 and 3 * tokens < case.Nq:
            return _chunk_problem(inputs, tokens)
        return OpProblem(inputs, testing.make_standard(inputs), {"out": 2})

    def candidates(self, row: str, inputs: LocalInputs, direction: str) -> Iterator[Candidate]:
        if row in dispatch.BACKENDS:
            yield backend_candidate(row, inputs)
        elif row == "eager":
            yield Candidate(_eager, inputs)
        elif row == "compiled":
            yield Candidate(torch.compile(_eager, dynamic=False, fullgraph=True), inputs)
        elif row == "sdpa":
            yield _sdpa(inputs)
        elif row == "flex":
            yield _flex(inputs, direction)
        elif row == "package":
            yield _package(inputs)
        else:
            raise ValueError(f"unknown row {row!r}")


def _eager(inputs: LocalInputs) -> torch.Tensor:
    return reference.local_attention(inputs.local_call())[0]


def _plain(case: LocalCase) -> None:
    """Raises Unsupported if the case has more than a window."""
    if case.bias or case.padding or case.dropout_p or case.zero_lookback or case.lse_grad:
        raise Unsupported("written for windows alone")


def _sdpa(inputs: LocalInputs) -> Candidate:
    """A dense mask, made outside of the timing."""
    case = inputs.case
    _plain(case)
    mask = case.visible_range.mask(case.Nq, case.Nk, inputs.q.device)

    def attend(i: LocalInputs) -> torch.Tensor:
        return F.scaled_dot_product_attention(i.q, i.k, i.v, attn_mask=mask, scale=case.scale)

    return Candidate(attend, inputs)


def _flex(inputs: LocalInputs, direction: str) -> Candidate:
    """Compiled flex_attention; its block mask is made outside of the timing."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case, device = inputs.case, inputs.q.device
    _plain(case)
    if direction == "backward" and device.type == "cpu":
        raise Unsupported("flex_attention has no backward on the CPU")
    w, before = case.width, case.look_backward * case.width
    after = case.forward_buckets * case.width
    exact, causal = case.exact_window, case.is_causal

    def mask_mod(b, h, i, j):
        bucket = i // w * w
        first, last = (i, i) if exact else (bucket, bucket + w - 1)
        return (j >= first - before) & (j <= (i if causal else last + after))

    block_mask = create_block_mask(mask_mod, None, None, case.Nq, case.Nk, device=device)
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def attend(i: LocalInputs) -> torch.Tensor:
        return compiled(i.q, i.k, i.v, block_mask=block_mask, scale=case.scale)

    return Candidate(attend, inputs)


def _package(inputs: LocalInputs) -> Candidate:
    try:
        from local_attention import LocalAttention
    except ImportError as error:
        raise Unsupported(f"install requirements-peers.txt: {error}") from error
    case = inputs.case
    if case.padding or case.dropout_p or case.zero_lookback or case.lse_grad:
        raise Unsupported("not written for padding, dropout, zero look-back, gradients of lse")
    if case.Hq != case.Hkv:
        raise Unsupported("local-attention has no grouped heads")
    module = LocalAttention(
        case.width, causal=case.is_causal, look_backward=case.look_backward,
        look_forward=case.forward_buckets, exact_windowsize=case.exact_window, scale=case.scale,
        autopad=True, use_rotary_pos_emb=False,
    )  # fmt: skip

    def attend(i: LocalInputs) -> torch.Tensor:
        return module(i.q, i.k, i.v, attn_bias=None if i.bias is None else i.bias[0])

    return Candidate(attend, inputs)


SUITE = LocalAttentionSuite()
