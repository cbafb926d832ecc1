"""Memformer: an encoder and decoder whose encoder reads and writes a memory of fixed size.

Wu et al., "Memformer: A Memory-Augmented Transformer for Sequence Modeling", 2020.

A long sequence is read in segments. The encoder looks at its segment and, by cross attention, at
the memory that the segments before have left; then every slot of the memory looks at itself and at
what the encoder made of the segment, and a GRU decides how much of it to keep. The decoder sees the
encoder's output only.

Shapes: B batch, N tokens of src, T tokens of tgt, C channels, H heads, D = C / H channels of a
head, M slots of the memory, V tokens of the decoder's vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from python_models.arguments import check_integer, check_mask
from python_models.layers import PreNorm, Residual
from python_models.memformer_decoder import TargetDecoder
from python_models.memformer_layers import Attention, FeedForward, Layers, TransformerWrapper
from python_models.pretrained import Pretrained


class Results(NamedTuple):
    """Of a segment: the encoder's output (B, N, C), the memory after it (B, M, C), the loss."""

    enc_out: Tensor
    mem: Tensor
    dec_out: Tensor


class EncOnlyResults(NamedTuple):
    """Of a segment: the encoder's output (B, N, C), the memory after it (B, M, C)."""

    enc_out: Tensor
    mem: Tensor


