"""Memformer's decoder: its loss, and its generation with everything computed so far kept.

A new token needs the keys and values of the tokens before it, and of the context, which are
computed once. Its bias by relative position is a piece of one table.

Shapes: B batch, N tokens of the context, T tokens of tgt, C channels, H heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from python_models.arguments import check_mask, check_token_type, check_token_values
from python_models.autoregressive_wrapper import AutoregressiveWrapper
from python_models.layers import KVCache
from python_models.relative_position import toeplitz

if TYPE_CHECKING:
    from python_models.memformer_layers import TransformerWrapper


class TargetDecoder(nn.Module):
    """The decoder with its loss and its generation.

    upstream_quirks: the loss counts padding, and a mask that lacks the last token has no effect.
    """

    def __init__(self, net: TransformerWrapper, *, upstream_quirks: bool) -> None:
        super().__init__()
        self.net = net
        self.upstream_quirks = upstream_quirks

    def forward(
        self,
        tgt: Tensor | Sequence[Tensor],
        context: Tensor,
        *,
        tgt_mask: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Mean cross-entropy in nats of ``tgt[:, 1:]``; arguments as in :meth:`Memformer.forward`.

        A token counts if it is real and the one before it, from which it is predicted, is too.
        """
        batch = context.shape[0]
        if isinstance(tgt, Tensor):
            self.net.check_tokens("tgt", tgt, batch=batch)
            if tgt.shape[1] < 2:
                raise ValueError(
                    f"tgt must have at least two tokens a sequence, got shape {tuple(tgt.shape)}"
                )
            inputs, targets = tgt[:, :-1].long(), tgt[:, 1:].long()
            counts = None
            if tgt_mask is not None:
                tgt_mask, counts = self._split_mask(tgt_mask, tgt)
        else:
            if tgt_mask is not None:
                raise ValueError(
                    "tgt_mask must be None if tgt is a list: the lengths say what is real"
                )
            inputs, targets, counts = self._pad(tgt, batch)
        logits = self.net(
            inputs, context, mask=tgt_mask, cross_query_mask=tgt_mask, context_mask=context_mask
        )
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        logits, targets = rearrange(logits, "b n v -> (b n) v"), targets.flatten()
        if counts is None or self.upstream_quirks:
            return F.cross_entropy(logits, targets)
        targets = targets.masked_fill(~counts.flatten(), -100)
        total = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        return total / counts.sum().clamp(min=1)

    def _split_mask(self, mask: Tensor, tgt: Tensor) -> tuple[Tensor | None, Tensor]:
        """The mask of the tokens that are read, and which of those predicted count, ``(B, T - 1)``.

        A mask that lacks the last token, which is only predicted, takes it to be as real as the
        one before.
        """
        batch, length = tgt.shape
        check_mask("tgt_mask", mask, tgt.device, (batch, length), (batch, length - 1))
        read = mask[:, : length - 1]
        if mask.shape[1] == length:
            return read, read & mask[:, 1:]
        if self.upstream_quirks:
            return None, read
        return read, read & torch.cat((read[:, 1:], read[:, -1:]), dim=1)

    def _pad(self, tgt: Sequence[Tensor], batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, targets and which of them are real, ``(B, longest - 1)`` each."""
        if not isinstance(tgt, list | tuple):
            raise TypeError(
                f"tgt must be a tensor (B, T) or a list of tensors (T,), got {type(tgt).__name__}"
            )
        if len(tgt) != batch:
            raise ValueError(
                f"tgt must have the batch size of src ({batch}), got a list of {len(tgt)}"
            )
        for ids in tgt:
            check_token_type("tgt", ids, self.net.token_emb.weight.device)
            if ids.ndim != 1 or len(ids) < 2:
                raise ValueError(
                    f"tgt must be tensors (T,) of at least two tokens, got shape {tuple(ids.shape)}"
                )
            check_token_values("tgt", ids, self.net.num_tokens)
        inputs = pad_sequence([ids[:-1].long() for ids in tgt], batch_first=True)
        targets = pad_sequence([ids[1:].long() for ids in tgt], batch_first=True)
        lengths = torch.tensor([[len(ids) - 1] for ids in tgt], device=inputs.device)
        return inputs, targets, torch.arange(inputs.shape[1], device=inputs.device) < lengths

    def generate(
        self,
        start_tokens: Tensor,
        seq_len: int,
        *,
        context: Tensor,
        context_mask: Tensor | None = None,
        **settings: Any,
    ) -> Tensor:
        """The ``seq_len`` tokens after start_tokens, given an encoder's output.

        context ``(B, N, C)`` with its mask ``(B, N)``; all else as in
        :meth:`AutoregressiveWrapper.generate`.
        """
        model = Conditioned(self.net, context, context_mask)
        return AutoregressiveWrapper(model).generate(start_tokens, seq_len, **settings)


class Conditioned(nn.Module):
    """A decoder and the context that it attends to: a model of the token after each token."""

    def __init__(
        self, net: TransformerWrapper, context: Tensor, context_mask: Tensor | None = None
    ) -> None:
        super().__init__()
        self.net = net
        self.context = context
        self.context_mask = context_mask
        self.seq_len = net.max_seq_len

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``(B, T, V)`` for tokens ``(B, T)``."""
        return self.net(ids, self.context, context_mask=self.context_mask)

    def decoder(self) -> Decoder:
        """Evaluates the model on a sequence that grows, at the cost of the new tokens only."""
        return Decoder(self.net, self.context, self.context_mask)

    def check_tokens(self, name: str, ids: Tensor) -> None:
        """Raises TypeError or ValueError unless ids are tokens ``(B, T)`` that the model knows."""
        self.net.check_tokens(name, ids, batch=self.context.shape[0])


class Decoder:
    """Evaluates a decoder on sequences that grow to at most max_seq_len tokens.

    Nothing is computed twice. The weights must not change meanwhile. Use it in
    torch.inference_mode or torch.no_grad: it writes into its buffers.
    """

    def __init__(
        self, net: TransformerWrapper, context: Tensor, context_mask: Tensor | None = None
    ) -> None:
        self.net = net
        self.context_mask = context_mask
        self.capacity = net.max_seq_len
        self.length = 0
        layers = net.layer_blocks.layers
        self.caches = [KVCache(self.capacity) for _ in layers]
        self.contexts = [
            cross.fn.fn.keys_and_values(context).chunk(2, dim=1) for _, cross, _ in layers
        ]
        # By position of a key relative to the query, those after it included.
        self.bias = net.layer_blocks.rel_pos_emb.by_position(1 - self.capacity, self.capacity - 1)

    def append(self, ids: Tensor) -> Tensor:
        """Adds tokens ``ids (B, N)``; returns the logits ``(B, V)`` of the token after them.

        Raises:
            ValueError: no tokens, or more than max_seq_len in all.
        """
        new = ids.shape[1]
        if new == 0 or self.length + new > self.capacity:
            raise ValueError(
                f"ids must have 1 to {self.capacity - self.length} tokens a sequence, up to "
                f"max_seq_len = {self.capacity} in all, got {new}"
            )
        self.length += new
        # From the last query's first key to the first query's last key.
        bias = self.bias[:, self.capacity - self.length : self.capacity - 1 + new]
        bias = toeplitz(bias, new)[None]
        x = self.net.token_emb(ids.long())
        for layer, cache, context in zip(
            self.net.layer_blocks.layers, self.caches, self.contexts, strict=True
        ):
            self_attention, cross_attention, feed_forward = layer
            norm, attention = self_attention.fn.norm, self_attention.fn.fn
            y = norm(x)
            keys, values = cache.append(attention.keys_and_values(y))
            x = x + attention.attend(attention.queries(y), keys, values, bias=bias)
            norm, attention = cross_attention.fn.norm, cross_attention.fn.fn
            q = attention.queries(norm(x))
            x = x + attention.attend(q, *context, key_mask=self.context_mask)
            x = feed_forward(x)
        return self.net.to_logits(self.net.norm(x[:, -1]))
