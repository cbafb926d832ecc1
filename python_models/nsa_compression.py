"""What turns a window of keys (or values) into one: the compression of native sparse attention.

Six networks, each a module ``(B, H, W, l, D) -> (B, H, W, D)``; their state dicts are those of
native-sparse-attention-pytorch 0.2.3. And the windows themselves.

Shapes: B batch, H key/value heads, W windows, l tokens of a window, D head channels, d stride.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor, nn

import hierkernels as hk
from python_models.layers import Linear, PlainRMSNorm


def cut_windows(x: Tensor, size: int, stride: int) -> Tensor:
    """All windows of ``size`` tokens that lie in ``x (B, H, N, D)``: ``(B, H, W, size, D)``.

    Window w holds the tokens from ``w stride`` on; ``W = (N - size) // stride + 1``, at least 0.
    """
    if x.shape[2] < size:
        return x.new_empty(*x.shape[:2], 0, size, x.shape[3])
    if size % stride:
        return rearrange(x.unfold(2, size, stride), "b h w d l -> b h w l d")
    # Windows of whole strides are pieces set side by side, which is quicker, forward and back.
    count, pieces = (x.shape[2] - size) // stride + 1, size // stride
    whole = x[:, :, : (count + pieces - 1) * stride].unflatten(2, (-1, stride))
    if pieces == 1:
        return whole
    return torch.cat([whole[:, :, first : first + count] for first in range(pieces)], dim=3)


class CompressMLP(nn.Sequential):
    """Two layers with ReLU over the flattened window, shared by the heads (the paper's phi)."""

    def __init__(self, dim_head: int, compress_window_size: int, expand_factor: float = 1.0):
        dim = dim_head * compress_window_size
        hidden = int(dim * expand_factor)
        super().__init__(
            Rearrange("b h w l d -> b h w (l d)"),
            Linear(dim, hidden),
            nn.ReLU(),
            Linear(hidden, dim_head),
        )


class AttentionPool(nn.Module):
    """A mean of the window's tokens, weighted channel by channel by a softmax over them.

    Source: Avsec et al., "Effective gene expression prediction ..." (Enformer, 2021).
    """

    def __init__(self, dim_head: int, compress_window_size: int) -> None:
        super().__init__()
        self.to_attn_logits = nn.Linear(dim_head, dim_head, bias=False)
        nn.init.eye_(self.to_attn_logits.weight)

    def forward(self, kv: Tensor) -> Tensor:
        return (kv * self.to_attn_logits(kv).softmax(dim=-2)).sum(dim=-2)


class HeadLinear(nn.Module):
    """A linear layer of each head's own: ``(B, H, W, I) -> (B, H, W, O)``."""

    def __init__(self, heads: int, dim_in: int, dim_out: int) -> None:
        super().__init__()
        bound = dim_in**-0.5
        self.weight = nn.Parameter(torch.empty(heads, dim_in, dim_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(1, heads, 1, dim_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class GroupedMLP(nn.Module):
    """As :class:`CompressMLP`, with weights for each head."""

    def __init__(
        self, dim_head: int, compress_window_size: int, heads: int, expand_factor: float = 1.0
    ) -> None:
        super().__init__()
        dim = dim_head * compress_window_size
        hidden = int(dim * expand_factor)
        self.net = nn.Sequential(
            HeadLinear(heads, dim, hidden), nn.ReLU(), HeadLinear(heads, hidden, dim_head)
        )

    def forward(self, kv: Tensor) -> Tensor:
        return self.net(rearrange(kv, "b h w l d -> b h w (l d)"))


class _SummedProjection(nn.Module):
    """One matrix a head, applied to the sum of the window's tokens."""

    def __init__(self, heads: int, dim_head: int) -> None:
        super().__init__()
        bound = dim_head**-0.5
        self.weight = nn.Parameter(torch.empty(heads, dim_head, dim_head).uniform_(-bound, bound))

    def forward(self, kv: Tensor) -> Tensor:
        return kv.sum(dim=-2) @ self.weight


class SingleProjection(nn.Module):
    """One matrix: of the flattened window, or with several heads of the sum of its tokens."""

    def __init__(self, dim_head: int, compress_window_size: int, heads: int = 1) -> None:
        super().__init__()
        if heads > 1:
            self.compress: nn.Module = _SummedProjection(heads, dim_head)
        else:
            self.compress = nn.Sequential(
                Rearrange("b h w l d -> b h w (l d)"),
                nn.Linear(dim_head * compress_window_size, dim_head, bias=False),
            )

    def forward(self, kv: Tensor) -> Tensor:
        return self.compress(kv)


class ConvLinearCompress(nn.Module):
    """A convolution as wide as the window, one group a head: a matrix of each head's window."""

    def __init__(self, heads: int, dim_head: int, compress_window_size: int) -> None:
        super().__init__()
        self.heads = heads
        self.conv = nn.Conv1d(
            heads * dim_head,
            heads * dim_head,
            compress_window_size,
            stride=compress_window_size,
            groups=heads,
        )

    def forward(self, kv: Tensor) -> Tensor:
        weight = rearrange(self.conv.weight, "(h o) d l -> h (l d) o", h=self.heads)
        bias = rearrange(self.conv.bias, "(h o) -> h 1 o", h=self.heads)
        return rearrange(kv, "b h w l d -> b h w (l d)") @ weight + bias


class _SelfAttention(nn.Module):
    """Attention among the tokens of a window: ``(R, l, C)``, queries of the last ones alone."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = num_heads
        self.dropout = dropout
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, queries: slice) -> Tensor:
        q, k, v = (
            rearrange(project(t), "r n (h d) -> r h n d", h=self.heads)
            for project, t in ((self.q_proj, x[:, queries]), (self.k_proj, x), (self.v_proj, x))
        )
        out = hk.attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(rearrange(out, "r h n d -> r n (h d)"))


class _FeedForward(nn.Module):
    def __init__(self, dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))


class _TransformerLayer(nn.Module):
    def __init__(self, dim: int, num_heads: int, ff_hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = PlainRMSNorm(dim)
        self.norm2 = PlainRMSNorm(dim)
        self.attn = _SelfAttention(dim, num_heads, dropout)
        self.ff = _FeedForward(dim, ff_hidden_dim, dropout)

    def forward(self, x: Tensor, queries: slice) -> Tensor:
        x = x[:, queries] + self.attn(self.norm1(x), queries)
        return x + self.ff(self.norm2(x))


class CompressTransformer(nn.Module):
    """A small transformer over the tokens of a window, all heads' channels together.

    ``dim`` is H D. The window becomes what the last layer says at its last token.
    """

    def __init__(
        self,
        num_layers: int,
        dim: int,
        num_heads: int,
        ff_hidden_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide dim = {dim}, got {num_heads}")
        hidden = 4 * dim if ff_hidden_dim is None else ff_hidden_dim
        self.layers = nn.ModuleList(
            _TransformerLayer(dim, num_heads, hidden, dropout) for _ in range(num_layers)
        )

    def forward(self, kv: Tensor) -> Tensor:
        batch, heads = kv.shape[:2]
        x = rearrange(kv, "b h w l d -> (b w) l (h d)")
        for layer in self.layers[:-1]:
            x = layer(x, slice(None))
        x = self.layers[-1](x, slice(-1, None))  # nothing else of the last layer is asked for
        return rearrange(x, "(b w) 1 (h d) -> b h w d", b=batch, h=heads)
