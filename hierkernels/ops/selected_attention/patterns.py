"""The choices of blocks that the named cases speak of."""

from __future__ import annotations

import torch

PATTERNS = (
    "sparse", "any", "holes", "future", "same", "none", "all", "twice",
)  # fmt: skip


def draw_indices(
    pattern: str,
    shape: tuple[int, int, int, int],
    block_size: int,
    n_keys: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Block indices (B, heads, Nq, n), int64.

    sparse: what native sparse attention selects: distinct blocks that are not in the future, the
        first, the own and the one before it among them, ascending, -1 last where there are fewer.
    any: any blocks, in the future and named twice too, in any order.
    holes: as sparse, with -1 first, last and at random places.
    future: the first block named is wholly in the future, where there is one.
    same: every query names the first blocks, whatever its position.
    none: -1 alone.
    all: every block, in a random order; n is at least their number.
    twice: as sparse, each block named again behind.
    """
    B, heads, Nq, n = shape
    J = -(-n_keys // block_size)
    if pattern == "none" or J == 0:
        return torch.full(shape, -1)
    if pattern == "any":
        return torch.randint(0, J, shape, generator=generator)
    if pattern == "same":
        first = torch.arange(n)
        return torch.where(first < J, first, -1).expand(shape).clone()
    if pattern == "all":
        ranks = torch.rand((B, heads, Nq, J), generator=generator).argsort(-1)
        return torch.nn.functional.pad(ranks, (0, n - J), value=-1)
    if pattern == "twice":
        half = draw_indices("sparse", (B, heads, Nq, (n + 1) // 2), block_size, n_keys, generator)
        return torch.cat((half, half), -1)[..., :n].contiguous()

    own = ((torch.arange(Nq) + n_keys - Nq).clamp(min=-1) // block_size)[:, None]  # -1: none
    named = torch.empty(shape, dtype=torch.int64)
    for start in range(0, Nq, 256):  # a part of the queries at a time: scores of all blocks
        rows = slice(start, start + 256)
        scores = torch.rand((B, heads, own[rows].shape[0], J), generator=generator)
        block = torch.arange(J)
        forced = (block == 0) | (block == own[rows]) | (block == own[rows] - 1)
        scores = scores.add(2 * forced).masked_fill(block > own[rows], -1.0)
        best, at = scores.topk(min(n, J), -1)
        at = torch.where(best < 0, J, at).sort(-1).values
        named[:, :, rows] = torch.nn.functional.pad(at, (0, n - min(n, J)), value=J)
    named[named == J] = -1
    if pattern == "holes":
        named[torch.rand(shape, generator=generator) < 0.3] = -1
        named[..., :1] = named[..., -1:] = -1
    elif pattern == "future":
        named[..., :1] = torch.where(own + 1 < J, own + 1, named[..., :1])
    elif pattern != "sparse":
        raise ValueError(f"unknown pattern {pattern!r}")
    return named
