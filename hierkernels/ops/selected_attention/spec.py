"""The table of selected_attention's named cases, read by tests and benchmarks.

A case fixes shapes and options, not values: testing.py draws the inputs.
Sizes: B batch, Hq query heads, Hkv key/value heads, Nq queries, Nk keys, D and Dv channels, S keys
of a block, n blocks named for a query.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hierkernels.ops.attention.spec import dtype_name as dtype_name

ALL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SPEED_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One problem.

    pattern: the choice of blocks, see patterns.py.
    per_head: each query head has a choice of its own; else those of a key/value head share one.
    layout: memory order of q, k, v, as in the cases of hk.attention.
    gain: factor of q, thus of the logits.
    """

    name: str
    B: int
    Hq: int
    Hkv: int
    Nq: int
    Nk: int
    D: int
    Dv: int
    S: int
    n: int
    pattern: str = "sparse"
    per_head: bool = False
    weights: bool = False
    own: bool = False
    is_causal: bool = True
    scale: float | None = None
    lse_grad: bool = False  # the loss depends on lse too
    layout: str = "bhnd"
    gain: float = 1.0
    dtypes: tuple[torch.dtype, ...] = ALL_DTYPES
    group: str = ""  # of the benchmarks
    quick: bool = True  # in the benchmarks' quick set

    @property
    def indices_shape(self) -> tuple[int, int, int, int]:
        return self.B, self.Hq if self.per_head else self.Hkv, self.Nq, self.n

    @property
    def visible(self) -> int:
        """(query, key) pairs of one head, for the pattern "sparse" (causal), Nq <= Nk."""
        total = 0
        for p in range(self.Nk - self.Nq, self.Nk):
            before = min(self.n, p // self.S + 1) - 1
            total += before * self.S + p % self.S + 1
        return total

    def flops(self, direction: str = "forward") -> float:
        """Floating-point operations of the products: 2 visible (D + Dv) a head, backward x 2.5.

        A backward in two passes, query-major and key-major, computes scores and dP in both:
        3.5 times the forward's. The 2.5 that are counted are the least.
        """
        forward = 2.0 * self.B * self.Hq * self.visible * (self.D + self.Dv)
        return forward if direction == "forward" else 2.5 * forward

    def bytes(self, dtype: torch.dtype, direction: str = "forward") -> int:
        """Bytes of all inputs and outputs, each once: what caches that hold k and v would leave.

        Forward: q, k, v, indices, weights, out, lse. Backward: these, dout, dq, dk, dv, dweights.
        """
        lse_size = 8 if dtype == torch.float64 else 4
        queries, keys = self.B * self.Hq * self.Nq, self.B * self.Hkv * self.Nk
        qkv = queries * self.D + keys * (self.D + self.Dv)
        B, heads, Nq, n = self.indices_shape
        named = B * heads * Nq * n
        weights = named if self.weights else 0
        elements = qkv + weights + queries * self.Dv
        if direction == "backward":
            elements += queries * self.Dv + qkv + weights
        return elements * dtype.itemsize + queries * lse_size + named * 8

    def __str__(self) -> str:
        return self.name


def _case(
    name: str, B: int = 2, H: int = 4, N: int = 65, D: int = 32, S: int = 16, n: int = 4, **options
) -> Case:
    """A case with two query heads for a key/value head, equal lengths and channels by default."""
    Hkv, Nk, Dv = options.pop("Hkv", H // 2), options.pop("Nk", N), options.pop("Dv", D)
    return Case(name, B, H, Hkv, N, Nk, D, Dv, S, n, **options)


# -------------------------------------------------------------------------------------------------
# Correctness. Each axis is varied on its own, with the combinations that share code paths.


def _lengths() -> Iterator[Case]:
    # 0 and 1 are the edges; around a block; the last block cut.
    for n in (0, 1, 2, 15, 16, 17, 63, 65, 130):
        yield _case(f"n{n}", N=n)
    yield _case("n507", B=1, H=2, N=507, dtypes=SPEED_DTYPES)
    yield _case("n507-b64", B=1, H=2, N=507, S=64, D=64, dtypes=SPEED_DTYPES)
    # Aligned at the last token: decoding, a few queries, queries before all keys.
    for nq, nk in ((1, 130), (7, 200), (40, 65), (65, 40), (33, 5)):
        yield _case(f"q{nq}-k{nk}", N=nq, Nk=nk)
    yield _case("q9-k0", N=9, Nk=0)
    yield _case("q0-k9", N=0, Nk=9)
    yield _case("batch0", B=0, N=17)


def _groups() -> Iterator[Case]:
    # The rows of a tile: odd groups, one head, more than a tile of rows.
    for g in (1, 2, 3, 4, 6, 16, 20, 128):
        hkv, n = (2, 70) if g < 16 else (1, 40)
        yield _case(f"g{g}", B=1, H=hkv * g, Hkv=hkv, N=n)
    # More heads than a tile has rows, and blocks longer than a tile.
    yield _case("g130", B=1, H=130, Hkv=1, N=20, Nk=25, D=8, S=4, n=3)
    yield _case("b200-own", B=1, N=420, D=16, S=200, n=2, own=True, dtypes=SPEED_DTYPES)
    for g in (1, 3, 4, 16):
        yield _case(f"g{g}-per-head", B=1, H=2 * g, Hkv=2, N=70, per_head=True)
    yield _case("g3-per-head-own", B=1, H=6, Hkv=2, N=70, per_head=True, own=True, pattern="any")


def _blocks() -> Iterator[Case]:
    # Any size: one key, below and beyond the vectors, odd, more than the keys.
    for s in (1, 3, 4, 8, 20, 32, 64, 100, 128, 300):
        yield _case(f"b{s}", B=1, N=200, S=s)
    yield _case("b64-g16", B=1, H=16, Hkv=1, N=200, S=64, n=3)
    yield _case("b5-g16-any", B=1, H=16, Hkv=1, N=90, S=5, pattern="any")
    # The number of blocks named: none, one, many, as many as there are and more.
    yield _case("named-0", N=30, n=0)
    yield _case("named-0-own", N=30, n=0, own=True)
    yield _case("named-1", n=1, N=70)
    yield _case("named-16", B=1, n=16, N=300)
    yield _case("named-40-any", B=1, n=40, S=4, N=100, pattern="any")


def _patterns() -> Iterator[Case]:
    for pattern in ("any", "holes", "future", "same", "none", "all", "twice"):
        n = 9 if pattern == "all" else 4
        yield _case(f"{pattern}", N=130, n=n, pattern=pattern)
        yield _case(f"{pattern}-own-g4", B=1, Hkv=1, N=130, n=n, pattern=pattern, own=True)
    yield _case("any-full", N=70, pattern="any", is_causal=False)
    yield _case("any-full-q20-k90", N=20, Nk=90, pattern="any", is_causal=False)
    yield _case("own-full", N=75, is_causal=False, own=True)
    yield _case(
        "same-long", B=1, H=2, Hkv=1, N=500, n=2, pattern="same", dtypes=SPEED_DTYPES
    )  # fmt: skip
    yield _case("all-none-left", N=65, n=9, S=8, pattern="all", is_causal=False)


def _weights() -> Iterator[Case]:
    yield _case("weights", N=70, weights=True)
    yield _case("weights-own", N=70, weights=True, own=True)
    yield _case("weights-any", N=70, weights=True, pattern="any", n=6)
    yield _case("weights-twice", N=70, weights=True, pattern="twice", own=True)
    yield _case("weights-holes", N=70, weights=True, pattern="holes")
    yield _case("weights-per-head", N=70, weights=True, per_head=True)
    yield _case("weights-g16-b64", B=1, H=16, Hkv=1, N=150, S=64, weights=True)
    yield _case("weights-named-0", N=20, n=0, weights=True, own=True)


def _numbers() -> Iterator[Case]:
    for d in (1, 8, 40, 64, 80, 128, 192):
        yield _case(f"d{d}", B=1, N=70, D=d)
    # So wide that the gradients of all queries do not fit the caches.
    yield _case("d512-g16", B=1, H=16, Hkv=1, N=150, D=512, n=3, dtypes=(torch.bfloat16,))
    for d, dv in ((32, 72), (40, 24), (8, 1)):
        yield _case(f"d{d}-dv{dv}", B=1, N=70, D=d, Dv=dv)
    yield _case("lse-grad", N=130, lse_grad=True)
    yield _case("lse-grad-none-seen", N=40, Nk=17, lse_grad=True, pattern="holes", n=2)
    yield _case("scale", N=70, scale=0.3)
    yield _case("scale-negative", N=70, scale=-0.2)
    yield _case("logits-x100", N=130, gain=100.0)
    yield _case("logits-x100-any", N=130, gain=100.0, pattern="any", own=True)
    for layout in ("bnhd", "packed", "unaligned", "channels", "broadcast"):
        yield _case(f"layout-{layout}", N=70, layout=layout)
    yield _case(
        "everything", H=6, N=90, Nk=140, D=40, Dv=72, S=10, n=5, pattern="any", weights=True,
        own=True, lse_grad=True, layout="bnhd", Hkv=2,
    )  # fmt: skip


CORRECTNESS: tuple[Case, ...] = (
    *_lengths(), *_groups(), *_blocks(), *_patterns(), *_weights(), *_numbers(),
)  # fmt: skip


# -------------------------------------------------------------------------------------------------
# Speed. Groups of the benchmarks; `quick` marks what runs by default.


def _speed_cases() -> Iterator[Case]:
    def speed(
        group: str,
        Hq: int,
        Hkv: int,
        N: int,
        D: int,
        S: int,
        n: int,
        quick: bool = False,
        **options,
    ) -> Case:
        name = f"{group}-1x{Hq}x{N}x{D}-kv{Hkv}-b{S}x{n}"
        return Case(
            name, 1, Hq, Hkv, N, N, D, D, S, n, dtypes=SPEED_DTYPES, group=group, quick=quick,
            **options,
        )  # fmt: skip

    # The sizes of the paper, one group; and those of the package, whose blocks are small.
    for n in (1024, 2048, 4096, 8192, 16384, 32768):
        yield speed("paper", 16, 1, n, 128, 64, 16)
    yield speed("paper", 16, 1, 4096, 64, 64, 16)
    for n in (1024, 2048, 4096, 8192, 16384, 32768):
        yield speed("small", 8, 2, n, 64, 16, 4, quick=n == 1024)
    # Heads for each key/value head.
    for hkv in (16, 8, 4, 1):
        yield speed("heads", 16, hkv, 4096, 64, 64, 8)


SPEED: tuple[Case, ...] = tuple(_speed_cases())
