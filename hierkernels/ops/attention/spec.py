"""The table of attention's named cases, read by tests, benchmarks and the README's support table.

A case fixes shapes and options, not values: hierkernels/testing.py draws the inputs.
Sizes: B batch, Hq query heads, Hkv key/value heads, Nq queries, Nk keys, D and Dv channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hierkernels.key_range import KeyRange

ALL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SPEED_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One problem.

    bias, mask: the dimensions, of "bhqk" (batch, heads, queries, keys), in which the tensor has its
        full size; the others have size 1. "1" is a tensor of one element, "" is none.
    mask_pattern: "random" hides 30%, "leading" hides the first 128 keys, "rows" hides all keys
        from every third query.
    padding: "right" or "left" leaves about Nk (1 - b / B) real tokens in sequence b; "random" hides
        30%; "empty" is "right" with no real token at all in the last sequence. "" is none.
    layout: memory order of q, k, v: "bhnd" contiguous; "bnhd" tokens before heads; "packed" slices
        of one projection (B, N, (Hq + Hkv) D + Hkv Dv), needs Nq = Nk; "unaligned" rows that start
        one element late; "channels" last stride not 1; "broadcast" k, v of stride 0 over the heads.
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
    is_causal: bool = False
    window: tuple[int | None, int | None] | None = None
    key_range: KeyRange | None = None  # replaces is_causal and window
    bias: str = ""
    mask: str = ""
    mask_pattern: str = "random"
    padding: str = ""
    dropout_p: float = 0.0
    softcap: float | None = None
    scale: float | None = None
    lse_grad: bool = False  # the loss depends on lse too
    layout: str = "bhnd"
    gain: float = 1.0
    dtypes: tuple[torch.dtype, ...] = ALL_DTYPES
    group: str = ""  # of the benchmarks
    quick: bool = True  # in the benchmarks' quick set

    @property
    def visible_range(self) -> KeyRange:
        """The key range that the options mean."""
        if self.key_range is not None:
            return self.key_range
        left, right = self.window or (None, None)
        return KeyRange.window(self.Nq, self.Nk, left, 0 if self.is_causal else right)

    @property
    def visible(self) -> int:
        """(query, key) pairs of one head in the key range; masks and padding do not lower it."""
        return self.visible_range.count_visible(self.Nq, self.Nk)

    @property
    def keys_seen(self) -> int:
        """Keys from the first to the last that a query sees: of a long cache, those in a window."""
        if not self.Nq:
            return 0
        lo, hi = self.visible_range.canonical()
        return max(hi.at_query(self.Nq - 1, self.Nk) - lo.at_query(0, self.Nk), 0)

    def flops(self, direction: str = "forward") -> float:
        """Floating-point operations of the products: 2 visible (D + Dv) a head, backward x 2.5."""
        forward = 2.0 * self.B * self.Hq * self.visible * (self.D + self.Dv)
        return forward if direction == "forward" else 2.5 * forward

    def broadcast_shape(self, dims: str) -> tuple[int, int, int, int]:
        """The shape of a bias or mask given by its full-size dimensions."""
        sizes = {"b": self.B, "h": self.Hq, "q": self.Nq, "k": self.Nk}
        b, h, q, k = (size if dim in dims else 1 for dim, size in sizes.items())
        return b, h, q, k

    def bytes(self, dtype: torch.dtype, direction: str = "forward") -> int:
        """Bytes of all inputs and outputs, each once; of k and v the keys that some query sees.

        Forward: q, k, v, bias, mask, padding, out, lse. Backward: these, dout, dq, dk, dv, dbias.
        """
        lse_size = 8 if dtype == torch.float64 else 4
        queries, keys = self.B * self.Hq * self.Nq, self.B * self.Hkv * self.keys_seen
        qkv = queries * self.D + keys * (self.D + self.Dv)
        bias = _count(self.broadcast_shape(self.bias)) if self.bias else 0
        out = queries * self.Dv
        flags = _count(self.broadcast_shape(self.mask)) if self.mask else 0
        flags += self.B * self.Nk if self.padding else 0
        elements = qkv + bias + out
        if direction == "backward":
            unseen = self.B * self.Hkv * (self.Nk - self.keys_seen)  # whose gradients are zero
            elements += out + qkv + bias + unseen * (self.D + self.Dv)
        return elements * dtype.itemsize + queries * lse_size + flags

    def __str__(self) -> str:
        return self.name


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def _case(name: str, B: int = 2, H: int = 2, N: int = 65, D: int = 64, **options) -> Case:
    """A case with equal heads, lengths and channels unless Hkv, Nk or Dv say otherwise."""
    Hkv, Nk, Dv = options.pop("Hkv", H), options.pop("Nk", N), options.pop("Dv", D)
    return Case(name, B, H, Hkv, N, Nk, D, Dv, **options)


# -------------------------------------------------------------------------------------------------
# Correctness. Each axis is varied on its own, with the combinations that share code paths.


def _lengths() -> Iterator[Case]:
    # 0 and 1 are the edges; primes meet no tile; tile - 1, tile, tile + 1 for tiles of 16 to 192.
    for n in (0, 1, 2, 9, 37, 15, 16, 17, 63, 64, 65, 127, 128, 129, 191, 192, 193, 509):
        yield _case(f"causal-n{n}", N=n, is_causal=True)
    for n in (1, 17, 64, 193):
        yield _case(f"full-n{n}", N=n)
    # Many short sequences: several share a tile, and the last tile is partly empty.
    for batch, heads, n in ((33, 3, 1), (37, 2, 5), (29, 4, 9), (19, 2, 16), (7, 3, 33)):
        yield _case(f"short-{batch}x{heads}x{n}", batch, heads, n, is_causal=True)
    yield _case("short-full-23x2x9", 23, 2, 9)
    yield _case("one-head-n300", 1, 1, 300, is_causal=True)


def _cross_lengths() -> Iterator[Case]:
    # Bottom-right alignment: with Nq > Nk the first queries see nothing.
    shorter, longer = ((1, 129), (7, 200), (64, 65), (130, 257)), ((65, 64), (40, 17), (257, 130))
    for nq, nk in (*shorter, *longer, (5, 0)):
        yield _case(f"causal-q{nq}-k{nk}", N=nq, Nk=nk, is_causal=True)
    yield _case("full-q33-k150", N=33, Nk=150)
    yield _case("full-q150-k33", N=150, Nk=33)
    yield _case("full-q0-k33", N=0, Nk=33)
    yield _case("full-q33-k0", N=33, Nk=0)  # every row sees nothing
    yield _case("batch0", B=0, N=17, is_causal=True)


def _head_dims() -> Iterator[Case]:
    # Multiples of 16 (tensor instructions), of 8 (16-byte rows), neither; up to the largest.
    for d in (1, 8, 24, 32, 40, 80, 96, 128, 192, 256):
        yield _case(f"d{d}", H=2, N=70, D=d, is_causal=True)
    yield _case("d100-n130", N=130, D=100, is_causal=True)
    for d, dv in ((64, 32), (32, 64), (192, 128), (40, 72), (8, 1)):
        yield _case(f"d{d}-dv{dv}", N=70, D=d, Dv=dv, is_causal=True)
    yield _case("short-d40-dv24", 21, 2, 9, D=40, Dv=24, is_causal=True)


def _groups() -> Iterator[Case]:
    # The heads of a group share k and v, and may share a tile; dk and dv sum over them.
    for g, hkv in ((2, 2), (3, 2), (8, 1), (4, 2)):
        yield _case(f"g{g}-hkv{hkv}", H=g * hkv, Hkv=hkv, N=67, is_causal=True)
    yield _case("g3-short", 17, 6, 9, Hkv=2, is_causal=True)
    yield _case("g8-decode", H=8, Hkv=1, N=1, Nk=130, is_causal=True)
    yield _case("g4-cross", H=4, Hkv=1, N=5, Nk=70, is_causal=True)
    yield _case("g2-long", 1, 4, 260, Hkv=2, is_causal=True)


def _ranges() -> Iterator[Case]:
    # Tiles outside the range are skipped, tiles inside are not masked: widths around a tile, and 0.
    two_sided = ((0, 0), (1, 0), (16, 0), (64, 0), (100, 30), (0, 5), (500, 500))
    for left, right in (*two_sided, (None, 3), (20, None)):
        yield _case(f"window-{left}-{right}", N=200, window=(left, right))
    yield _case("window-causal-70", N=300, is_causal=True, window=(70, None))
    yield _case("window-q50-k200", N=50, Nk=200, window=(64, 8))
    yield _case("window-q200-k50", N=200, Nk=50, window=(10, 10))  # many rows see nothing
    yield _case("bucketed-w16", N=130, key_range=KeyRange.bucketed(130, 16))
    yield _case("bucketed-w64-back2", N=333, key_range=KeyRange.bucketed(333, 64, look_backward=2))
    yield _case(
        "bucketed-w32-forward",
        N=150,
        key_range=KeyRange.bucketed(150, 32, look_forward=1, is_causal=False),
    )
    yield _case("bucketed-w32-exact", N=150, key_range=KeyRange.bucketed(150, 32, exact=True))
    yield _case("bucketed-w1-back0", N=20, key_range=KeyRange.bucketed(20, 1, look_backward=0))
    # Steps longer than 1 with memory tokens: compressed attention.
    yield _case("compressed", N=150, Nk=4 + 17, key_range=KeyRange.compressed(15, 8, num_memory=4))
    yield _case("compressed-strict", N=100, Nk=25, key_range=KeyRange.compressed(3, 4, strict=True))
    yield _case(  # no memory, so the first 15 queries see nothing; grouped heads
        "compressed-g4", H=4, Hkv=1, N=130, Nk=15, key_range=KeyRange.compressed(15, 8)
    )


def _modifiers() -> Iterator[Case]:
    # Broadcast forms of the bias: each reduces its gradient over other dimensions.
    for dims in ("bhqk", "hqk", "hk", "k", "q", "bh", "qk", "b", "1"):
        yield _case(f"bias-{dims}", N=70, is_causal=True, bias=dims)
    yield _case("bias-hqk-full", N=130, Nk=67, bias="hqk")
    yield _case("bias-hqk-g3", H=6, Hkv=2, N=70, is_causal=True, bias="hqk")
    yield _case("bias-short", 21, 2, 9, is_causal=True, bias="hqk")
    yield _case("bias-window", N=200, window=(40, 0), bias="hqk")
    for dims in ("bhqk", "qk", "bk", "hq", "k"):
        yield _case(f"mask-{dims}", N=70, mask=dims)
    yield _case("mask-causal", N=130, is_causal=True, mask="bhqk")
    # A tile that hides everything comes first: the running maximum is still -inf after it.
    yield _case("mask-leading-tile", N=200, mask="k", mask_pattern="leading")
    yield _case("mask-leading-tile-causal", N=200, is_causal=True, mask="k", mask_pattern="leading")
    yield _case("mask-rows", N=70, mask="q", mask_pattern="rows")
    yield _case("mask-short", 21, 2, 9, is_causal=True, mask="bqk")
    for kind in ("right", "left", "random", "empty"):
        yield _case(f"padding-{kind}", B=3, N=130, padding=kind)
    yield _case("padding-causal", B=3, N=130, is_causal=True, padding="right")
    yield _case("padding-short", 19, 2, 9, is_causal=True, padding="right")
    # Dropout: the mask is a function of (seed, b, h, i, j), whatever the tiles and the packing.
    yield _case("dropout", N=150, is_causal=True, dropout_p=0.2)
    yield _case("dropout-half-full", N=70, Nk=131, dropout_p=0.5)
    yield _case("dropout-g2", H=4, Hkv=2, N=70, is_causal=True, dropout_p=0.3)
    yield _case("dropout-short", 17, 3, 9, is_causal=True, dropout_p=0.2)
    yield _case("softcap", N=130, is_causal=True, softcap=5.0, gain=4.0)
    yield _case("softcap-bias", N=70, is_causal=True, softcap=5.0, gain=4.0, bias="hqk")
    yield _case("softcap-short", 17, 2, 9, is_causal=True, softcap=2.0)
    yield _case("lse-grad", N=130, is_causal=True, lse_grad=True)
    yield _case("lse-grad-short", 17, 2, 9, is_causal=True, lse_grad=True)
    yield _case("lse-grad-rows-see-nothing", N=40, Nk=17, is_causal=True, lse_grad=True)
    yield _case("scale", N=70, is_causal=True, scale=0.3)
    yield _case("scale-negative", N=70, is_causal=True, scale=-0.2)
    yield _case("scale-zero", N=70, is_causal=True, scale=0.0)
    # Logits of some hundreds: exp must neither overflow nor lose the maximum.
    yield _case("logits-x100", N=130, is_causal=True, gain=100.0)
    yield _case("logits-x100-short", 17, 2, 9, is_causal=True, gain=100.0)
    yield _case(
        "everything", H=4, Hkv=2, N=90, Nk=140, D=40, Dv=72, window=(80, 10), bias="hqk",
        mask="bqk", padding="right", dropout_p=0.1, softcap=8.0, lse_grad=True, layout="bnhd",
    )  # fmt: skip


def _layouts() -> Iterator[Case]:
    # Any strides with the last one 1 without a copy; other last strides by a copy.
    for layout in ("bnhd", "packed", "unaligned", "channels", "broadcast"):
        yield _case(f"layout-{layout}", H=4, Hkv=2, N=130, is_causal=True, layout=layout)
    for layout in ("bnhd", "packed", "broadcast"):
        yield _case(f"layout-{layout}-short", 17, 4, 9, Hkv=2, is_causal=True, layout=layout)


CORRECTNESS: tuple[Case, ...] = (
    *_lengths(), *_cross_lengths(), *_head_dims(), *_groups(), *_ranges(), *_modifiers(),
    *_layouts(),
)  # fmt: skip


# -------------------------------------------------------------------------------------------------
# Speed. Groups of the benchmarks; `quick` marks what runs by default.


def _speed(group: str, B: int, H: int, N: int, D: int, name: str = "", **options) -> Case:
    causal = options.pop("is_causal", True)
    shape = f"{B}x{H}x{N}x{D}" + (f"-{name}" if name else "")
    options |= {"dtypes": SPEED_DTYPES, "group": group}
    return _case(f"{group}-{shape}", B, H, N, D, is_causal=causal, **options)


def _speed_cases() -> Iterator[Case]:
    yield _speed("long", 1, 8, 4096, 64)
    yield _speed("long", 1, 8, 4096, 128)
    for n in (512, 1024, 2048, 8192):  # time against length
        yield _speed("long", 1, 8, n, 64, quick=n == 2048)
    yield _speed("long", 1, 8, 4096, 64, "full", is_causal=False, quick=False)
    yield _speed("short", 64, 8, 64, 64)
    yield _speed("short", 512, 8, 16, 64)
    yield _speed("short", 4096, 4, 9, 64)
    for batch, n in ((2048, 5), (1024, 17), (512, 33), (128, 128)):
        yield _speed("short", batch, 8, n, 64, quick=False)
    # The yardstick of these is long-1x8x2048x64, which has 8 key/value heads.
    yield _speed("grouped", 1, 8, 2048, 64, "kv1", Hkv=1, quick=False)
    yield _speed("grouped", 1, 8, 2048, 64, "kv2", Hkv=2)
    yield _speed("grouped", 4096, 8, 9, 64, "kv1", Hkv=1, quick=False)
    yield _speed("grouped", 8, 8, 1, 64, "kv1-decode", Hkv=1, Nk=4096, quick=False)
    yield _speed("bias", 1, 8, 1024, 64, "hqk", bias="hqk")
    yield _speed("bias", 1, 8, 2048, 64, "hqk", bias="hqk", quick=False)
    yield _speed("bias", 4, 8, 1024, 64, "hqk", bias="hqk", quick=False)
    yield _speed("bias", 512, 8, 16, 64, "hqk", bias="hqk", quick=False)
    yield _speed("mask", 1, 8, 1024, 64, "qk", mask="qk", quick=False)
    yield _speed("padding", 4, 8, 1024, 64, "right", padding="right", quick=False)
    yield _speed("padding", 512, 8, 16, 64, "right", padding="right", quick=False)
    yield _speed("window", 1, 8, 4096, 64, "256", window=(256, None), quick=False)
    yield _speed("window", 1, 8, 8192, 64, "128", window=(128, None), quick=False)
    for d in (32, 40, 80, 96, 128, 256):
        yield _speed("head-dim", 1, 8, 1024, d, quick=False)


SPEED: tuple[Case, ...] = tuple(_speed_cases())
