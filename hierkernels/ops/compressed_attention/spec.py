"""The table of compressed attention's named cases, read by tests and benchmarks.

A case is one of attention (hierkernels/ops/attention/spec.py) whose keys are memory tokens and
compressed windows; FLOPs and bytes are counted in the same manner.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hierkernels.key_range import KeyRange
from hierkernels.ops.attention.spec import SPEED_DTYPES, Case


@dataclass(frozen=True)
class CompressedCase(Case):
    """One problem; Nk = num_memory + windows."""

    stride: int = 8
    first_end: int = 15
    num_memory: int = 0
    strict: bool = False
    query_offset: int = 0

    @property
    def visible_range(self) -> KeyRange:
        if not self.is_causal:
            return KeyRange.full(self.Nq, self.Nk)
        first_end = self.first_end - self.query_offset
        return KeyRange.compressed(first_end, self.stride, self.num_memory, self.strict)


def _case(
    name: str, N: int, window: int, stride: int, B: int = 2, H: int = 2, D: int = 16, **options
) -> CompressedCase:
    """Windows every `stride` tokens over positions up to the last query's; causal.

    padded=True: the first windows are padded on the left, and a window must end before the query,
    as in the package native-sparse-attention-pytorch.
    """
    padded = options.pop("padded", False)
    first_end = stride - 1 if padded else window - 1
    Hkv, Dv = options.pop("Hkv", H), options.pop("Dv", D)
    total = N + options.get("query_offset", 0)
    windows = max(0, (total - 1 - first_end) // stride + 1)
    keys = windows + options.get("num_memory", 0)
    options = {
        "is_causal": True,
        "strict": padded,
        "stride": stride,
        "first_end": first_end,
    } | options
    return CompressedCase(name, B, H, Hkv, N, keys, D, Dv, **options)


# -------------------------------------------------------------------------------------------------
# Correctness. Each axis on its own, with the combinations that share code paths.


def _correctness_cases() -> Iterator[CompressedCase]:
    # Shorter than a window (no compressed token at all), one, around a block of 64; memory or not.
    for n in (1, 15, 16, 17, 63, 65, 507):
        yield _case(f"n{n}", n, 16, 8)
        yield _case(f"n{n}-padded-memory", n, 16, 8, padded=True, num_memory=1)
    yield _case("n0", 0, 16, 8)
    yield _case("n0-memory", 0, 16, 8, num_memory=2)
    yield _case("no-overlap", 100, 4, 4)
    yield _case("gaps", 100, 3, 7)
    yield _case("stride1", 70, 5, 1)
    yield _case("paper-l32-d16", 200, 32, 16)
    yield _case("memory4-strict", 130, 8, 4, num_memory=4, strict=True)
    yield _case("memory-beyond-a-tile", 60, 8, 4, num_memory=70)
    yield _case("not-causal", 90, 16, 8, is_causal=False, num_memory=1)
    yield _case("offset", 5, 16, 8, query_offset=131)
    yield _case("offset-one-query-memory", 1, 16, 8, query_offset=300, num_memory=1)
    yield _case("offset-before-the-first-end", 3, 16, 8, query_offset=11)
    for group in (2, 3, 4, 6, 16, 20):
        yield _case(f"g{group}", 67, 16, 8, B=1, H=group, Hkv=1)
    yield _case("g4-hkv2-dv", 130, 16, 8, H=8, Hkv=2, D=40, Dv=24)
    yield _case("lse-grad", 130, 16, 8, lse_grad=True)
    yield _case(
        "lse-grad-memory-g4", 67, 16, 8, H=4, Hkv=1, padded=True, num_memory=1, lse_grad=True
    )
    yield _case("lse-grad-sees-nothing", 15, 16, 8, lse_grad=True)
    yield _case("logits-x100", 130, 16, 8, gain=100.0)
    yield _case("scale", 70, 16, 8, scale=0.4)
    for layout in ("bnhd", "channels"):
        yield _case(f"layout-{layout}", 70, 16, 8, H=4, Hkv=2, layout=layout)


CORRECTNESS: tuple[CompressedCase, ...] = tuple(_correctness_cases())


# -------------------------------------------------------------------------------------------------
# Speed. Groups of the benchmarks; `quick` marks what runs by default.


def _speed_cases() -> Iterator[CompressedCase]:
    def speed(
        N: int, window: int, stride: int, D: int, H: int, Hkv: int, **options
    ) -> CompressedCase:
        name = f"compressed-1x{H}x{N}x{D}-kv{Hkv}-l{window}-d{stride}"
        options = {"group": "compressed", "dtypes": SPEED_DTYPES} | options
        return _case(name, N, window, stride, B=1, H=H, Hkv=Hkv, D=D, **options)

    yield speed(4096, 16, 8, 64, 8, 2)
    for n in (1024, 2048, 8192, 16384):  # time against length
        yield speed(n, 16, 8, 64, 8, 2, quick=False)
    yield speed(8192, 32, 16, 128, 16, 1, quick=False)


SPEED: tuple[CompressedCase, ...] = tuple(_speed_cases())
