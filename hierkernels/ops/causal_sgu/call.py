"""One causal_sgu call in canonical form: what every backend receives."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hierkernels.arguments import device_type

# In the order of the numbers that the kernels know them by.
ACTIVATIONS = ("none", "relu", "gelu", "silu", "tanh", "sigmoid")
GRADIENTS = ("residual", "gate", "weight", "bias", "gate_residual")


def new_like(t: torch.Tensor) -> torch.Tensor:
    """Uninitialised, contiguous."""
    return t.new_empty(t.shape)


def fold_bias(sums: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """(N, H) by token -> (H, rows) by row of the bucket, in the dtype of the bias."""
    rows = bias.shape[1]
    padded = torch.nn.functional.pad(sums, (0, 0, 0, -sums.shape[0] % rows))
    return padded.unflatten(0, (-1, rows)).sum(0).mT.contiguous().to(bias.dtype)


@dataclass(slots=True)
class SguCall:
    """The arguments of one call; shapes, dtypes and devices are checked."""

    residual: torch.Tensor  # (B, N, C), last stride 1
    gate: torch.Tensor  # (B, N, C), last stride 1
    weight: torch.Tensor  # (H, S, S), or (H, w, 2 w) with a window; last stride 1
    bias: torch.Tensor  # (H, S), or (H, w); last stride 1
    gate_residual: torch.Tensor | None  # (B, N, C), last stride 1
    window: int  # w; 0 = global
    activation: str  # one of ACTIVATIONS

    @property
    def device_type(self) -> str:
        return device_type(self.gate)

    @property
    def heads(self) -> int:
        return self.weight.shape[0]

    @property
    def size(self) -> int:
        """Tokens of a bucket: w; without a window all N."""
        return self.window or self.gate.shape[1]

    def new_outputs(self, keep: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Uninitialised (out, preactivation); the latter is empty unless it is kept."""
        return new_like(self.gate), new_like(self.gate) if keep else self.gate.new_empty(0)
