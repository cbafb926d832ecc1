"""The table of causal_sgu's named cases, read by tests and benchmarks.

A case fixes shapes and options, not values: testing.py draws the inputs.
Sizes: B batch, N tokens, C channels, H heads, S the weight's size, w the window.
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

    layout: memory order of the activations: "bnc" contiguous; "halves" residual and gate are the
        two halves of one projection (B, N, 2 C); "cbn" last stride not 1; "unaligned" rows that
        start one element late; "broadcast" one sequence for the whole batch, stride 0.
    mixed: weight and bias in float32 beside 16-bit activations.
    """

    name: str
    B: int
    N: int
    C: int
    H: int = 1
    S: int = 0  # 0 = N
    window: int | None = None
    gate_residual: bool = False
    activation: str | None = None
    mixed: bool = False
    layout: str = "bnc"
    dtypes: tuple[torch.dtype, ...] = ALL_DTYPES
    group: str = ""  # of the benchmarks
    quick: bool = True  # in the benchmarks' quick set

    @property
    def weight_shape(self) -> tuple[int, int, int]:
        if self.window:
            return self.H, self.window, 2 * self.window
        return self.H, self.S or self.N, self.S or self.N

    def weight_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if self.mixed and dtype.itemsize == 2 else dtype

    @property
    def visible(self) -> int:
        """(i, j) pairs of one head that have a weight."""
        w = self.window or max(self.N, 1)
        whole, rest = divmod(self.N, w)
        own = whole * w * (w + 1) // 2 + rest * (rest + 1) // 2
        return own + max(self.N - w, 0) * w

    def flops(self, direction: str = "forward") -> float:
        """Floating-point operations of the products: 2 a pair and channel; backward has two."""
        forward = 2.0 * self.B * self.C * self.visible
        return forward if direction == "forward" else 2 * forward

    def bytes(self, dtype: torch.dtype, direction: str = "forward") -> int:
        """What must be read and written at least once; of the weight, what is not the future's."""
        activations = self.B * self.N * self.C * dtype.itemsize
        w = self.window or self.N
        used = w * (w + 1) // 2 + (w * w if self.window and w < self.N else 0)
        size = self.weight_dtype(dtype).itemsize
        weight, bias = self.H * used * size, self.H * min(w, self.N) * size
        read = 2 + self.gate_residual  # residual, gate
        if direction == "forward":
            return (read + 1) * activations + weight + bias
        # Reads residual, gate, pre-activation and dout; writes a gradient for each input.
        rows, columns = self.weight_shape[1:]
        return (4 + read) * activations + weight + bias + self.H * rows * columns * size


def _correctness_cases() -> Iterator[Case]:
    # Lengths: nothing, one, odd, a tile and one beyond (tiles are 8 to 32 rows, blocks 192 to 320).
    for n in (0, 1, 2, 7, 31, 32, 33, 65, 130, 193, 321):
        yield Case(f"n{n}", 2, n, 24, 2)
    yield Case("n700", 1, 700, 40, 1)
    # Channels: one, below and beyond the vectors, heads of one channel, many columns.
    for c, h in ((1, 1), (3, 3), (5, 1), (17, 1), (66, 2), (96, 4), (256, 2)):
        yield Case(f"c{c}-h{h}", 3, 50, c, h)
    yield Case("columns-1200", 12, 40, 100, 1)
    yield Case("batch0", 0, 9, 8, 2)
    # The weight is larger than the sequence.
    yield Case("size", 2, 45, 24, 3, S=100)
    yield Case("size-n1", 2, 1, 8, 2, S=7)
    # Windows: one token, one bucket, cut buckets, more than a block of tokens.
    for n, w in ((0, 4), (5, 1), (9, 16), (16, 16), (17, 16), (100, 16), (75, 33), (260, 128)):
        yield Case(f"window-n{n}-w{w}", 2, n, 24, 2, window=w)
    yield Case("window-many", 1, 900, 16, 1, window=12)
    yield Case("window-wide", 1, 1000, 20, 1, window=400)
    # What the epilogue does.
    for activation in ("relu", "gelu", "silu", "tanh", "sigmoid"):
        yield Case(f"act-{activation}", 2, 70, 40, 2, activation=activation)
        yield Case(
            f"act-{activation}-all", 2, 50, 36, 2, activation=activation, gate_residual=True,
            window=16, mixed=True,
        )  # fmt: skip
    yield Case("gate-residual", 2, 70, 40, 2, gate_residual=True)
    yield Case("mixed", 2, 130, 64, 2, mixed=True, dtypes=(torch.bfloat16, torch.float16))
    for layout in ("halves", "cbn", "unaligned", "broadcast"):
        yield Case(
            f"layout-{layout}", 3, 45, 34, 2, S=50, layout=layout, gate_residual=True,
            activation="silu",
        )  # fmt: skip


CORRECTNESS: tuple[Case, ...] = tuple(_correctness_cases())


def _speed_cases() -> Iterator[Case]:
    def speed(name: str, B: int, N: int, C: int, H: int, group: str, **options: object) -> Case:
        options.setdefault("mixed", True)
        return Case(name, B, N, C, H, dtypes=SPEED_DTYPES, group=group, **options)  # type: ignore[arg-type]

    for n in (256, 512, 1024, 2048, 4096):  # grows with the square of N
        yield speed(f"global-4x{n}x1024", 4, n, 1024, 4, "global", quick=n == 2048)
    for n in (1024, 4096, 16384, 65536):  # linear in N
        yield speed(
            f"window-1x{n}x1024-w128", 1, n, 1024, 4, "windowed", window=128, quick=n == 16384
        )
    yield speed(
        "global-gelu-4x2048x1024", 4, 2048, 1024, 4, "epilogue", activation="gelu",
        gate_residual=True, quick=False,
    )  # fmt: skip
    yield speed("global-1x2048x256", 1, 2048, 256, 1, "small", quick=False)


SPEED: tuple[Case, ...] = tuple(_speed_cases())
