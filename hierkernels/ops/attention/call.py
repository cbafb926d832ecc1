"""One attention call in canonical form: what every backend receives."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hierkernels.arguments import device_type
from hierkernels.key_range import KeyRange


def unit_stride(t: torch.Tensor) -> torch.Tensor:
    """t, copied if its channels are not next to one another."""
    return t if t.stride()[-1] == 1 or t.shape[-1] == 1 else t.contiguous()


def new_like(t: torch.Tensor, channels: int) -> torch.Tensor:
    """Uninitialised, with t's order of heads and tokens in memory and the last stride 1."""
    B, H, N, _ = t.shape
    stride = t.stride()
    if stride[1] < stride[2]:
        return t.new_empty(B, N, H, channels).transpose(1, 2)
    return t.new_empty(B, H, N, channels)


@dataclass(slots=True)
class AttentionCall:
    """The arguments of one call; shapes are checked, broadcastable tensors have four dimensions."""

    q: torch.Tensor  # (B, Hq, Nq, D), last stride 1
    k: torch.Tensor  # (B, Hkv, Nk, D), last stride 1
    v: torch.Tensor  # (B, Hkv, Nk, Dv), last stride 1
    bias: torch.Tensor | None  # (B|1, Hq|1, Nq|1, Nk|1), float; by slots if bias_width > 0
    mask: torch.Tensor | None  # (B|1, Hq|1, Nq|1, Nk|1), bool, True = may attend
    padding: torch.Tensor | None  # (B, Nk), bool, True = real token
    seed: torch.Tensor | None  # () int64; given iff dropout_p > 0
    key_range: KeyRange  # canonical
    scale: float
    softcap: float  # 0 = none
    dropout_p: float
    # With bias_width = w > 0 the bias is (1, Hq, w, slots) and repeats with the buckets of w
    # queries: query i and key j take the row i % w and the slot j - i // w * w + bias_before.
    bias_width: int = 0
    bias_before: int = 0

    def arguments(self) -> tuple:
        """Everything, in the order of the operators and of the compiled core."""
        return (
            self.q, self.k, self.v, self.bias, self.mask, self.padding, self.seed,
            self.key_range.to_ints(), self.scale, self.softcap, self.dropout_p,
            self.bias_width, self.bias_before,
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
    def bias_of_pairs(self) -> bool:
        """Whether each element of the bias belongs to one (query, key) pair of one head."""
        q, bias = self.q, self.bias
        if bias is None or self.bias_width:
            return False
        return bias.shape == (q.shape[0], q.shape[1], q.shape[2], self.k.shape[2])

    def new_outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Uninitialised (out, lse); out takes over q's order of heads and tokens in memory."""
        q = self.q
        B, H, N, _ = q.shape
        dtype = self.lse_dtype
        # To name the dtype costs half as much as the allocation.
        lse = q.new_empty(B, H, N) if q.dtype == dtype else q.new_empty((B, H, N), dtype=dtype)
        return new_like(q, self.v.shape[-1]), lse

    def new_gradients(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Uninitialised (dq, dk, dv), in the memory order of q, k and v, last stride 1."""
        D, Dv = self.q.shape[-1], self.v.shape[-1]
        return new_like(self.q, D), new_like(self.k, D), new_like(self.v, Dv)
