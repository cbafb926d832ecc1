"""The table of local attention's named cases, read by tests and benchmarks.

A case is one of attention (hierkernels/ops/attention/spec.py) with a window; FLOPs and bytes are
counted in the same manner.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hierkernels.key_range import KeyRange
from hierkernels.ops.attention.spec import SPEED_DTYPES, Case


@dataclass(frozen=True)
class LocalCase(Case):
    """One problem; Nq = Nk. bias: "slots", a bias (Hq, w, slots), or "", none."""

    width: int = 16  # w, window_size
    look_backward: int = 1
    look_forward: int | None = None
    exact_window: bool = False
    zero_lookback: bool = False

    @property
    def forward_buckets(self) -> int:
        """Buckets after its own that a query sees."""
        if self.look_forward is not None:
            return self.look_forward
        return 0 if self.is_causal else 1

    @property
    def visible_range(self) -> KeyRange:
        return KeyRange.bucketed(
            self.Nk, self.width, self.look_backward, self.forward_buckets, self.is_causal,
            self.exact_window,
        )  # fmt: skip

    def broadcast_shape(self, dims: str) -> tuple[int, int, int, int]:
        if dims != "slots":
            return super().broadcast_shape(dims)
        buckets = self.look_backward + 1 + self.forward_buckets
        return 1, self.Hq, self.width, buckets * self.width


def _case(name: str, N: int, w: int, B: int = 2, H: int = 2, D: int = 16, **options) -> LocalCase:
    """A causal case with equal heads and channels unless Hkv or Dv say otherwise."""
    Hkv, Dv = options.pop("Hkv", H), options.pop("Dv", D)
    options = {"is_causal": True, "width": w} | options
    return LocalCase(name, B, H, Hkv, N, N, D, Dv, **options)


# -------------------------------------------------------------------------------------------------
# Correctness. Each axis on its own, with the combinations that share code paths.


def _windows() -> Iterator[LocalCase]:
    # Buckets smaller than, equal to and larger than a tile; the last one full, partial, alone.
    for n, w in ((1, 1), (7, 1), (64, 16), (65, 16), (37, 5), (300, 64), (333, 128), (50, 200)):
        yield _case(f"causal-n{n}-w{w}", n, w)
        yield _case(f"exact-n{n}-w{w}", n, w, exact_window=True)
    yield _case("n0", 0, 16)
    for n, w in ((37, 5), (300, 64)):
        yield _case(f"both-n{n}-w{w}", n, w, is_causal=False)
        yield _case(f"both-exact-n{n}-w{w}", n, w, is_causal=False, exact_window=True)
    for back in (0, 2, 3):
        yield _case(f"back{back}", 100, 12, look_backward=back)
        yield _case(f"back{back}-exact", 100, 12, look_backward=back, exact_window=True)
    for forward in (0, 2):
        yield _case(f"forward{forward}", 100, 12, is_causal=False, look_forward=forward)
    yield _case("own-bucket-only", 70, 9, is_causal=False, look_backward=0, look_forward=0)
    yield _case("forward-only", 70, 9, is_causal=False, look_backward=0, look_forward=2)


def _modifiers() -> Iterator[LocalCase]:
    # The bias by slots: its gradient is summed over buckets and batch.
    yield _case("bias", 70, 16, bias="slots")
    yield _case("bias-w1", 20, 1, bias="slots")
    yield _case("bias-own-w1", 20, 1, bias="slots", look_backward=0)
    yield _case("bias-long", 700, 100, bias="slots", B=1)
    yield _case("bias-one-bucket", 20, 50, bias="slots")
    yield _case("bias-exact", 131, 20, bias="slots", exact_window=True, look_backward=2)
    yield _case("bias-both", 131, 20, bias="slots", is_causal=False)
    yield _case("bias-forward2", 131, 20, bias="slots", is_causal=False, look_forward=2)
    yield _case("bias-g3", 70, 16, H=6, Hkv=2, bias="slots")
    yield _case("bias-padding", 70, 16, B=3, bias="slots", padding="random")
    yield _case("padding-right", 130, 16, B=3, padding="right")
    yield _case("padding-left-exact", 130, 16, B=3, padding="left", exact_window=True)
    yield _case("padding-empty", 70, 16, B=3, padding="empty", lse_grad=True)
    yield _case("dropout", 130, 32, dropout_p=0.3)
    yield _case("dropout-bias", 130, 24, dropout_p=0.3, bias="slots")
    yield _case("scale", 70, 16, scale=0.5)
    yield _case("lse-grad", 70, 16, lse_grad=True)
    yield _case("logits-x100", 130, 16, gain=100.0)
    for layout in ("bnhd", "packed", "channels"):
        yield _case(f"layout-{layout}", 70, 16, H=4, Hkv=2, layout=layout)


def _zero_lookback() -> Iterator[LocalCase]:
    for n, w in ((1, 1), (5, 8), (70, 16), (300, 64)):
        yield _case(f"zero-n{n}-w{w}", n, w, zero_lookback=True)
    yield _case("zero-exact", 70, 16, zero_lookback=True, exact_window=True)
    yield _case("zero-back0", 70, 16, zero_lookback=True, look_backward=0)
    yield _case("zero-back3-both", 70, 12, zero_lookback=True, look_backward=3, is_causal=False)
    yield _case("zero-lse-grad", 70, 16, zero_lookback=True, lse_grad=True)
    yield _case("zero-bias", 70, 16, zero_lookback=True, bias="slots", lse_grad=True)
    yield _case(
        "zero-bias-exact", 70, 12, zero_lookback=True, bias="slots", exact_window=True,
        look_backward=2,
    )  # fmt: skip
    # Queries whose only keys are zeros: out is 0, lse is not -inf.
    yield _case("zero-padding", 70, 16, B=3, zero_lookback=True, padding="empty", lse_grad=True)
    yield _case("zero-dropout", 70, 16, zero_lookback=True, dropout_p=0.3)
    # In float64 the oracle's rounding of such logits is as large as what it would judge.
    low = (torch.float32, torch.bfloat16, torch.float16)
    yield _case("zero-logits-x100", 70, 16, zero_lookback=True, gain=100.0, dtypes=low)
    yield _case(
        "everything", 100, 12, B=3, H=4, Hkv=2, D=24, Dv=40, is_causal=False, look_backward=2,
        look_forward=1, exact_window=True, zero_lookback=True, bias="slots", padding="random",
        dropout_p=0.1, lse_grad=True, layout="bnhd",
    )  # fmt: skip


CORRECTNESS: tuple[LocalCase, ...] = (*_windows(), *_modifiers(), *_zero_lookback())


# -------------------------------------------------------------------------------------------------
# Speed. Groups of the benchmarks; `quick` marks what runs by default.


def _speed(group: str, N: int, w: int, D: int = 64, name: str = "", **options) -> LocalCase:
    full_name = f"{group}-1x8x{N}x{D}-w{w}" + (f"-{name}" if name else "")
    options = {"exact_window": True, "group": group, "dtypes": SPEED_DTYPES} | options
    return _case(full_name, N, w, B=1, H=8, D=D, **options)


def _speed_cases() -> Iterator[LocalCase]:
    for n in (1024, 2048, 4096, 8192, 16384, 32768, 65536):  # time against length
        yield _speed("local-length", n, 128, quick=n == 8192)
    for w in (32, 64, 256, 512):  # the yardstick is local-length-1x8x8192x64-w128
        yield _speed("local-window", 8192, w, quick=False)
    for d in (32, 96, 128, 256):
        yield _speed("local-head-dim", 8192, 128, d, quick=False)
    yield _speed("local-options", 8192, 128, name="bucketed", exact_window=False, quick=False)
    yield _speed("local-options", 8192, 128, name="both", is_causal=False, quick=False)
    yield _speed("local-options", 8192, 128, name="bias", bias="slots", quick=False)
    yield _speed("local-options", 8192, 128, name="zero", zero_lookback=True, quick=False)


SPEED: tuple[LocalCase, ...] = tuple(_speed_cases())
