"""Loss and generation for a model that predicts the token after each token.

The model has ``seq_len``, ``check_tokens``, a forward ``(B, N) -> (B, N, V)`` for N up to seq_len,
and ``decoder()``, which reads tokens one after another.

Shapes: B batch, N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from python_models.arguments import check_integer
from python_models.layers import keep_top
from python_models.sampling import (
    Recomputation,
    WindowReader,
    chooser,
    collect,
    draw_tokens,
    multinomial_sample,
)


def next_token_loss(net: nn.Module, ids: Tensor, ignore_index: int = -100) -> Tensor:
    """Mean cross-entropy in nats of ``ids[:, 1:]``, each token given those before it."""
    logits = net(ids[:, :-1])
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return F.cross_entropy(
        rearrange(logits, "b n v -> (b n) v"),
        rearrange(ids[:, 1:], "b n -> (b n)").long(),
        ignore_index=ignore_index,
    )


class AutoregressiveWrapper(nn.Module):
    """A model with its loss and generation.

    Args:
        net: the model.
        ignore_index: token that the loss skips as a target.
        pad_value: kept for the caller's use.
    """

    def __init__(self, net: nn.Module, ignore_index: int = -100, pad_value: int = 0) -> None:
        super().__init__()
        self.pad_value = pad_value
        self.ignore_index = ignore_index
        self.net = net
        self.max_seq_len = net.seq_len

    def forward(self, x: Tensor) -> Tensor:
        """Mean cross-entropy, in nats a token, of ``x[:, 1:]`` for ``x (B, N)``.

        Raises:
            TypeError, ValueError: x is not integers of two dimensions, or has less than two tokens
                or more than seq_len + 1.
        """
        self._check_shape("x", x)
        if not 2 <= x.shape[1] <= self.max_seq_len + 1:
            raise ValueError(
                f"x must have from 2 to seq_len + 1 = {self.max_seq_len + 1} tokens a sequence, "
                f"got shape {tuple(x.shape)}"
            )
        return next_token_loss(self.net, x, self.ignore_index)

    def generate_tokens(
        self,
        start_tokens: Tensor,
        seq_len: int,
        *,
        temperature: float = 1.0,
        filter_logits_fn: Callable[..., Tensor] = keep_top,
        filter_thres: float = 0.9,
        top_p: float = 1.0,
        use_cache: bool = True,
        generator: torch.Generator | None = None,
    ) -> Generator[Tensor, None, None]:
        """Yields ``seq_len`` new tokens ``(B,)``, each as soon as it is drawn.

        Arguments and errors as in :meth:`generate`. The model is in evaluation mode from the first
        token until the iterator ends or is closed; the mode it was in comes back then.
        """
        self._check_shape("start_tokens", start_tokens)
        self.net.check_tokens("start_tokens", start_tokens)
        if start_tokens.shape[1] == 0:
            raise ValueError(
                "start_tokens must have at least one token a sequence, got shape "
                f"{tuple(start_tokens.shape)}"
            )
        check_integer("seq_len", seq_len, minimum=0)
        choose = chooser(
            temperature=temperature,
            filter_thres=filter_thres,
            top_p=top_p,
            generator=generator,
            draw=multinomial_sample,
            filter_logits=filter_logits_fn,
        )

        def reader() -> WindowReader | Recomputation:
            recomputation = Recomputation(self.net, self.max_seq_len)
            return WindowReader(self.net.decoder(), recomputation) if use_cache else recomputation

        return draw_tokens(self, reader, start_tokens.long(), seq_len, choose)

    def generate(
        self,
        start_tokens: Tensor,
        seq_len: int,
        eos_token: int | None = None,
        temperature: float = 1.0,
        filter_logits_fn: Callable[..., Tensor] = keep_top,
        filter_thres: float = 0.9,
        *,
        top_p: float = 1.0,
        use_cache: bool = True,
        generator: torch.Generator | None = None,
        on_token: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """The ``seq_len`` tokens that follow start_tokens.

        Args:
            start_tokens: tokens ``(B, N)`` or ``(N,)``, at least one. Of more than the model's
                seq_len, the newest ones count.
            seq_len: number of new tokens.
            eos_token: stop after a step in which all sequences draw this token.
            temperature: divides the logits; 0 takes the most likely token.
            filter_logits_fn: called as ``filter_logits_fn(logits, thres=filter_thres)``; what it
                sets to -inf is not drawn.
            filter_thres: share of the vocabulary that is never drawn, the least likely tokens.
            top_p: draw only from the likeliest tokens that together have this probability.
            use_cache: False runs the whole sequence for each token. The tokens are the same.
            generator: source of the random numbers; None is PyTorch's default generator.
            on_token: called with each token ``(B,)`` as soon as it is drawn.

        Returns:
            ``(B, seq_len)`` or ``(seq_len,)``, less if eos_token came; without start_tokens.

        Raises:
            TypeError, ValueError: start_tokens that the model does not know; a seq_len,
                temperature, filter_thres or top_p out of range.
        """
        is_flat = isinstance(start_tokens, Tensor) and start_tokens.ndim == 1
        tokens = self.generate_tokens(
            start_tokens[None] if is_flat else start_tokens,
            seq_len,
            temperature=temperature,
            filter_logits_fn=filter_logits_fn,
            filter_thres=filter_thres,
            top_p=top_p,
            use_cache=use_cache,
            generator=generator,
        )
        start = start_tokens.new_empty(1 if is_flat else len(start_tokens), 0, dtype=torch.long)
        sequence = collect(tokens, start, on_token=on_token, eos_token=eos_token)
        return sequence[0] if is_flat else sequence

    @staticmethod
    def _check_shape(name: str, ids: Tensor) -> None:
        if not isinstance(ids, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(ids).__name__}")
        if ids.ndim != 2:
            raise ValueError(f"{name} must be (batch, tokens), got shape {tuple(ids.shape)}")