class Memformer(Pretrained, nn.Module):
    """Transformer that reads a sequence in segments and remembers them in slots of its memory.

    Args:
        dim: channels C.
        num_memory_slots: slots M of the memory.
        num_mem_updates: how often a segment updates the memory.
        encoder_only: without a decoder; then the arguments ``dec_...`` are not used.
        mem_update_attn_heads: heads of the attention that updates the memory.
        enc_num_tokens, dec_num_tokens: sizes of the vocabularies.
        enc_max_seq_len: tokens of a segment, where a longer sequence is split into segments.
        dec_max_seq_len: the newest tokens that generation looks at.
        enc_depth, dec_depth: numbers of layers.
        enc_heads, dec_heads: heads of every attention.
        upstream_quirks: as in memformer 0.3.1: the encoder's and the decoder's senses of the
            relative positions are exchanged (so that all keys after an encoder's query have one
            bias), a query without a visible key gets the mean of all values instead of 0, the loss
            counts padding, and a tgt_mask that lacks the last token has no effect.

    The state dict is that of memformer 0.3.1, whatever the flags.

    Raises:
        TypeError, ValueError: an unknown or missing argument, or one out of range.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_memory_slots: int,
        num_mem_updates: int = 1,
        encoder_only: bool = False,
        mem_update_attn_heads: int = 8,
        enc_num_tokens: int,
        enc_max_seq_len: int,
        enc_depth: int,
        enc_heads: int = 8,
        dec_num_tokens: int | None = None,
        dec_max_seq_len: int | None = None,
        dec_depth: int | None = None,
        dec_heads: int = 8,
        upstream_quirks: bool = False,
    ) -> None:
        super().__init__()
        for name, number, minimum in (
            ("dim", dim, 1),
            ("num_memory_slots", num_memory_slots, 1),
            ("num_mem_updates", num_mem_updates, 0),
        ):
            check_integer(name, number, minimum=minimum)
        _check_heads("mem_update_attn_heads", mem_update_attn_heads, dim)
        self.encoder = _transformer(
            "enc", dim, enc_num_tokens, enc_max_seq_len, enc_depth, enc_heads, upstream_quirks
        )
        self.decoder: TargetDecoder | None = None
        if not encoder_only:
            net = _transformer(
                "dec", dim, dec_num_tokens, dec_max_seq_len, dec_depth, dec_heads, upstream_quirks
            )
            self.decoder = TargetDecoder(net, upstream_quirks=upstream_quirks)
        self.num_mem = num_memory_slots
        self.memory_slots = nn.Parameter(torch.randn(num_memory_slots, dim))
        self.num_mem_updates = num_mem_updates
        self.mem_updater = Attention(dim, heads=mem_update_attn_heads)
        self.gru = nn.GRUCell(dim, dim)
        self.mem_ff = Residual(PreNorm(dim, FeedForward(dim)))

    def get_initial_mem(self, batch_size: int) -> Tensor:
        """The memory before the first segment: ``(B, M, C)``."""
        return repeat(self.memory_slots, "m c -> b m c", b=batch_size)

    def forward(
        self,
        src: Tensor,
        tgt: Tensor | Sequence[Tensor] | None = None,
        mems: Tensor | None = None,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
    ) -> Results | EncOnlyResults:
        """Reads a segment and, given tgt, predicts each token of it after the first.

        Args:
            src: integer tokens ``(B, N)``, of any length.
            tgt: integer tokens ``(B, T)``, T >= 2, or a list of B tensors, each of any length from
                2 on; None computes no loss.
            mems: the memory ``(B, M, C)`` that the segment before left; None is the initial one.
            src_mask: bool ``(B, N)``, True = real token.
            tgt_mask: bool ``(B, T)``, or ``(B, T - 1)`` without the last token.

        Returns:
            ``Results(enc_out, mem, dec_out)``: the encoder's output ``(B, N, C)``, the memory after
            the segment ``(B, M, C)`` and the mean cross-entropy in nats over the tokens that count,
            0 without tgt. With encoder_only, ``EncOnlyResults(enc_out, mem)``.

        Raises:
            TypeError, ValueError: tokens, masks or a memory of a type, shape, device or value that
                the model does not know; tgt for a model without a decoder.
        """
        if self.decoder is None and tgt is not None:
            raise ValueError("tgt must be None, as the model has no decoder (encoder_only=True)")
        enc, mems = self._encode(src, mems, src_mask)
        if self.decoder is None:
            return EncOnlyResults(enc, self._update(mems, enc, src_mask))
        if tgt is None:
            loss = torch.zeros((), device=enc.device, requires_grad=True)
        else:
            loss = self.decoder(tgt, enc, tgt_mask=tgt_mask, context_mask=src_mask)
        return Results(enc, self._update(mems, enc, src_mask), loss)

    def encode(
        self, src: Tensor, mems: Tensor | None = None, src_mask: Tensor | None = None
    ) -> EncOnlyResults:
        """The encoder's output and the memory after the segment, without the decoder.

        Arguments and errors as in :meth:`forward`.
        """
        enc, mems = self._encode(src, mems, src_mask)
        return EncOnlyResults(enc, self._update(mems, enc, src_mask))

    @torch.no_grad()
    def generate(
        self,
        src: Tensor,
        start_tokens: Tensor,
        seq_len: int,
        *,
        mems: Tensor | None = None,
        src_mask: Tensor | None = None,
        **settings: Any,
    ) -> Tensor:
        """The ``seq_len`` tokens that the decoder adds to start_tokens, having read src.

        Args:
            src: tokens ``(B, N)``; more than enc_max_seq_len are read in segments of as many, and
                the decoder sees the last segment, which knows those before from the memory.
            start_tokens: tokens ``(B, T)``, at least one, or ``(T,)`` where B is 1.
            mems, src_mask: as in :meth:`forward`.
            settings: temperature (0 takes the most likely token), filter_thres, filter_logits_fn,
                top_p, eos_token, use_cache, generator and on_token, as in
                :meth:`AutoregressiveWrapper.generate`.

        Returns:
            ``(B, seq_len)`` or ``(seq_len,)``, less if eos_token came; without start_tokens.

        Raises:
            TypeError, ValueError: as forward; no tokens in src; a model without a decoder.
        """
        if self.decoder is None:
            raise ValueError("generate needs a decoder, the model has none (encoder_only=True)")
        self.check_source(src, src_mask)
        if src.shape[1] == 0:
            raise ValueError(f"src must have at least one token, got shape {tuple(src.shape)}")
        for segment, mask in self.segments(src, src_mask):
            enc, mems = self.encode(segment, mems, mask)
        return self.decoder.generate(
            start_tokens, seq_len, context=enc, context_mask=mask, **settings
        )

    def segments(
        self, src: Tensor, src_mask: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor | None]]:
        """src ``(B, N)`` and its mask in pieces of enc_max_seq_len tokens, the last one shorter."""
        pieces = src.split(self.encoder.max_seq_len, dim=1)
        if src_mask is None:
            return [(piece, None) for piece in pieces]
        masks = src_mask.split(self.encoder.max_seq_len, dim=1)
        return list(zip(pieces, masks, strict=True))

    def check_source(self, src: Tensor, src_mask: Tensor | None) -> None:
        """Raises TypeError or ValueError unless they are tokens and a mask that forward takes."""
        self.encoder.check_tokens("src", src)
        if src_mask is not None:
            check_mask("src_mask", src_mask, src.device, tuple(src.shape))

    def _encode(
        self, src: Tensor, mems: Tensor | None, src_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The encoder's output ``(B, N, C)`` and the memory before the segment ``(B, M, C)``."""
        self.check_source(src, src_mask)
        batch = src.shape[0]
        if mems is None:
            mems = self.get_initial_mem(batch)
        else:
            self._check_memory(mems, batch)
        return self.encoder(src.long(), mems, mask=src_mask), mems

    def _update(self, mems: Tensor, enc: Tensor, src_mask: Tensor | None) -> Tensor:
        """The memory after a segment: each slot sees itself and the segment's real tokens."""
        batch, length = enc.shape[:2]
        own = torch.eye(self.num_mem, dtype=torch.bool, device=enc.device)
        mask = F.pad(own, (0, length), value=True)[None, None]
        if src_mask is not None:
            key_mask = F.pad(src_mask, (self.num_mem, 0), value=True)
            mask = mask & rearrange(key_mask, "b n -> b 1 1 n")
        attention = self.mem_updater
        segment = attention.keys_and_values(enc)
        for _ in range(self.num_mem_updates):
            slots = attention.keys_and_values(mems)
            k, v = torch.cat((slots, segment), dim=2).chunk(2, dim=1)
            news = attention.attend(attention.queries(mems), k, v, mask=mask)
            kept = self.gru(news.flatten(0, 1), mems.flatten(0, 1))
            mems = self.mem_ff(rearrange(kept, "(b m) c -> b m c", b=batch))
        return mems

    def _check_memory(self, mems: Tensor, batch: int) -> None:
        slots = self.memory_slots
        if not isinstance(mems, Tensor):
            raise TypeError(f"mems must be a tensor, got {type(mems).__name__}")
        if tuple(mems.shape) != (batch, *slots.shape):
            raise ValueError(
                f"mems must have shape (batch, slots, channels) = {(batch, *slots.shape)}, "
                f"got {tuple(mems.shape)}"
            )
        if not mems.is_floating_point():
            raise TypeError(f"mems must be floating point, got {mems.dtype}")
        if mems.device != slots.device:
            raise ValueError(
                f"mems must be on the model's device {slots.device}, got {mems.device}"
            )


