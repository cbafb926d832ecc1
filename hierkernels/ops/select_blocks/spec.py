"""The table of block selection's named cases, read by tests, benchmarks and the support table.

A case fixes shapes and options, not values: hierkernels/ops/select_blocks/testing.py draws them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hierkernels.ops.attention.spec import ALL_DTYPES, SPEED_DTYPES


@dataclass(frozen=True)
class SelectCase:
    """One problem, N queries over the windows that have ended by the last one.

    window: l in tokens; with padded=True the first windows are padded on the left, and a window
        must end before the query (as in the package native-sparse-attention-pytorch).
    ties: values are small integers and lse is chosen such that all scores are exact in any order of
        summation, many of them equal: every backend must give the very indices of the reference.
    layout: memory order of q and k_cmp: "bhnd" contiguous; "bnhd" tokens before heads; "channels"
        last stride not 1.
    gain: factor of q, thus of the logits.
    """

    name: str
    B: int
    Hq: int
    Hkv: int
    N: int
    D: int
    window: int  # l
    stride: int  # d
    block: int  # S
    n: int
    scoring: str = "probability"
    padded: bool = False
    is_causal: bool = True
    num_initial: int = 0
    num_local: int = 0
    exclude_own_block: bool | None = None
    query_offset: int = 0
    shared: bool = True
    scale: float | None = None
    ties: bool = False
    gain: float = 1.0
    layout: str = "bhnd"
    dtypes: tuple[torch.dtype, ...] = ALL_DTYPES
    group: str = ""  # of the benchmarks
    quick: bool = True  # in the benchmarks' quick set

    @property
    def first_end(self) -> int:
        return (self.stride if self.padded else self.window) - 1

    @property
    def W(self) -> int:
        """Windows that have ended by the last query's position."""
        return max(0, (self.N + self.query_offset - 1 - self.first_end) // self.stride + 1)

    @property
    def num_blocks(self) -> int:
        return -(-(self.N + self.query_offset) // self.block)

    @property
    def pairs(self) -> float:
        """Visible (query, window) pairs of one head; by logits (query, block)."""
        if not self.is_causal:
            return float(self.N * (self.W if self.scoring == "probability" else self.num_blocks))
        step = self.stride if self.scoring == "probability" else self.block
        ends = range(self.query_offset, self.query_offset + self.N)
        return float(sum(max(0, (p - self.first_end) // step + 1) for p in ends))

    def flops(self, direction: str = "forward") -> float:
        """Floating-point operations of the products: 2 D a pair and scoring head."""
        heads = self.Hq if self.scoring == "probability" or not self.shared else self.Hkv
        return 2.0 * self.B * heads * self.pairs * self.D

    def bytes(self, dtype: torch.dtype, direction: str = "forward") -> int:
        """Bytes of all inputs and outputs, each once: q, k_cmp, lse, indices."""
        lse_size = 8 if dtype == torch.float64 else 4
        queries = self.B * self.Hq * self.N
        lse = queries * lse_size if self.scoring == "probability" else 0
        elements = queries * self.D + self.B * self.Hkv * self.W * self.D
        chosen = self.B * (self.Hkv if self.shared else self.Hq) * self.N * self.n
        return elements * dtype.itemsize + lse + 4 * chosen

    def __str__(self) -> str:
        return self.name


def _case(name: str, N: int = 130, B: int = 2, H: int = 2, D: int = 16, **options) -> SelectCase:
    """Windows of 16 every 8, blocks of 16, 4 of them, unless options say otherwise."""
    Hkv = options.pop("Hkv", H)
    options = {"window": 16, "stride": 8, "block": 16, "n": 4} | options
    return SelectCase(name, B, H, Hkv, N, D, **options)


def _logit(name: str, N: int = 130, **options) -> SelectCase:
    """The scoring of the package native-sparse-attention-pytorch."""
    return _case(f"logit-{name}", N, scoring="logit", padded=True, **options)


# -------------------------------------------------------------------------------------------------
# Correctness. Each axis on its own, with the combinations that share code paths.


def _shapes() -> Iterator[SelectCase]:
    # No window at all, one, around a block of 64; more blocks than are wanted, and fewer.
    for n in (0, 1, 15, 16, 17, 63, 65, 507):
        yield _case(f"n{n}", n)
        yield _logit(f"n{n}", n)
    for d in (1, 3, 8, 40, 64, 100, 128, 256):
        yield _case(f"d{d}", 97, B=1, D=d)
        yield _logit(f"d{d}", 97, B=1, D=d)
    for group in (1, 2, 3, 4, 6, 16, 20):
        yield _case(f"g{group}", 150, B=1, H=group, Hkv=1)
        yield _logit(f"g{group}", 150, B=1, H=group, Hkv=1)
    yield _case("g3-hkv2", 150, H=6, Hkv=2)
    yield _logit("g3-hkv2", 150, H=6, Hkv=2)
    yield _case("not-shared", 150, H=6, Hkv=2, shared=False)
    yield _logit("not-shared", 150, H=6, Hkv=2, shared=False)
    yield _case("batch0", B=0)
    yield _logit("batch0", B=0)
    for layout in ("bnhd", "channels"):
        yield _case(f"layout-{layout}", H=4, Hkv=2, layout=layout)
        yield _logit(f"layout-{layout}", H=4, Hkv=2, layout=layout)


def _blocks() -> Iterator[SelectCase]:
    # l / d and S / d: one window a block and chunk, the paper's, overlaps beyond a block.
    for window, stride, block in (
        (4, 4, 4), (8, 4, 16), (32, 16, 64), (16, 8, 8), (12, 4, 4), (40, 4, 8), (2, 1, 8),
    ):  # fmt: skip
        sizes = {"window": window, "stride": stride, "block": block}
        yield _case(f"l{window}-d{stride}-s{block}", 300, B=1, **sizes)
        yield _case(f"padded-l{window}-d{stride}-s{block}", 300, B=1, padded=True, **sizes)
        yield _logit(f"l{window}-d{stride}-s{block}", 300, B=1, **sizes)
    for n in (0, 1, 2, 5, 16, 17, 64, 80):
        yield _case(f"select{n}", 300, B=1, n=n, block=8)
        yield _logit(f"select{n}", 300, B=1, n=n, block=8)
    yield _case("many-blocks", 1500, B=1, H=1, window=4, stride=2, block=2, n=9, D=8)
    yield _logit("many-blocks", 1500, B=1, H=1, window=4, stride=2, block=2, n=9, D=8)
    yield _case("forced-paper", 400, B=1, num_initial=1, num_local=2, n=6)
    yield _case("forced-all", 200, B=1, num_initial=2, num_local=3, n=5)
    yield _case("forced-local", 200, B=1, num_local=1, n=3)
    yield _case("no-own-block", 200, B=1, exclude_own_block=True)
    yield _case("no-own-block-local", 200, B=1, exclude_own_block=True, num_local=2)
    yield _logit("own-block-inclusive", 200, B=1, exclude_own_block=False)
    yield _case("offset", 7, query_offset=301)
    yield _case("offset-forced", 1, query_offset=260, num_initial=1, num_local=2)
    yield _logit("offset", 7, query_offset=301)
    yield _logit("offset-one-query", 1, query_offset=300, H=4, Hkv=1)
    yield _case("not-causal", 100, is_causal=False)
    yield _case("not-causal-no-own", 100, is_causal=False, exclude_own_block=True, num_local=2)
    yield _logit("not-causal", 100, is_causal=False)
    yield _logit("not-causal-own", 100, is_causal=False, exclude_own_block=False)


def _values() -> Iterator[SelectCase]:
    yield _case("ties", 300, H=4, Hkv=2, ties=True)
    for n in (6, 9):  # lists of five to eight, and longer ones, are kept in other ways than four
        yield _case(f"ties-select{n}", 300, H=4, Hkv=2, n=n, ties=True)
        yield _logit(f"ties-select{n}", 300, H=4, Hkv=2, n=n, ties=True)
    yield _case("ties-forced", 300, n=6, num_initial=1, num_local=2, ties=True)
    yield _case("ties-paper", 500, B=1, window=32, stride=16, block=64, n=3, H=4, Hkv=1, ties=True)
    yield _logit("ties", 300, H=4, Hkv=2, ties=True)
    yield _logit("ties-not-shared", 300, H=4, Hkv=2, shared=False, ties=True)
    yield _case("logits-x100", 300, gain=100.0)
    yield _logit("logits-x100", 300, gain=100.0)
    yield _logit("logits-x1000", 300, gain=1000.0)  # many blocks lose against no block
    yield _case("scale", scale=0.7)
    yield _case("scale-negative", scale=-0.2)
    yield _logit("scale-negative", scale=-0.7)
    yield _case("scale-zero", scale=0.0)


CORRECTNESS: tuple[SelectCase, ...] = (*_shapes(), *_blocks(), *_values())


# -------------------------------------------------------------------------------------------------
# Speed. Groups of the benchmarks; `quick` marks what runs by default.


def _speed_cases() -> Iterator[SelectCase]:
    def speed(scoring: str, N: int, H: int, Hkv: int, D: int, **options) -> SelectCase:
        options = {"dtypes": SPEED_DTYPES, "group": f"select-{scoring}"} | options
        name = f"select-{scoring}-1x{H}x{N}x{D}-kv{Hkv}-s{options['block']}-n{options['n']}"
        return _case(name, N, 1, H, D, Hkv=Hkv, scoring=scoring, **options)

    seed = {"window": 16, "stride": 8, "block": 16, "n": 4}
    paper = {"window": 32, "stride": 16, "block": 64, "n": 16, "num_initial": 1, "num_local": 2}
    yield speed("probability", 8192, 16, 1, 128, quick=False, **paper)
    yield speed("probability", 4096, 8, 2, 64, **seed)
    yield speed("logit", 4096, 8, 2, 64, padded=True, **seed)
    for n in (2048, 8192, 16384):  # time against length
        yield speed("probability", n, 8, 2, 64, quick=False, **seed)
        yield speed("logit", n, 8, 2, 64, padded=True, quick=False, **seed)


SPEED: tuple[SelectCase, ...] = tuple(_speed_cases())
