"""Inputs from a named case, and the rule that chosen blocks are judged by.

Scores of different backends differ in their last bits, so blocks whose scores are as close as that
may change places. The rule: no block that was left out beats a chosen one by more than the rounding
of their scores: 2 x the error of the eager formula against float64, plus the rounding of each
score's terms. Where a case's scores are exact (ties), indices must equal the reference's.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch

from hierkernels.ops.compressed_attention import api as compressed
from hierkernels.ops.select_blocks import api, reference
from hierkernels.ops.select_blocks.call import LEAST_PROBABILITY, NO_BLOCK_LOGIT, SelectCall
from hierkernels.ops.select_blocks.spec import SelectCase


@dataclass(frozen=True)
class Inputs:
    """The tensors of one case; the values depend on the case's name and the seed alone."""

    case: SelectCase
    q: torch.Tensor  # (B, Hq, N, D)
    k: torch.Tensor  # (B, Hkv, W, D)
    lse: torch.Tensor | None  # (B, Hq, N); None when scoring by logits

    @property
    def dtype(self) -> torch.dtype:
        return self.q.dtype

    def options(self) -> dict[str, Any]:
        """The options of hk.select_blocks."""
        c = self.case
        probability = c.scoring == "probability"
        return {
            "num_selected": c.n, "block_size": c.block, "stride": c.stride, "scoring": c.scoring,
            "first_end": c.first_end, "window_size": c.window if probability else None,
            "lse": self.lse, "strict": c.padded, "is_causal": c.is_causal,
            "num_initial": c.num_initial, "num_local": c.num_local, "shared": c.shared,
            "exclude_own_block": c.exclude_own_block, "query_offset": c.query_offset,
            "num_keys": c.N + c.query_offset, "scale": c.scale,
        }  # fmt: skip

    def call(self) -> SelectCall:
        """The case as every backend receives it."""
        return api.make_call(self.q, self.k, **self.options())

    def run(self, backend: str | None) -> torch.Tensor:
        """indices of a backend, through the public operator."""
        return api.run(self.call(), backend)

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another dtype."""
        lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        lse = None if self.lse is None else self.lse.to(lse_dtype)
        return replace(self, q=self.q.to(dtype), k=self.k.to(dtype), lse=lse)


def make_inputs(
    case: SelectCase, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> Inputs:
    """Normally distributed tensors for a case, drawn on the CPU, so equal on every device."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()) + seed)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = (case.B, case.Hq, case.N, case.D), (case.B, case.Hkv, case.W, case.D)
    if case.ties:
        q, k, lse = _tied(case, generator, precise)
    else:
        q, k = (torch.randn(shape, generator=generator, dtype=precise) for shape in shapes)
        q, lse = q * case.gain, None
    q, k = (_lay_out(t.to(dtype).to(device), case.layout) for t in (q, k))
    if case.scoring == "probability":
        if lse is None:
            lse = log_sum_exp(case, q, k).to(precise)
        return Inputs(case, q, k, lse.to(device))
    return Inputs(case, q, k, None)