def _transformer(
    prefix: str,
    dim: int,
    num_tokens: int | None,
    max_seq_len: int | None,
    depth: int | None,
    heads: int,
    upstream_quirks: bool,
) -> TransformerWrapper:
    """The encoder ("enc") or decoder ("dec"); errors name its arguments with the prefix."""
    sizes = {"num_tokens": num_tokens, "max_seq_len": max_seq_len, "depth": depth}
    missing = [f"{prefix}_{name}" for name, size in sizes.items() if size is None]
    if missing:
        raise TypeError(f"missing {', '.join(missing)}, which a model with a decoder needs")
    for name, size in sizes.items():
        check_integer(f"{prefix}_{name}", size, minimum=0 if name == "depth" else 1)
    _check_heads(f"{prefix}_heads", heads, dim)
    is_decoder = prefix == "dec"
    layers = Layers(
        dim=dim, depth=depth, heads=heads, is_causal=is_decoder, upstream_quirks=upstream_quirks
    )
    return TransformerWrapper(
        num_tokens=num_tokens,
        max_seq_len=max_seq_len,
        dim=dim,
        layers=layers,
        to_logits=is_decoder,
    )


def _check_heads(name: str, heads: int, dim: int) -> None:
    check_integer(name, heads, minimum=1)
    if dim % heads:
        raise ValueError(f"{name} must divide dim = {dim}, got {heads}")
