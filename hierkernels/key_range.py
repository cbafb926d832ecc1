"""Key ranges: query i sees the keys lo(i) <= j < hi(i), both ends monotone staircases.

    bound(i) = clip(((i + shift) // step) * rise + offset, floor, n_keys)

Every dense pattern is such a pair: full, causal, sliding and bucketed windows, compressed tokens.
Because both bounds are monotone, a tile is judged by its first and last query alone, and the
queries that see a key are a range too. Source: docs/DESIGN.md, section 3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Staircase(NamedTuple):
    """One bound of a key range; `//` rounds down, step >= 1, rise >= 0."""

    shift: int = 0
    step: int = 1
    rise: int = 0
    offset: int = 0
    floor: int = 0

    def canonical(self) -> Staircase:
        """The same bound with 0 <= shift < step and floor >= 0.

        The numerator is then never negative, so that kernels may use truncating division.
        """
        if self.step < 1:
            raise ValueError(f"step must be at least 1, got {self.step}")
        if self.rise < 0:
            raise ValueError(f"rise must not be negative, got {self.rise}")
        if 0 <= self.shift < self.step and self.floor >= 0:
            return self
        turns, shift = divmod(self.shift, self.step)
        return Staircase(
            shift, self.step, self.rise, self.offset + turns * self.rise, max(self.floor, 0)
        )

    def at(self, i: torch.Tensor, n_keys: int) -> torch.Tensor:
        """The bound at the query positions i (int64 tensor)."""
        steps = (i + self.shift).div(self.step, rounding_mode="floor")
        return (steps * self.rise + self.offset).clamp(min=self.floor).clamp(min=0, max=n_keys)

    def at_query(self, i: int, n_keys: int) -> int:
        """The bound at one query position."""
        steps = (i + self.shift) // self.step
        return min(max(steps * self.rise + self.offset, self.floor, 0), n_keys)


_START = Staircase()  # the first key, for every query


class KeyRange(NamedTuple):
    """Query i sees the keys lo(i) <= j < hi(i)."""

    lo: Staircase
    hi: Staircase

    @staticmethod
    def full(n_queries: int, n_keys: int) -> KeyRange:
        """Every query sees every key."""
        return KeyRange(_START, Staircase(0, 1, 0, n_keys))

    @staticmethod
    def causal(n_queries: int, n_keys: int) -> KeyRange:
        """Bottom-right aligned: the last query sees the last key."""
        return KeyRange(_START, Staircase(0, 1, 1, n_keys - n_queries + 1))

    @staticmethod
    def window(n_queries: int, n_keys: int, left: int | None, right: int | None) -> KeyRange:
        """`left` keys before, `right` after the (bottom-right aligned) own one; None = no limit."""
        own = n_keys - n_queries
        lo = _START if left is None else Staircase(0, 1, 1, own - left)
        hi = Staircase(0, 1, 0, n_keys) if right is None else Staircase(0, 1, 1, own + right + 1)
        return KeyRange(lo, hi)

    @staticmethod
    def bucketed(
        n_keys: int,
        width: int,
        look_backward: int = 1,
        look_forward: int = 0,
        is_causal: bool = True,
        exact: bool = False,
    ) -> KeyRange:
        """Buckets of `width` tokens; a query sees its own bucket and those around it.

        With exact=True the reach is counted from the query instead of from its bucket.
        """
        if exact:
            lo = Staircase(rise=1, offset=-look_backward * width)
            hi = Staircase(rise=1, offset=1 if is_causal else look_forward * width + 1)
        else:
            lo = Staircase(0, width, width, -look_backward * width)
            hi = (
                Staircase(rise=1, offset=1)
                if is_causal
                else Staircase(0, width, width, (look_forward + 1) * width)
            )
        return KeyRange(lo, hi)

    @staticmethod
    def compressed(
        first_end: int, stride: int, num_memory: int = 0, strict: bool = False
    ) -> KeyRange:
        """num_memory keys seen by all; then key w, seen by i iff first_end + w * stride <= i.

        With strict=True the end of w must lie before i.
        """
        shift = -first_end - (1 if strict else 0)
        return KeyRange(_START, Staircase(shift, stride, 1, num_memory + 1, num_memory))

    def canonical(self) -> KeyRange:
        """Both bounds in canonical form."""
        return KeyRange(self.lo.canonical(), self.hi.canonical())

    def to_ints(self) -> list[int]:
        """The ten integers, lo first: what crosses the operator boundary."""
        return [*self.lo, *self.hi]

    @staticmethod
    def from_ints(ints: list[int]) -> KeyRange:
        """The inverse of to_ints."""
        return KeyRange(Staircase(*ints[:5]), Staircase(*ints[5:]))

    def mask(self, n_queries: int, n_keys: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Bool (Nq, Nk), True where the query sees the key. For references and tests."""
        i = torch.arange(n_queries, device=device)[:, None]
        j = torch.arange(n_keys, device=device)[None, :]
        return (j >= self.lo.at(i, n_keys)) & (j < self.hi.at(i, n_keys))

    def count_visible(self, n_queries: int, n_keys: int) -> int:
        """How many (query, key) pairs are visible: what FLOP counts are made of."""
        i = torch.arange(n_queries)
        return int((self.hi.at(i, n_keys) - self.lo.at(i, n_keys)).clamp(min=0).sum())
