"""Memformer as a language model: a sequence is predicted segment by segment, with one memory.

The sequence is cut into segments of L tokens. For each of them

- the encoder reads the segment before it, looking at the memory, which knows all those before that
  one; for the first segment it reads a start token;
- the decoder, from a start token on, predicts the segment's tokens one after another, looking at
  the encoder's output;
- the encoder's output updates the memory.

So every token is predicted from all tokens before it: the L to 2 L newest ones through attention,
those before through the memory, whose size is fixed. Training goes through all segments; with
replay its activations are those of one segment (see memory_replay).

Shapes: B batch, N tokens, L tokens of a segment, C channels, V = num_tokens + 1, the last of which
is the start token.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from python_models.arguments import (
    check_integer,
    check_integers,
    check_token_type,
    check_token_values,
)
from python_models.memformer import Memformer
from python_models.memformer_decoder import Decoder
from python_models.memory_replay import run_segments
from python_models.pretrained import Pretrained
from python_models.sampling import Recomputation, chooser, collect, draw_tokens


class MemformerLanguageModel(Pretrained, nn.Module):
    """Autoregressive model of tokens, usually bytes, out of a Memformer.

    Args:
        num_tokens: size of the vocabulary, without the start token.
        dim: channels C.
        depth: layers of the encoder and of the decoder.
        heads: of every attention.
        segment_len: tokens L of a segment.
        segments: segments of a training example.
        num_memory_slots: slots of the memory.
        num_mem_updates: how often a segment updates the memory.
        replay: compute each segment again in the backward pass, instead of keeping the activations
            of all of them.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int,
        depth: tuple[int, int],
        heads: int,
        segment_len: int,
        segments: int,
        num_memory_slots: int,
        num_mem_updates: int = 1,
        replay: bool = False,
    ) -> None:
        super().__init__()
        check_integers("depth", depth, minimum=0)
        if len(depth) != 2:
            raise ValueError(f"depth must be (layers of the encoder, of the decoder), got {depth}")
        for name, number in (
            ("num_tokens", num_tokens),
            ("segment_len", segment_len),
            ("segments", segments),
            ("heads", heads),
        ):
            check_integer(name, number, minimum=1)
        if not isinstance(replay, bool):
            raise TypeError(f"replay must be True or False, got {replay!r}")
        self.start_token = num_tokens
        self.segment_len = segment_len
        self.max_seq_len = segment_len * segments
        self.replay = replay
        sizes = {"num_tokens": num_tokens + 1, "max_seq_len": segment_len, "heads": heads}
        self.net = Memformer(
            dim=dim,
            num_memory_slots=num_memory_slots,
            num_mem_updates=num_mem_updates,
            mem_update_attn_heads=heads,
            enc_depth=depth[0],
            dec_depth=depth[1],
            **{f"enc_{name}": size for name, size in sizes.items()},
            **{f"dec_{name}": size for name, size in sizes.items()},
        )

    def forward(self, ids: Tensor, return_loss: bool = False) -> Tensor:
        """Logits of every token and of the one after them, or the mean loss in nats a token.

        Args:
            ids: integer tokens ``(B, N)``, of any length N.
            return_loss: return the scalar loss; N is at least 1.

        Returns:
            ``(B, N + 1, V)``: those at ``t`` are of token ``t``, given the tokens before it.

        Raises:
            TypeError, ValueError: ids are not integers, or of a shape, a device or a value that
                the model does not know.
        """
        self._check_ids("ids", ids)
        ids = ids.long()
        if return_loss:
            return self._loss(ids)
        logits, mems, size = [], None, self.segment_len
        for first in range(0, ids.shape[1] + 1, size):
            source = ids[:, first - size : first] if first else self.with_start(ids[:, :0])
            context, mems = self.net.encode(source, mems)
            read = self.with_start(ids[:, first : first + size - 1])
            logits.append(self.net.decoder.net(read, context))
        return torch.cat(logits, dim=1)

    def _loss(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        if length == 0:
            raise ValueError(f"ids must have at least one token, got shape {tuple(ids.shape)}")
        targets = ids.split(self.segment_len, dim=1)
        sources = (self.with_start(ids[:, :0]), *targets[:-1])
        steps = [
            {"src": source, "tgt": self.with_start(target)}
            for source, target in zip(sources, targets, strict=True)
        ]
        losses, _ = run_segments(self.net, steps, replay=self.replay)
        # The last segment may be shorter.
        shares = [target.shape[1] / length for target in targets]
        return sum(loss * share for loss, share in zip(losses, shares, strict=True))

    def with_start(self, ids: Tensor) -> Tensor:
        """The start token before ``ids (B, N)``: ``(B, N + 1)``."""
        return F.pad(ids, (1, 0), value=self.start_token)

    def _check_ids(self, name: str, ids: Tensor) -> None:
        check_token_type(name, ids, self.net.memory_slots.device)
        if ids.ndim != 2:
            raise ValueError(f"{name} must be (batch, tokens), got shape {tuple(ids.shape)}")
        check_token_values(name, ids, self.start_token)

    def generate_tokens(
        self,
        prime: Tensor,
        *,
        seq_len: int | None = None,
        filter_thres: float = 0.9,
        temperature: float = 1.0,
        top_p: float = 1.0,
        use_cache: bool = True,
        generator: torch.Generator | None = None,
    ) -> Generator[Tensor, None, None]:
        """Yields one new token ``(B,)`` at a time, as soon as it is drawn.

        Args:
            prime: tokens ``(B, N)`` to continue, maybe none.
            seq_len: stop at this many tokens, those of prime included; None is
                ``segment_len * segments``. It may be larger: the memory takes no more room.
            filter_thres: share of the vocabulary that is never drawn, the least likely tokens.
            temperature: divides the logits; 0 takes the most likely token.
            top_p: draw only from the likeliest tokens that together have this probability.
            use_cache: False computes the whole sequence anew for each token. The tokens are the
                same.
            generator: source of the random numbers; None is PyTorch's default generator.

        Raises:
            TypeError, ValueError: a prime that the model does not know; a seq_len, temperature,
                filter_thres or top_p out of range.
        """
        self._check_ids("prime", prime)
        total = self.max_seq_len if seq_len is None else seq_len
        check_integer("seq_len", total, minimum=0)
        if total < prime.shape[1]:
            raise ValueError(
                f"seq_len counts the prime as well: it must be at least {prime.shape[1]}, "
                f"got {total}"
            )
        draw = chooser(
            temperature=temperature, filter_thres=filter_thres, top_p=top_p, generator=generator
        )

        def choose(logits: Tensor) -> Tensor:
            return draw(logits[:, : self.start_token])  # which is never said

        def reader() -> SegmentReader | Recomputation:
            return SegmentReader(self) if use_cache else Recomputation(self)

        return draw_tokens(self, reader, prime.long(), total - prime.shape[1], choose)

    def generate(
        self,
        prime: Tensor,
        *,
        on_token: Callable[[Tensor], object] | None = None,
        **settings: Any,
    ) -> Tensor:
        """prime and the tokens after it, ``(B, seq_len)``.

        on_token is called with each new token ``(B,)`` as soon as it is drawn; all else as in
        :meth:`generate_tokens`.
        """
        return collect(self.generate_tokens(prime, **settings), prime.long(), on_token=on_token)


class SegmentReader:
    """Reads a sequence that grows, at the cost of the new tokens and an encoder run a segment.

    Of the segments before, the memory stays, of the one before the encoder's output, of the
    present one the decoder's keys and values.
    """

    def __init__(self, model: MemformerLanguageModel) -> None:
        self.model = model
        self.mems: Tensor | None = None
        self.segment: Tensor | None = None  # the tokens of the present one
        self.decoder: Decoder | None = None
        self.logits: Tensor | None = None

    def append(self, ids: Tensor) -> Tensor:
        """Adds tokens ``ids (B, N)``; returns the logits ``(B, V)`` of the token after them."""
        model, size = self.model, self.model.segment_len
        if self.segment is None:
            self._begin(model.with_start(ids[:, :0]))
        else:
            ids = torch.cat((self.segment, ids), dim=1)
        while ids.shape[1] >= size:
            self._begin(ids[:, :size])
            ids = ids[:, size:]
        self.segment = ids
        new = model.with_start(ids)[:, self.decoder.length :]
        if new.shape[1]:
            self.logits = self.decoder.append(new)
        return self.logits

    def _begin(self, source: Tensor) -> None:
        """The segment after source."""
        context, self.mems = self.model.net.encode(source, self.mems)
        self.decoder = Decoder(self.model.net.decoder.net, context)
