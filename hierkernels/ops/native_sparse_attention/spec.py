"""The table of native sparse attention's named cases, read by tests and benchmarks.

A case fixes shapes and options, not values: testing.py draws the inputs. FLOPs and bytes are
counted stage by stage, as each stage's own table counts them, so that a run can print each stage's
share of its limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from hierkernels.key_range import KeyRange
from hierkernels.ops.attention.spec import ALL_DTYPES, SPEED_DTYPES
from hierkernels.ops.attention.spec import Case as AttentionCase
from hierkernels.ops.native_sparse_attention.call import PRESETS, Definition
from hierkernels.ops.select_blocks.spec import SelectCase
from hierkernels.ops.selected_attention.spec import Case as SelectedCase


@dataclass(frozen=True)
class Work:
    """What a stage computes and moves, at least."""

    flops: float
    bytes: int


@dataclass(frozen=True)
class NsaCase:
    """One problem: Nq queries, the last of Nk tokens.

    own_branches: queries, keys and values of each branch are tensors of their own.
    gain: factor of the queries, thus of the logits.
    """

    name: str
    preset: str
    B: int
    Hq: int
    Hkv: int
    Nq: int
    Nk: int
    D: int
    Dv: int
    l: int  # noqa: E741  tokens of a compression window
    d: int  # its stride
    S: int  # tokens of a block
    n: int  # blocks of a query
    w: int  # window_size
    M: int = 0  # memory tokens
    shared: bool = True
    use_diff_topk: bool = False
    is_causal: bool = True
    own_branches: bool = True
    gain: float = 1.0
    dtypes: tuple[torch.dtype, ...] = ALL_DTYPES
    group: str = ""  # of the benchmarks
    quick: bool = True  # in the benchmarks' quick set

    @property
    def definition(self) -> Definition:
        return PRESETS[self.preset]

    @property
    def first_end(self) -> int:
        """Padded on the left, the first window ends after one stride."""
        return (self.d if self.preset == "seed" else self.l) - 1

    @property
    def W(self) -> int:
        """Compression windows in Nk tokens."""
        return max(0, (self.Nk - 1 - self.first_end) // self.d + 1)

    @property
    def offset(self) -> int:
        """The position of the first query."""
        return self.Nk - self.Nq

    @property
    def reach(self) -> int:
        return self.w - self.definition.own_in_window

    def compressed(self) -> AttentionCase:
        """The branch of the compressed tokens as a case of attention."""
        keys = self.M + self.W
        visible = KeyRange.compressed(
            self.first_end - self.offset, self.d, self.M, self.definition.strict
        )
        if not self.is_causal:
            visible = KeyRange.full(self.Nq, keys)
        return self._attention("compressed", keys, visible)

    def window(self) -> AttentionCase:
        """The branch of the sliding window as a case of attention."""
        right = 0 if self.is_causal else self.reach
        return self._attention(
            "window", self.Nk, KeyRange.window(self.Nq, self.Nk, self.reach, right)
        )

    def _attention(self, branch: str, keys: int, visible: KeyRange) -> AttentionCase:
        return AttentionCase(
            f"{self.name}-{branch}", self.B, self.Hq, self.Hkv, self.Nq, keys, self.D, self.Dv,
            key_range=visible.canonical(),
        )  # fmt: skip

    def select(self) -> SelectCase:
        """The choice of blocks."""
        definition = self.definition
        return SelectCase(
            f"{self.name}-select", self.B, self.Hq, self.Hkv, self.Nq, self.D, self.l, self.d,
            self.S, self.n, definition.scoring, definition.strict, self.is_causal,
            definition.num_initial, definition.num_local, query_offset=self.offset,
            shared=self.shared,
        )  # fmt: skip

    def selected(self) -> SelectedCase:
        """The branch of the selected blocks."""
        own = self.definition.own_block
        return SelectedCase(
            f"{self.name}-selected", self.B, self.Hq, self.Hkv, self.Nq, self.Nk, self.D, self.Dv,
            self.S, self.n, per_head=not self.shared, own=own, is_causal=self.is_causal,
        )  # fmt: skip

    def stages(self, dtype: torch.dtype, direction: str = "forward") -> dict[str, Work]:
        """Each stage's work, in the order of a forward. The choice has no backward."""
        found = {}
        branches = {"compressed": self.compressed(), "window": self.window()}
        for name, case in branches.items():
            found[name] = Work(case.flops(direction), case.bytes(dtype, direction))
        selected = self.selected()
        # The own block, beside the n, counts as one of n + 1.
        counted = replace(selected, n=selected.n + 1) if selected.own else selected
        found["selected"] = Work(counted.flops(direction), selected.bytes(dtype, direction))
        if direction == "forward":
            select = self.select()
            found["select"] = Work(select.flops(), select.bytes(dtype))
        rows = self.B * self.Hq * self.Nq
        out, gates = rows * self.Dv, 3 * rows
        if direction == "forward":
            found["gated sum"] = Work(6.0 * out, (4 * out + gates) * dtype.itemsize)
        else:
            found["gated sum"] = Work(9.0 * out, (7 * out + 2 * gates) * dtype.itemsize)
        order = ("compressed", "select", "selected", "window", "gated sum")
        return {name: found[name] for name in order if name in found}

    def flops(self, direction: str = "forward") -> float:
        """Of all stages."""
        return sum(work.flops for work in self.stages(torch.float32, direction).values())

    def bytes(self, dtype: torch.dtype, direction: str = "forward") -> int:
        """Of all stages, each reading its inputs and writing its outputs once."""
        return sum(work.bytes for work in self.stages(dtype, direction).values())

    def __str__(self) -> str:
        return self.name


