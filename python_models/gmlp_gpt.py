"""gMLPGPT: a language model whose tokens are mixed by learned matrices instead of attention.

Liu et al., "Pay Attention to MLPs", 2021. A layer halves its hidden channels into a residual and a
gate; the gate of a token is a learned, causal combination of the gates of the tokens up to it, and
multiplies the residual. Windows make the matrices small, folding lets a layer see every e-th
token, a tiny attention head may be added to the gate.

Shapes: B batch, N tokens, C channels of the model, F hidden channels of a layer, H heads of a
gating unit, S the longest sequence, w window, A channels of the attention head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import hierkernels as hk
from python_models.arguments import check_integer, check_token_type, check_token_values
from python_models.gmlp_decoder import Decoder
from python_models.layers import GELU, LayerNorm, Linear, PreNorm
from python_models.pretrained import Pretrained
from python_models.reversible import ReversibleSequence, SequentialSequence

# What hk.causal_sgu computes in the same pass; any other function runs after it.
_FUSED_ACTIVATIONS = {
    nn.Identity: None,
    nn.ReLU: "relu",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
}


def is_fused(act: Callable[[Tensor], Tensor]) -> bool:
    """Whether hk.causal_sgu knows the function."""
    return type(act) in _FUSED_ACTIVATIONS and getattr(act, "approximate", "none") == "none"


class CausalSGU(nn.Module):
    """Causal spatial gating unit of ``(residual, gate)`` and ``gate_residual (B, N, F // 2)``.

    All three, the last one optional, are ``(B, N, F // 2)``, and so is the result.

    Args:
        dim: F.
        dim_seq: S; the weight is (H, S, S), or (H, w, 2 w) with a window.
        heads: the weights that the channels are dealt out to.
        window: w, or None for a weight over the whole sequence.
        act: function of the gate, elementwise.
        init_eps: the weights are drawn from -init_eps / S to init_eps / S (w instead of S).
    """

    mask: Tensor

    def __init__(
        self,
        *,
        dim: int,
        dim_seq: int,
        heads: int,
        window: int | None,
        act: Callable[[Tensor], Tensor],
        init_eps: float,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.norm = LayerNorm(dim // 2)
        rows, columns = (dim_seq, dim_seq) if window is None else (window, 2 * window)
        self.weight = nn.Parameter(torch.zeros(heads, rows, columns))
        nn.init.uniform_(self.weight, -init_eps / rows, init_eps / rows)
        self.bias = nn.Parameter(torch.ones(heads, rows))
        self.act = act
        # In upstream's state dict; hk.causal_sgu knows where the diagonal is.
        self.register_buffer(
            "mask", torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
        )

    def normalized(self, halves: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The residual, and the gate after the norm."""
        residual, gate = halves
        return residual, self.norm(gate)

    def mix(self, residual: Tensor, gate: Tensor, gate_residual: Tensor | None) -> Tensor:
        """The gate mixed over tokens, plus gate_residual, through act, times the residual."""
        fused = is_fused(self.act)
        mixed = hk.causal_sgu(
            residual if fused else torch.ones_like(residual),
            gate,
            self.weight,
            self.bias,
            window=self.window,
            gate_residual=gate_residual,
            activation=_FUSED_ACTIVATIONS[type(self.act)] if fused else None,
        )
        return mixed if fused else self.act(mixed) * residual

    def forward(self, halves: tuple[Tensor, Tensor], gate_residual: Tensor | None = None) -> Tensor:
        residual, gate = self.normalized(halves)
        return self.mix(residual, gate, gate_residual)


class TinyAttention(nn.Module):
    """Causal attention with one small head: ``(B, N, C) -> (B, N, F // 2)``.

    With a window, a token of block ``c`` of w tokens sees blocks ``c - 1`` and ``c`` up to itself.
    upstream_quirks: the values are the keys, and the block before the first one is w keys and
    values of zero, not masked.
    """

    def __init__(
        self, *, dim: int, dim_out: int, dim_inner: int, window: int | None, upstream_quirks: bool
    ) -> None:
        super().__init__()
        self.window = window
        self.upstream_quirks = upstream_quirks and window is not None
        self.to_qkv = Linear(dim, 3 * dim_inner, bias=False)
        self.to_out = Linear(dim_inner, dim_out)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, ``(B, 1, N, A)`` each."""
        q, k, v = rearrange(self.to_qkv(x), "b n (qkv d) -> qkv b 1 n d", qkv=3)
        return q, k, k if self.upstream_quirks else v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention and the output projection: ``(B, N, F // 2)``."""
        if self.window is None:
            out = hk.attention(q, k, v, is_causal=True)
        else:
            out = hk.local_attention(q, k, v, self.window, zero_lookback=self.upstream_quirks)
        return self.to_out(rearrange(out, "b 1 n d -> b n d"))

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(*self.project(x))


class gMLPBlock(nn.Module):
    """Expansion, gating over tokens, contraction, plus a residual: ``(B, N, C) -> (B, N, C)``."""

    def __init__(
        self,
        *,
        dim: int,
        dim_ff: int,
        seq_len: int,
        heads: int,
        window: int | None,
        attn_dim: int | None,
        act: Callable[[Tensor], Tensor],
        upstream_quirks: bool,
    ) -> None:
        super().__init__()
        window = window if window is not None and window < seq_len else None
        self.attn = (
            None
            if attn_dim is None
            else TinyAttention(
                dim=dim,
                dim_out=dim_ff // 2,
                dim_inner=attn_dim,
                window=window,
                upstream_quirks=upstream_quirks,
            )
        )
        self.proj_in = nn.Sequential(Linear(dim, dim_ff), GELU("halves"))
        self.sgu = CausalSGU(
            dim=dim_ff,
            dim_seq=seq_len,
            heads=heads,
            window=window,
            act=act,
            init_eps=0.0 if upstream_quirks else 1e-3,
        )
        self.proj_out = Linear(dim_ff // 2, dim)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        gate_residual = None if self.attn is None else self.attn(x)
        return self.proj_out(self.sgu(self.proj_in(x), gate_residual), residual)


class AxiallyFold(nn.Module):
    """Runs fn on each residue class of positions modulo e, then a causal depthwise convolution.

    ``(B, N, C) -> (B, N, C)``, plus a residual. The convolution, over e positions, joins the
    classes again.
    """

    def __init__(self, *, dim: int, every: int, fn: nn.Module) -> None:
        super().__init__()
        self.every = every
        self.fn = fn
        self.conv = nn.Conv1d(dim, dim, kernel_size=every, groups=dim) if every > 1 else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.conv is None:
            return self.fn(x, residual)
        n, e = x.shape[1], self.every
        x = rearrange(F.pad(x, (0, 0, 0, -n % e)), "b (n e) c -> (b e) n c", e=e)
        x = rearrange(self.fn(x), "(b e) n c -> b c (n e)", e=e)[:, :, :n]
        x = rearrange(self.conv(F.pad(x, (e - 1, 0))), "b c n -> b n c")
        return x if residual is None else x + residual


class FeedForward(nn.Module):
    """Gated feed-forward layer without a norm: ``(B, N, C) -> (B, N, C)``."""

    def __init__(self, dim: int, mult: int) -> None:
        super().__init__()
        inner = int(dim * mult * 2 / 3)
        self.net = nn.Sequential(Linear(dim, 2 * inner), GELU("gated"), Linear(inner, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class gMLPGPT(Pretrained, nn.Module):
    """Autoregressive model of tokens out of causal gated MLPs.

    Args:
        num_tokens: size V of the vocabulary.
        dim: channels C.
        depth: number of layers.
        seq_len: longest sequence S.
        heads: token-mixing matrices of a layer; they share its dim * ff_mult // 2 channels.
        ff_mult: F / C.
        prob_survival: probability with which a layer takes part in a training step.
        reversible: layers alternate with feed-forward layers on two streams, and the backward pass
            recomputes their activations: memory does not grow with depth.
        window: None (whole sequence) or w, for all layers, or a tuple with an entry a layer: None,
            w or (w, e), where e > 1 folds the layer, so that it sees every e-th token. Windows of
            seq_len or more are the whole sequence.
        attn_dim: channels of the attention head added to the gate, or None for none; one for all
            layers or a tuple with an entry a layer.
        act: function of the gate.
        upstream_quirks: as in g-mlp-gpt 0.0.15: the mixing weights begin at exactly 0; windowed
            attention has its keys for values, and zeros for the keys before the first window;
            without reversible, prob_survival has no effect.

    The state dict is that of g-mlp-gpt 0.0.15, whatever the flags.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int,
        depth: int,
        seq_len: int,
        heads: int = 1,
        ff_mult: int = 4,
        prob_survival: float = 1.0,
        reversible: bool = False,
        window: int | tuple[int | tuple[int | None, int] | None, ...] | None = None,
        attn_dim: int | tuple[int | None, ...] | None = None,
        act: Callable[[Tensor], Tensor] | None = None,
        upstream_quirks: bool = False,
    ) -> None:
        super().__init__()
        for name, number in (
            ("num_tokens", num_tokens),
            ("dim", dim),
            ("depth", depth),
            ("seq_len", seq_len),
            ("heads", heads),
            ("ff_mult", ff_mult),
        ):
            check_integer(name, number, minimum=1)
        dim_ff = dim * ff_mult
        if dim_ff % 2:
            raise ValueError(f"dim * ff_mult must be even, got {dim} * {ff_mult}")
        if (dim_ff // 2) % heads:
            raise ValueError(
                f"heads must divide dim * ff_mult // 2 = {dim_ff // 2} channels, got {heads}"
            )
        if not 0 <= prob_survival <= 1:
            raise ValueError(f"prob_survival must be a probability, 0 to 1, got {prob_survival}")
        act = nn.Identity() if act is None else act
        if not callable(act):
            raise TypeError(f"act must be a module or a function, got {act!r}")
        windows = _window_of_each_layer(window, depth)
        attn_dims = attn_dim if isinstance(attn_dim, tuple) else (attn_dim,) * depth
        if len(attn_dims) != depth:
            raise ValueError(
                f"attn_dim must be None, an integer or a tuple of depth = {depth} of them, "
                f"got {attn_dim}"
            )
        for channels in attn_dims:
            if channels is not None:
                check_integer("attn_dim", channels, minimum=1)

        self.num_tokens = num_tokens
        self.seq_len = seq_len
        self.prob_survival = prob_survival
        self.reversible = reversible
        self.layer_dropout = 0.0 if upstream_quirks and not reversible else 1.0 - prob_survival

        self.to_embed = nn.Embedding(num_tokens, dim)
        gmlps, feed_forwards = [], []
        for (w, every), channels in zip(windows, attn_dims, strict=True):
            block = gMLPBlock(
                dim=dim,
                dim_ff=dim_ff,
                seq_len=seq_len,
                heads=heads,
                window=w,
                attn_dim=channels,
                act=act,
                upstream_quirks=upstream_quirks,
            )
            gmlps.append(PreNorm(dim, AxiallyFold(dim=dim, every=every, fn=block)))
            if reversible:
                feed_forwards.append(FeedForward(dim, ff_mult))
        self.net: SequentialSequence | ReversibleSequence = (
            ReversibleSequence(
                list(zip(gmlps, feed_forwards, strict=True)), is_random=not is_fused(act)
            )
            if reversible
            else SequentialSequence(gmlps)
        )
        self.to_logits = nn.Sequential(LayerNorm(dim), Linear(dim, num_tokens))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, N, V)`` of the token after each of the integer tokens ``x (B, N)``.

        Raises:
            TypeError, ValueError: x is not integers, or of a shape, a device or a value that the
                model does not know; N is above seq_len.
        """
        self.check_tokens("x", x)
        if x.shape[1] > self.seq_len:
            raise ValueError(
                f"x must have at most seq_len = {self.seq_len} tokens a sequence, "
                f"got shape {tuple(x.shape)}"
            )
        embedded = self.to_embed(x.long())
        # Nothing can be mixed of no tokens.
        out = self.net(embedded, self.layer_dropout) if x.shape[1] else embedded
        return self.to_logits(out)

    def decoder(self) -> Decoder:
        """Evaluates the model on a sequence that grows, at the cost of the new tokens only."""
        return Decoder(self)

    def check_tokens(self, name: str, ids: Tensor) -> None:
        """Raises TypeError or ValueError unless ids are tokens ``(B, N)`` that the model knows."""
        check_token_type(name, ids, self.to_embed.weight.device)
        if ids.ndim != 2:
            raise ValueError(f"{name} must be (batch, tokens), got shape {tuple(ids.shape)}")
        check_token_values(name, ids, self.num_tokens)


def _window_of_each_layer(window: object, depth: int) -> tuple[tuple[int | None, int], ...]:
    entries = window if isinstance(window, tuple) else (window,) * depth
    if len(entries) != depth:
        raise ValueError(
            f"window must be None, an integer or a tuple with one entry for each of depth = "
            f"{depth} layers, got {window}"
        )
    pairs = tuple(entry if isinstance(entry, tuple) else (entry, 1) for entry in entries)
    for pair in pairs:
        if len(pair) != 2:
            raise ValueError(
                f"window must have None, an integer or a pair (window, axial) for each layer, "
                f"got {pair}"
            )
        if pair[0] is not None:
            check_integer("window", pair[0], minimum=1)
        check_integer("window (axial)", pair[1], minimum=1)
    return pairs
