"""The table of gelu's named cases, read by tests: R rows of C channels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hierkernels.ops.gelu.call import FORMS

ALL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Case:
    """One problem.

    gain: factor of x; 6 reaches far into both tails.  strided: x is not contiguous.
    """

    name: str
    R: int
    C: int
    form: str = "plain"
    gain: float = 1.0
    strided: bool = False
    dtypes: tuple[torch.dtype, ...] = ALL_DTYPES


def _correctness_cases() -> Iterator[Case]:
    for form in FORMS:
        # Channels, or halves of them: one, below, at and beyond vectors.
        for c in (2, 14, 32, 66):
            yield Case(f"{form}-c{c}", 5, c, form)
        yield Case(f"{form}-tails", 6, 40, form, gain=6.0)
        yield Case(f"{form}-strided", 5, 18, form, strided=True)
        yield Case(f"{form}-no-rows", 0, 8, form)
        yield Case(f"{form}-no-channels", 3, 0, form)
        dtypes = (torch.float32, torch.bfloat16)
        yield Case(f"{form}-many", 300, 98, form, dtypes=dtypes)  # pieces, the last one cut
    yield Case("plain-odd", 3, 7)


CORRECTNESS: tuple[Case, ...] = tuple(_correctness_cases())
