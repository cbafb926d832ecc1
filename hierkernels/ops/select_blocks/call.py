"""One select_blocks call in canonical form: what every backend receives."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hierkernels.arguments import device_type
from hierkernels.key_range import KeyRange, Staircase

# Of scoring="logit": a logit that stands for "no block", and the least probability of a choice.
NO_BLOCK_LOGIT = -1000.0
LEAST_PROBABILITY = 1e-10


@dataclass(slots=True)
class SelectCall:
    """The arguments of one call; shapes, dtypes and numbers are checked."""

    q: torch.Tensor  # (B, Hq, Nq, D), last stride 1
    k_cmp: torch.Tensor  # (B, Hkv, W, D), last stride 1
    lse: torch.Tensor | None  # (B, Hq, Nq) contiguous, lse_dtype: scoring by probabilities if given
    num_selected: int  # n
    block_size: int  # S, a multiple of stride
    stride: int  # d
    first_end: int
    window_size: int  # l, a multiple of stride; 0 when scoring by logits
    strict: bool
    is_causal: bool
    num_initial: int
    num_local: int
    exclude_own_block: bool
    query_offset: int
    num_keys: int
    shared: bool
    scale: float

    def arguments(self) -> tuple:
        """Everything, in the order of the operator."""
        return (
            self.q, self.k_cmp, self.lse, self.num_selected, self.block_size, self.stride,
            self.first_end, self.window_size, self.strict, self.is_causal, self.num_initial,
            self.num_local, self.exclude_own_block, self.query_offset, self.num_keys, self.shared,
            self.scale,
        )  # fmt: skip

    @property
    def device_type(self) -> str:
        return device_type(self.q)

    @property
    def lse_dtype(self) -> torch.dtype:
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def group(self) -> int:
        """Query heads for each key head."""
        return self.q.shape[1] // self.k_cmp.shape[1]

    @property
    def heads(self) -> int:
        """Heads that choose: key heads if their query heads choose together, else query heads."""
        return self.k_cmp.shape[1] if self.shared else self.q.shape[1]

    @property
    def windows_per_block(self) -> int:
        """r = S / d."""
        return self.block_size // self.stride

    @property
    def chunks_per_window(self) -> int:
        """l / d; a chunk is `stride` tokens. Scoring by probabilities only."""
        return self.window_size // self.stride

    @property
    def first_chunk(self) -> int:
        """The chunk that window 0 starts with, negative if padded on the left."""
        return (self.first_end + 1 - self.window_size) // self.stride

    @property
    def num_blocks(self) -> int:
        """Blocks that may be chosen at all: those of the keys; by logits, those whose windows are
        all there."""
        blocks = -(-self.num_keys // self.block_size)
        if self.lse is not None:
            return blocks
        return min(blocks, self.k_cmp.shape[2] // self.windows_per_block)

    @property
    def candidates(self) -> KeyRange:
        """The blocks among which query i chooses, as a key range over num_blocks keys.

        Without the causal cut the range still holds the own block where it is excluded: a range
        has no hole (own_block_is_a_hole).
        """
        if not self.is_causal:
            return KeyRange.full(self.q.shape[2], self.num_blocks)
        S = self.block_size
        if self.lse is not None:  # the position from which on block 0 is a candidate
            first = S if self.exclude_own_block else 0
        else:
            first = self.first_end + (self.windows_per_block - 1) * self.stride + self.strict
            if self.exclude_own_block:
                first = max(first, S)
        return KeyRange(Staircase(), Staircase(self.query_offset - first, S, 1, 1, 0)).canonical()

    @property
    def own_block_is_a_hole(self) -> bool:
        """The own block is no candidate, but lies within the range of candidates."""
        return self.exclude_own_block and not self.is_causal

    @property
    def visible(self) -> KeyRange:
        """The windows that query i sees."""
        if not self.is_causal:
            return KeyRange.full(self.q.shape[2], self.k_cmp.shape[2])
        first_end = self.first_end - self.query_offset
        return KeyRange.compressed(first_end, self.stride, 0, self.strict).canonical()

    def new_indices(self) -> torch.Tensor:
        """Uninitialised (B, heads, Nq, n) int32."""
        shape = (self.q.shape[0], self.heads, self.q.shape[2], self.num_selected)
        return self.q.new_empty(shape, dtype=torch.int32)
