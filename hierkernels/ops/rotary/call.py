"""One rotary call in canonical form: what every backend receives."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hierkernels.arguments import device_type


@dataclass(slots=True)
class RotaryCall:
    """The arguments of one call; shapes, dtypes and devices are checked."""

    x: torch.Tensor  # (B, H, N, D), D even, last stride 1
    cos: torch.Tensor  # (N, D / 2), contiguous, in the accumulator's dtype
    sin: torch.Tensor  # as cos
    transposed: bool  # turn back: what the gradient does

    @property
    def device_type(self) -> str:
        return device_type(self.x)

    def new_output(self) -> torch.Tensor:
        """Uninitialised, in x's order of memory."""
        return torch.empty_like(self.x)
