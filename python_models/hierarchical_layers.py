"""The layers of a HierarchicalTransformer and its losses.

Shapes: B batch, N tokens of the sequence, M tokens of a hierarchy, C its channels, H heads, D head
channels, V vocabulary; c the tokens that one of a hierarchy is made of, s the places from one to
the next.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor, nn

import hierkernels as hk
from python_models.hierarchical_config import Hierarchy
from python_models.layers import GELU, Linear, LocalMHA, normalize
from python_models.rotary import LocalRotaryEmbedding, project_turned

XPOS_SCALE_BASE = 512
EXPANSION = 4  # hidden channels of a compression, for each channel of the embedding


class RMSNorm(nn.Module):
    """Scales every token to length ``sqrt(C)``, times gamma: ``(..., N, C)`` to the same.

    ``shift`` delays the second half of the channels first, by so many tokens.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, shift: int = 0) -> Tensor:
        # The length is at least 1e-12, the root mean square so much divided by sqrt(C).
        return normalize(x, self.gamma, 1e-12 / self.scale, shift)


class FeedForward(nn.Module):
    """Token shift, norm, expansion by ``mult``, GELU, contraction, plus a residual:
    ``(..., N, C)`` to the same."""

    def __init__(self, dim: int, mult: float) -> None:
        super().__init__()
        inner = int(dim * mult)
        self.net = nn.Sequential(
            RMSNorm(dim),
            Linear(dim, inner, bias=False),
            GELU(),
            Linear(inner, dim, bias=False),
        )

    def forward(self, x: Tensor, shift: int = 0, residual: Tensor | None = None) -> Tensor:
        norm, expand, act, contract = self.net
        return contract(act(expand(norm(x, shift))), residual)


class Attention(nn.Module):
    """Token shift, causal attention over all tokens with xpos: ``(B, N, C)`` to the same."""

    def __init__(self, *, dim: int, dim_head: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = RMSNorm(dim)
        self.rotary_emb = LocalRotaryEmbedding(dim_head, XPOS_SCALE_BASE)
        self.rotary_emb.register_buffer("scale", self.rotary_emb.scale)  # in upstream's state dict
        self.to_qkv = Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = Linear(heads * dim_head, dim, bias=False)

    def forward(self, x: Tensor, shift: int = 0) -> Tensor:
        tables = self.rotary_emb.turning_tables(x.shape[1], 0)
        q, k, v = project_turned(self.norm(x, shift), self.to_qkv, self.heads, tables)
        out = hk.attention(q, k, v, is_causal=True)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


class CausalConv(nn.Module):
    """Convolution whose output i sees the inputs up to ``i * stride``, zeros before the first.

    ``(B, C, N) -> (B, C', ceil(N / stride))``.
    """

    def __init__(self, dim: int, dim_out: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(dim, dim_out, kernel_size, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (self.conv.kernel_size[0] - 1, 0)))


class Compress(nn.Module):
    """The tokens of a hierarchy, each out of c embeddings: ``(B, N, C0) -> (B, M, C)``.

    ``to_recon`` predicts these c tokens again from what the model makes of the compressed one.
    """

    def __init__(self, hierarchy: Hierarchy, dim: int, num_tokens: int, should_recon: bool) -> None:
        super().__init__()
        self.factor, self.stride = hierarchy.factor, hierarchy.stride
        self.compress_fn: nn.Module
        self.to_recon: nn.Module | None = None
        if self.factor == 1:
            is_same = hierarchy.dim == dim
            self.compress_fn = nn.Identity() if is_same else Linear(dim, hierarchy.dim, False)
            return
        inner = dim * EXPANSION
        self.compress_fn = nn.Sequential(
            Rearrange("b n c -> b c n"),
            CausalConv(dim, inner, self.factor, self.stride),
            nn.SiLU(),
            nn.Conv1d(inner, hierarchy.dim, 1),
            Rearrange("b c n -> b n c"),
        )
        if should_recon:
            self.to_recon = Linear(hierarchy.dim, self.factor * num_tokens, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.compress_fn(x)

    def reconstruction_loss(self, embeds: Tensor, ids: Tensor, ignore_index: int) -> Tensor:
        """Mean cross-entropy of the c tokens up to each place; ``(B, M, C)`` and ``(B, N)``."""
        if self.to_recon is None:
            return embeds.new_zeros(())
        logits = rearrange(self.to_recon(embeds), "b m (c v) -> (b m c) v", c=self.factor)
        # Before the first token there is nothing to predict.
        ids = F.pad(ids, (self.factor - 1, 0), value=ignore_index)
        return cross_entropy(logits, ids.unfold(1, self.factor, self.stride), ignore_index)


class HierarchicalMerge(nn.Module):
    """What all hierarchies say, at each place of the sequence: tokens ``(B, M, C)`` of each one.

    ``(B, N, C')``, where C' are the channels of one hierarchy, or those of all in a row.
    """

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            RMSNorm(dim),
            Linear(dim, 2 * dim_out),
            nn.SiLU(),
            Linear(2 * dim_out, dim_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class HierarchicalBlock(nn.Module):
    """Attention and feed-forward, each with token shift and a residual: ``(B, M, C)`` to the same.

    Tokens c places apart are c / s rows apart: so far reaches the token shift, and every residue
    class of rows modulo c / s is a sequence of its own for the attention.
    """

    def __init__(self, hierarchy: Hierarchy) -> None:
        super().__init__()
        self.classes = hierarchy.classes
        self.attn: nn.Module | None = None
        sizes = {"dim": hierarchy.dim, "dim_head": hierarchy.dim_head, "heads": hierarchy.heads}
        if hierarchy.window is None:
            self.attn = Attention(**sizes)
        elif hierarchy.window > 0:
            self.attn = LocalMHA(**sizes, window_size=hierarchy.window, causal=True, prenorm=True)
        self.ff = FeedForward(hierarchy.dim, hierarchy.ff_mult)

    def forward(self, x: Tensor) -> Tensor:
        if self.attn is not None:
            # Within a class the row that is so many rows earlier is the one before.
            x = self.by_class(partial(self.attn, shift=1), x) + x
        return self.ff(x, self.classes, residual=x)

    def by_class(self, attend: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Runs ``(B * classes, M', C)`` to the same on the residue classes of ``x (B, M, C)``.

        A zero stands at the end of the classes that have a row less.
        """
        if self.classes == 1:
            return attend(x)
        padded = F.pad(x, (0, 0, 0, -x.shape[1] % self.classes))
        out = attend(rearrange(padded, "b (m a) c -> (b a) m c", a=self.classes))
        return rearrange(out, "(b a) m c -> b (m a) c", a=self.classes)[:, : x.shape[1]]


def cosine_loss(x: Tensor, y: Tensor) -> Tensor:
    """One minus the mean cosine between vectors ``(..., C)``."""
    return 1 - F.cosine_similarity(x, y, dim=-1, eps=1e-12).mean()


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Mean over the labels, any shape, but ignore_index; ``logits (labels, V)``."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return F.cross_entropy(logits, labels.flatten(), ignore_index=ignore_index)
