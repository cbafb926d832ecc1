"""One selected_attention call in canonical form: what every backend receives."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hierkernels.arguments import device_type
from hierkernels.ops.attention.call import new_like


@dataclass(slots=True)
class SelectedCall:
    """The arguments of one call; shapes, dtypes and devices are checked, the indices' values not.

    A backend treats an index outside [0, blocks) as -1 and never reads beyond the keys.
    """

    q: torch.Tensor  # (B, Hq, Nq, D), last stride 1
    k: torch.Tensor  # (B, Hkv, Nk, D), last stride 1
    v: torch.Tensor  # (B, Hkv, Nk, Dv), last stride 1
    indices: torch.Tensor  # (B, Hkv or Hq, Nq, n), int32 or int64, any strides
    weights: torch.Tensor | None  # as indices, float, any strides
    block_size: int
    include_own_block: bool
    is_causal: bool
    scale: float

    def arguments(self) -> tuple:
        """Everything, in the order of the operators and of the compiled core."""
        return (
            self.q, self.k, self.v, self.indices, self.weights, self.block_size,
            self.include_own_block, self.is_causal, self.scale,
        )  # fmt: skip

    @property
    def device_type(self) -> str:
        return device_type(self.q)

    @property
    def lse_dtype(self) -> torch.dtype:
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def group(self) -> int:
        """Query heads for each key/value head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def blocks(self) -> int:
        """Blocks of keys, the last one perhaps cut."""
        return (self.k.shape[2] + self.block_size - 1) // self.block_size

    @property
    def columns(self) -> int:
        """Blocks that a query names, and its own."""
        return self.indices.shape[3] + self.include_own_block

    @property
    def sees_nothing(self) -> bool:
        """There is no query, no key or no block: the kernels have nothing to compute."""
        return not (self.q.shape[:3].numel() and self.k.shape[2] and self.columns)

    @property
    def first_position(self) -> int:
        """Of query 0; negative for queries before all keys."""
        return self.k.shape[2] - self.q.shape[2]

    def new_outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Uninitialised (out, lse); out takes over q's order of heads and tokens in memory."""
        q = self.q
        lse = q.new_empty(q.shape[:3], dtype=self.lse_dtype)
        return new_like(q, self.v.shape[-1]), lse

    def new_gradients(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Uninitialised (dq, dk, dv), in the memory order of q, k and v, last stride 1."""
        D, Dv = self.q.shape[-1], self.v.shape[-1]
        return new_like(self.q, D), new_like(self.k, D), new_like(self.v, Dv)

    def new_weights_gradient(self) -> torch.Tensor:
        """Uninitialised, contiguous, in the precision of lse."""
        return self.q.new_empty(self.indices.shape, dtype=self.lse_dtype)
