"""One rms_norm or layer_norm call in canonical form: what every backend receives."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hierkernels.arguments import device_type


@dataclass(slots=True)
class NormCall:
    """The arguments of one call; shapes, dtypes and devices are checked."""

    x: torch.Tensor  # (B, N, C), contiguous
    weight: torch.Tensor  # (C), contiguous, of x's dtype or float32 beside 16-bit x
    bias: torch.Tensor | None  # as weight: a layer norm, which takes the mean away first
    eps: float
    eps_is_added: bool  # to the mean square, instead of being the least root mean square
    shift: int  # tokens that the second half of the channels is delayed by; 0 = none
    dtype: torch.dtype  # of the output

    @property
    def device_type(self) -> str:
        return device_type(self.x)

    @property
    def parameters(self) -> tuple[torch.Tensor, ...]:
        """weight, and bias if there is one."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def kept(self) -> int:
        """Channels that are not delayed; of an odd number the first half is the larger."""
        C = self.x.shape[2]
        return (C + 1) // 2 if self.shift else C

    @property
    def scale(self) -> float:
        """Of a root mean square over a length: sqrt(C)."""
        return self.x.shape[2] ** 0.5

    @property
    def floor(self) -> float:
        """The least length that a row is divided by."""
        return 0.0 if self.eps_is_added else self.eps * self.scale

    @property
    def addend(self) -> float:
        """Of the squared length that a row is divided by."""
        return self.eps * self.x.shape[2] if self.eps_is_added else 0.0

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32

    def new_outputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Uninitialised (out, inverse, mean).

        inverse is 1 over what rows are divided by, mean is empty without a bias.
        """
        out = torch.empty_like(self.x, dtype=self.dtype)
        inverse = self.x.new_empty(self.x.shape[:2], dtype=self.accumulator)
        mean = inverse.new_empty(0) if self.bias is None else torch.empty_like(inverse)
        return out, inverse, mean
