"""The bias of attention scores by the position of a key relative to its query, as in T5."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class RelativePositionBias(nn.Module):
    """T5's bias of attention scores: a number for each head and bucket of distances.

    Raffel et al., "Exploring the Limits of Transfer Learning", 2020, section 2.1. Near distances
    have buckets of their own, far ones share buckets that grow with the logarithm.

    Args:
        heads: H.
        is_causal: all buckets are of keys before the query; else half of them are of those after.
        num_buckets: of both sides together.
        max_distance: from here on all keys share a bucket.
    """

    def __init__(
        self, *, heads: int, is_causal: bool, num_buckets: int = 32, max_distance: int = 128
    ) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.relative_attention_bias = nn.Embedding(num_buckets, heads)

    def buckets(self, positions: Tensor) -> Tensor:
        """The bucket of each position of a key relative to its query, key - query."""
        count, first = self.num_buckets, torch.zeros_like(positions)
        distance = -positions
        if self.is_causal:
            distance = distance.clamp(min=0)
        else:
            count //= 2
            first = count * (distance < 0)
            distance = distance.abs()
        exact = count // 2
        # In this order: at powers of two another one rounds into another bucket.
        octaves = torch.log(distance.clamp(min=1).float() / exact)
        far = octaves / math.log(self.max_distance / exact) * (count - exact)
        far = (exact + far.long()).clamp(max=count - 1)
        return first + torch.where(distance < exact, distance, far)

    def by_position(self, first: int, last: int) -> Tensor:
        """The bias ``(H, last - first + 1)`` of keys at these positions relative to the query."""
        table = self.relative_attention_bias.weight
        buckets = self.buckets(torch.arange(first, last + 1, device=table.device))
        return rearrange(F.embedding(buckets, table), "p h -> h p")

    def forward(self, length: int) -> Tensor:
        """The bias ``(1, H, length, length)`` of all queries and keys of a sequence."""
        if length == 0:
            table = self.relative_attention_bias.weight
            return table.new_zeros(1, table.shape[1], 0, 0)
        return toeplitz(self.by_position(1 - length, length - 1), length)[None]


def toeplitz(by_position: Tensor, queries: int) -> Tensor:
    """The rows of queries that stand one after another, each one shifted by a position.

    ``by_position (H, queries + keys - 1)`` to ``(H, queries, keys)``; the last query's row is the
    first ``keys`` entries, the row of the query before begins one entry later.
    """
    return _Toeplitz.apply(by_position, queries)


def diagonal_sums(rows: Tensor) -> Tensor:
    """The sum over what each entry of by_position went to in :func:`toeplitz`: its adjoint.

    ``(H, queries, keys)`` to ``(H, queries + keys - 1)``.
    """
    return _DiagonalSums.apply(rows)


_BLOCK = 64  # queries that diagonal_sums takes at once: they stay in the cache


# Each is the other's gradient. PyTorch's own gradient of unfold and flip takes five to eight times
# as long at 1024 queries and keys: it goes through memory of the size of rows once more.
class _Toeplitz(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, by_position: Tensor, queries: int) -> Tensor:
        return by_position.unfold(-1, by_position.shape[-1] - queries + 1, 1).flip(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return diagonal_sums(grad), None


class _DiagonalSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        heads, queries, keys = rows.shape
        ctx.queries = queries
        sums = rows.new_zeros(heads, queries + keys - 1)
        block = min(_BLOCK, queries)
        # Lines of `width`; a query's row begins one place further left than that of the query
        # before, so that what belongs together stands in a column. The rest stays zero.
        width = keys + block
        lines = rows.new_zeros(heads, block * width)
        for first in range(0, queries, block):
            count = min(block, queries - first)
            shifted = lines.as_strided(
                (heads, count, keys), (block * width, width - 1, 1), block - 1
            )
            shifted.copy_(rows[:, first : first + count])
            columns = lines.view(heads, block, width)[:, :count, : width - 1].sum(1)
            # The first column is that of the block's last query, were it full.
            start = queries - first - block
            sums[:, max(start, 0) : start + width - 1] += columns[:, max(-start, 0) :]
        return sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return toeplitz(grad, ctx.queries)
