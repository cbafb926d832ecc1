"""Drawing one token after another: how a token is chosen, and the loop that all models share."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from python_models.layers import gumbel_sample, keep_top


class Reader(Protocol):
    """Reads a growing sequence."""

    def append(self, ids: Tensor) -> Tensor:
        """Adds tokens ``ids (B, N)``; returns the logits ``(B, V)`` of the token after them."""


class Recomputation:
    """Runs the whole model on the whole sequence for every token: what a cache must agree with."""

    def __init__(self, model: Callable[[Tensor], Tensor], limit: int | None = None) -> None:
        """``limit`` is the largest number of tokens, the newest ones, that the model is shown."""
        self.model = model
        self.limit = limit
        self.sequence: Tensor | None = None

    def remember(self, ids: Tensor) -> None:
        """Adds tokens ``ids (B, N)`` that nothing is to be predicted after."""
        ids = ids if self.sequence is None else torch.cat((self.sequence, ids), dim=1)
        self.sequence = ids if self.limit is None else ids[:, -self.limit :]

    def append(self, ids: Tensor) -> Tensor:
        """As :meth:`Reader.append`."""
        self.remember(ids)
        return self.model(self.sequence)[:, -1]


class WindowReader:
    """Decodes with caches while the sequence fits the model, then runs the newest tokens anew.

    A token then moves all positions by one, so that nothing computed before is of use.
    """

    def __init__(self, decoder: Reader, recomputation: Recomputation) -> None:
        """The sequence fits up to the limit of ``recomputation``."""
        assert recomputation.limit is not None
        self.decoder: Reader | None = decoder
        self.recomputation = recomputation
        self.free = recomputation.limit

    def append(self, ids: Tensor) -> Tensor:
        """As :meth:`Reader.append`."""
        self.free -= ids.shape[1]
        if self.free < 0 or self.decoder is None:
            self.decoder = None  # its memory is not needed any more
            return self.recomputation.append(ids)
        self.recomputation.remember(ids)
        return self.decoder.append(ids)


def multinomial_sample(
    logits: Tensor, *, temperature: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Draws from softmax(logits / temperature) over the last dimension: ``(B, V) -> (B,)``."""
    probabilities = (logits / temperature).softmax(dim=-1)
    return rearrange(torch.multinomial(probabilities, 1, generator=generator), "b 1 -> b")


def keep_nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Keeps the likeliest tokens that together reach the probability ``top_p``; the rest -inf.

    At least one token is kept (nucleus sampling, Holtzman et al., 2020).
    """
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    before[..., 0] = 0.0  # exactly, whatever was rounded: the likeliest token is kept
    kept = ordered.masked_fill(before >= top_p, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter_(-1, order, kept)


def chooser(
    *,
    temperature: float,
    filter_thres: float,
    top_p: float = 1.0,
    generator: torch.Generator | None,
    draw: Callable[..., Tensor] = gumbel_sample,
    filter_logits: Callable[..., Tensor] = keep_top,
) -> Callable[[Tensor], Tensor]:
    """The function that picks tokens ``(B,)`` given logits ``(B, V)``.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        filter_thres: share of the vocabulary that is never drawn, the least likely tokens.
        top_p: draw only from the likeliest tokens that together have this probability, of those
            that filter_thres leaves; 1 is all of them.
        generator: source of the random numbers; None is PyTorch's default generator.
        draw: how to draw; :func:`gumbel_sample` or :func:`multinomial_sample`, which have the same
            distribution and use the random numbers in another way.
        filter_logits: called as ``filter_logits(logits, thres=filter_thres)`` before a draw.

    Raises:
        ValueError: temperature, filter_thres or top_p out of range.
    """
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}")
    if not 0 <= filter_thres <= 1:
        raise ValueError(f"filter_thres must be a share from 0 to 1, got {filter_thres}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be a probability above 0, at most 1, got {top_p}")

    def choose(logits: Tensor) -> Tensor:
        if temperature == 0:
            return logits.argmax(dim=-1)
        logits = filter_logits(logits, thres=filter_thres)
        if top_p < 1:
            logits = keep_nucleus(logits / temperature, top_p) * temperature
        return draw(logits, temperature=temperature, generator=generator)

    return choose


def draw_tokens(
    model: nn.Module,
    make_reader: Callable[[], Reader],
    sequence: Tensor,
    count: int,
    choose: Callable[[Tensor], Tensor],
) -> Generator[Tensor, None, None]:
    """Yields the ``count`` tokens ``(B,)`` after ``sequence (B, N)``, each as soon as it is chosen.

    The model is in evaluation mode from the first token until the iterator ends or is closed; the
    mode it was in comes back then. The reader is made in that mode.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            reader = make_reader()
        new = sequence
        for _ in range(count):
            with torch.inference_mode():
                token = choose(reader.append(new))
            token = token.clone()  # an ordinary tensor: the caller may train on it
            yield token
            new = token.unsqueeze(1)
    finally:
        model.train(was_training)


def collect(
    tokens: Generator[Tensor, None, None],
    sequence: Tensor,
    *,
    on_token: Callable[[Tensor], object] | None = None,
    eos_token: int | None = None,
) -> Tensor:
    """``sequence (B, N)`` with all tokens behind it, ``(B, N + count)``.

    ``on_token`` is called with each token ``(B,)`` as soon as it is drawn. Stops early after a step
    in which all sequences drew eos_token.
    """
    drawn = [sequence]
    try:
        for token in tokens:
            drawn.append(token.unsqueeze(1))
            if on_token is not None:
                on_token(token)
            if eos_token is not None and bool((token == eos_token).all()):
                break
    finally:
        tokens.close()
    return torch.cat(drawn, dim=1)