def _tied(
    case: SelectCase, generator: torch.Generator, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and lse with exact scores. The first channel counts alone, with scale D ** -0.5.

    Scaled scores are integers; probabilities are exp of 0 or of -1000, thus 1 or 0.
    """
    q, k = (
        torch.zeros(case.B, case.Hq, case.N, case.D),
        torch.zeros(case.B, case.Hkv, case.W, case.D),
    )
    root = math.isqrt(case.D)
    assert root * root == case.D and root & (root - 1) == 0, "1 / sqrt(D) is no power of 2"
    q[..., 0] = root
    values = torch.randint(0, 2, k.shape[:3], generator=generator).to(k.dtype)
    probability = case.scoring == "probability"
    k[..., 0] = (values - 1) * 1000 if probability else values * 4
    return q.to(dtype), k.to(dtype), torch.zeros(case.B, case.Hq, case.N, dtype=dtype)


def _lay_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "bhnd":
        return t
    if layout == "bnhd":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "channels":
        return t.mT.contiguous().mT
    raise ValueError(f"unknown layout {layout!r}")


def log_sum_exp(case: SelectCase, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """lse of compressed attention in float64."""
    q, k = q.double(), k.double()
    call = compressed.make_call(
        q, k, k, stride=case.stride, first_end=case.first_end, strict=case.padded,
        is_causal=case.is_causal, query_offset=case.query_offset, scale=case.scale,
    )  # fmt: skip
    return compressed.run(call, "reference")[1]


def _scores(call: SelectCall) -> torch.Tensor:
    return reference.logits(call) if call.lse is None else reference.probability_sums(call)


def _term_sizes(call: SelectCall) -> torch.Tensor:
    """The sum of the absolute terms of each score; for probabilities, of their exponents too."""
    sizes = replace(call, q=call.q.abs(), k_cmp=call.k_cmp.abs(), scale=abs(call.scale))
    if call.lse is None:
        return reference.logits(sizes)
    k = call.k_cmp.repeat_interleave(call.group, 1)
    exponent = torch.einsum("bhid,bhjd->bhij", sizes.q, k.abs()) * sizes.scale
    exponent = exponent + call.lse.abs()[..., None]
    logit = torch.einsum("bhid,bhjd->bhij", call.q, k) * call.scale - call.lse[..., None]
    return reference.probability_sums(call, torch.exp(logit) * (1 + exponent))


@torch.no_grad()
def score_bounds(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores in float64, how far those of a backend may be from them), both (B, heads, N, J)."""
    precise = inputs.to(torch.float64).call()
    scores = _scores(precise)
    if scores.numel() == 0:
        return scores, scores
    # In float64 the eager error is taken to be that of float32, scaled by the ratio of the two eps.
    low, ratio = inputs, 1.0
    if inputs.dtype == torch.float64:
        low, ratio = inputs.to(torch.float32), 2.0**-29
    against = _scores(low.to(torch.float64).call())
    eager = (_scores(low.call()).double() - against).abs().amax(-1, keepdim=True) * ratio
    accumulator = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    return scores, 2 * eager + torch.finfo(accumulator).eps * _term_sizes(precise)


@torch.no_grad()
def check_selection(inputs: Inputs, indices: torch.Tensor) -> None:
    """AssertionError if the indices are not those of the n best blocks, up to rounding."""
    call = inputs.call()
    shape = (call.q.shape[0], call.heads, call.q.shape[2], call.num_selected)
    assert indices.dtype == torch.int32, indices.dtype
    assert tuple(indices.shape) == shape, tuple(indices.shape)
    if inputs.case.ties:
        expected = reference.forward(call)
        assert torch.equal(indices, expected), f"{(indices != expected).sum()} indices differ"
    J, indices = call.num_blocks, indices.long()
    assert bool(((indices >= -1) & (indices < J)).all()), "an index is out of range"
    before, after = indices[..., :-1], indices[..., 1:]
    ordered = ((before >= 0) & (before < after)) | (after == -1)
    assert bool(ordered.all()), "indices are not ascending with -1s last"

    # Slot J takes the -1s.
    chosen = torch.zeros(*shape[:3], J + 1, dtype=torch.bool, device=indices.device)
    chosen.scatter_(3, indices.masked_fill(indices < 0, J), True)
    chosen = chosen[..., :J]
    candidates = reference.candidate_blocks(call)
    assert not bool((chosen & ~candidates).any()), "a chosen block is no candidate"
    scores, slack = score_bounds(inputs)
    sure = possible = candidates.expand_as(chosen)
    if call.lse is None:
        sure, possible = _above_threshold(scores, slack, candidates)
        assert not bool((chosen & ~possible).any()), "a chosen block is below the threshold"
    else:
        forced = reference.forced_blocks(call).expand_as(chosen)
        assert not bool((forced & ~chosen).any()), "a forced block is missing"
        scores = scores.masked_fill(forced, math.inf)
    n, found = call.num_selected, chosen.sum(-1)
    assert bool((found <= possible.sum(-1)).all() and (found >= sure.sum(-1).clamp(max=n)).all()), (
        "the number of blocks is wrong"
    )
    if J == 0 or n == 0:
        return
    worst = (scores + slack).masked_fill(~chosen, math.inf).amin(-1)
    best_left = (scores - slack).masked_fill(chosen | ~sure, -math.inf).amax(-1)
    gap = (best_left - worst).amax().item() if worst.numel() else -1.0
    assert gap <= 0, f"a better block was left out, by {gap:.3g} beyond rounding"


def _above_threshold(
    scores: torch.Tensor, slack: torch.Tensor, candidates: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(surely, possibly) above the least probability, for logits with their rounding."""
    found = []
    for sign in (-1, 1):
        own, others = scores + sign * slack, scores - sign * slack
        others = others.masked_fill(~candidates, -math.inf)
        column = others.new_full((*others.shape[:3], 1), NO_BLOCK_LOGIT)
        total = torch.logsumexp(torch.cat((column, others), 3), 3, keepdim=True)
        threshold = math.log(LEAST_PROBABILITY) - sign * 1e-5
        found.append((own - total > threshold) & candidates)
    return found[0], found[1]
