"""The table of named cases of rms_norm and layer_norm: B sequences of N tokens, C channels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

ALL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One problem.

    bias: a layer norm.  far: the mean is ten times the deviation.
    mixed: float32 weight beside 16-bit x.  to: dtype of the result, None as promoted.
    zeros: some tokens are 0, some below eps.  strided: x is not contiguous.
    """

    name: str
    B: int
    N: int
    C: int
    shift: int = 0
    eps: float = 1e-8
    added: bool = False  # eps_is_added
    bias: bool = False
    mixed: bool = False
    to: torch.dtype | None = None
    zeros: bool = False
    strided: bool = False
    far: bool = False
    dtypes: tuple[torch.dtype, ...] = ALL_DTYPES


def _correctness_cases() -> Iterator[Case]:
    # Channels: one, below, at and beyond vectors, odd halves.
    for c in (1, 2, 7, 16, 33, 64, 130):
        yield Case(f"c{c}", 2, 5, c)
        yield Case(f"c{c}-shift", 2, 5, c, shift=1)
    # Delays: none of the tokens reaches that far; all but one.
    for n, shift in ((1, 1), (1, 3), (4, 4), (4, 7), (9, 8), (9, 3)):
        yield Case(f"n{n}-shift{shift}", 3, n, 24, shift=shift)
    yield Case("no-tokens", 2, 0, 8, shift=1)
    yield Case("no-batch", 0, 3, 8, shift=1)
    yield Case("many", 40, 9, 128, shift=1, dtypes=(torch.float32, torch.bfloat16))
    # Lengths that the floor takes the place of, exactly 0 among them.
    yield Case("floor", 2, 6, 20, eps=0.5, zeros=True)
    yield Case("floor-shift", 2, 6, 20, shift=2, eps=0.5, zeros=True)
    yield Case("added", 2, 6, 20, eps=0.5, added=True, zeros=True)
    yield Case("added-shift", 2, 6, 33, shift=2, eps=1e-6, added=True)
    yield Case("mixed", 2, 7, 40, shift=1, mixed=True, dtypes=_HALVES)
    yield Case("to-float32", 2, 7, 40, shift=1, to=torch.float32, dtypes=_HALVES)
    for to in _HALVES:
        name = f"to-{str(to).removeprefix('torch.')}"
        yield Case(name, 2, 7, 40, shift=1, to=to, dtypes=(torch.float32,))
    yield Case("strided", 3, 5, 18, shift=1, strided=True)
    for c in (1, 2, 7, 16, 33, 130):
        yield Case(f"layer-c{c}", 2, 5, c, eps=1e-5, added=True, bias=True)
    layer: dict[str, Any] = {"eps": 1e-3, "added": True, "bias": True}
    yield Case("layer-shift", 3, 9, 33, shift=2, **layer)
    yield Case("layer-zeros", 2, 6, 20, zeros=True, **layer)
    yield Case("layer-far", 2, 6, 40, far=True, **layer)
    yield Case("layer-no-tokens", 2, 0, 8, **layer)
    yield Case("layer-many", 40, 9, 128, dtypes=(torch.float32, torch.bfloat16), **layer)
    yield Case("layer-mixed", 2, 7, 40, mixed=True, dtypes=_HALVES, **layer)
    for to in _HALVES:
        name = f"layer-to-{str(to).removeprefix('torch.')}"
        yield Case(name, 2, 7, 40, shift=1, to=to, dtypes=(torch.float32,), **layer)
    yield Case("layer-strided", 3, 5, 18, strided=True, **layer)


CORRECTNESS: tuple[Case, ...] = tuple(_correctness_cases())
