"""One gelu call in canonical form: what every backend receives."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hierkernels.arguments import device_type

FORMS = ("plain", "halves", "gated")


@dataclass(slots=True)
class GeluCall:
    """The arguments of one call; shapes and dtypes are checked."""

    x: torch.Tensor  # (..., C) of at most 3 dimensions, contiguous
    form: str  # one of FORMS

    @property
    def device_type(self) -> str:
        return device_type(self.x)

    @property
    def channels(self) -> int:
        """Of a result."""
        return self.x.shape[-1] // (1 if self.form == "plain" else 2)

    def new_outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Uninitialised (first, second); second is empty unless the halves are apart."""
        first = self.x.new_empty(*self.x.shape[:-1], self.channels)
        return first, torch.empty_like(first) if self.form == "halves" else first.new_empty(0)