def _case(name: str, preset: str, N: int = 65, H: int = 4, D: int = 16, **options) -> NsaCase:
    """Small windows and blocks with two query heads for a key/value head, unless options differ."""
    Hkv, Nk = options.pop("Hkv", max(H // 2, 1)), options.pop("Nk", N)
    B, Dv = options.pop("B", 2), options.pop("Dv", D)
    sizes = {"l": 8, "d": 4, "S": 8, "n": 4 if preset == "paper" else 3, "w": 12}
    sizes["M"] = 0 if preset == "paper" else 1
    return NsaCase(f"{preset}-{name}", preset, B, H, Hkv, N, Nk, D, Dv, **(sizes | options))


# -------------------------------------------------------------------------------------------------
# Correctness. What the branches' own tables vary is not varied again: here it is how they meet.


def _cases() -> Iterator[NsaCase]:
    for preset in PRESETS:
        # No window, none that has ended, one token, around blocks, a prime.
        for n in (0, 1, 7, 8, 15, 63, 65):
            yield _case(f"n{n}", preset, n)
        yield _case("n507", preset, 507, H=2, B=1, n=6)
        for group in (1, 3, 6, 16, 20):
            yield _case(f"g{group}", preset, 40, H=group, Hkv=1, B=1)
        yield _case("decode", preset, 1, Nk=61)
        yield _case("last-five", preset, 5, Nk=61)
        yield _case("own-selection", preset, 65, shared=False)
        yield _case("shared-tensors", preset, 65, own_branches=False)
        yield _case("channels", preset, 65, D=24, Dv=40)
        yield _case("all-blocks", preset, 65, n=9)
        # In float64 the oracle's rounding of such logits is as large as what it would judge.
        yield _case("logits-x100", preset, 65, gain=100.0, dtypes=ALL_DTYPES[:3])
        yield _case("no-overlap", preset, 65, l=4, d=4, S=4)
        yield _case("paper-ratios", preset, 130, l=32, d=16, S=64, n=3, w=64, H=2, B=1)
    yield _case("no-memory", "seed", 65, M=0)
    yield _case("none-selected", "seed", 65, n=0)
    yield _case("both-ways", "seed", 65, is_causal=False)
    yield _case("l5-d2", "seed", 65, l=5, d=2, w=5)


CORRECTNESS: tuple[NsaCase, ...] = tuple(_cases())


# -------------------------------------------------------------------------------------------------
# Speed. The sizes of the package's layer (512, 64, 8, kv 2, ...), and those of the paper.


def _speed() -> Iterator[NsaCase]:
    for n in (1024, 2048, 4096, 8192, 16384):
        yield NsaCase(
            f"seed-{n}", "seed", 1, 8, 2, n, n, 64, 64, 16, 8, 16, 4, 64, M=1,
            group="nsa-seed", quick=n == 4096, dtypes=SPEED_DTYPES,
        )  # fmt: skip
    for n in (8192, 16384, 32768, 65536):
        yield NsaCase(
            f"paper-{n}", "paper", 1, 64, 4, n, n, 128, 128, 32, 16, 64, 16, 512,
            group="nsa-paper", quick=False, dtypes=SPEED_DTYPES,
        )  # fmt: skip


SPEED: tuple[NsaCase, ...] = tuple(_speed())
