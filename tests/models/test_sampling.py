"""How tokens are chosen and collected: what all models share."""

from __future__ import annotations

from collections.abc import Callable, Generator

import pytest
import torch
from torch import Tensor

from python_models.layers import gumbel_sample
from python_models.registry import MODELS, continue_bytes
from python_models.sampling import chooser, collect, keep_nucleus, multinomial_sample

PROBABILITIES = torch.tensor([0.15, 0.4, 0.05, 0.3, 0.1], dtype=torch.float64)


@pytest.mark.parametrize(
    "top_p, kept",
    [
        (1e-6, [1]),
        (0.4, [1]),
        (0.41, [1, 3]),
        (0.7, [1, 3]),
        (0.84, [0, 1, 3]),
        (0.94, [0, 1, 3, 4]),
        (0.96, [0, 1, 2, 3, 4]),
    ],
)
def test_nucleus_is_the_smallest_set_that_reaches_top_p(top_p: float, kept: list[int]) -> None:
    logits = PROBABILITIES.log()
    filtered = keep_nucleus(torch.stack((logits, logits.flip(0))), top_p - 1e-9)
    for row, original in zip((filtered[0], filtered[1].flip(0)), (logits, logits), strict=True):
        assert row.isfinite().nonzero().flatten().tolist() == kept
        assert torch.equal(row[kept], original[kept])


def test_nucleus_of_equal_logits_keeps_a_part_of_them() -> None:
    assert keep_nucleus(torch.zeros(1, 8), 0.5).isfinite().sum() == 4


@pytest.mark.parametrize("draw", [gumbel_sample, multinomial_sample])
def test_top_p_counts_probabilities_at_the_temperature(draw: Callable[..., Tensor]) -> None:
    # At temperature 1/2 probabilities are squared: 0.4^2 is half of the sum of the squares.
    logits = PROBABILITIES.log().expand(2000, -1)
    settings = {"filter_thres": 0.0, "generator": torch.Generator().manual_seed(1), "draw": draw}
    drawn = chooser(temperature=0.5, top_p=0.7, **settings)(logits)
    assert set(drawn.tolist()) == {1, 3}
    share = float((drawn == 1).double().mean())
    assert abs(share - 16 / 25) < 0.05  # 0.4^2 : 0.3^2, five standard deviations
    assert set(chooser(temperature=1.0, top_p=0.7, **settings)(logits).tolist()) == {1, 3}
    assert set(chooser(temperature=1.0, top_p=0.71, **settings)(logits).tolist()) == {0, 1, 3}
    assert set(chooser(temperature=0.5, top_p=0.5, **settings)(logits).tolist()) == {1}


def test_top_p_of_one_changes_nothing() -> None:
    logits = torch.randn(50, 20)

    def draw(**settings: float) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        choose = chooser(temperature=1.3, filter_thres=0.5, generator=generator, **settings)
        return choose(logits)

    assert torch.equal(draw(), draw(top_p=1.0))
    assert not torch.equal(draw(), draw(top_p=0.2))


@pytest.mark.parametrize("top_p", [0.0, -0.5, 1.5, float("nan")])
def test_top_p_out_of_range(top_p: float) -> None:
    with pytest.raises(ValueError, match="top_p must be a probability above 0, at most 1, got"):
        chooser(temperature=1.0, filter_thres=0.9, top_p=top_p, generator=None)


def _tokens(closed: list[bool]) -> Generator[Tensor, None, None]:
    try:
        yield torch.tensor([1, 2])
        yield torch.tensor([7, 3])
        yield torch.tensor([7, 7])
        yield torch.tensor([4, 5])
    finally:
        closed.append(True)


def test_collect_calls_back_and_stops_at_the_end_token() -> None:
    heard: list[list[int]] = []
    closed: list[bool] = []
    start = torch.tensor([[9], [8]])
    found = collect(
        _tokens(closed), start, on_token=lambda token: heard.append(token.tolist()), eos_token=7
    )
    assert found.tolist() == [[9, 1, 7, 7], [8, 2, 3, 7]]
    assert heard == [[1, 2], [7, 3], [7, 7]]
    assert closed == [True]
    assert collect(_tokens(closed), start).shape == (2, 5)


def test_collect_closes_the_iterator_if_the_callback_fails() -> None:
    closed: list[bool] = []

    def fail(token: Tensor) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        collect(_tokens(closed), torch.zeros(2, 0, dtype=torch.long), on_token=fail)
    assert closed == [True]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_takes_the_settings(name: str) -> None:
    entry = MODELS[name]
    options = entry.parse((), "tiny")
    model = entry.make(options).eval()

    def draw(**settings: float) -> bytes:
        generator = torch.Generator().manual_seed(1)
        fixed = {"window": entry.window(options), "generator": generator}
        return bytes(continue_bytes(entry, model, b"def ", 12, **fixed, **settings))

    free = draw(temperature=2.0, filter_thres=0.0, top_p=1.0)
    assert len(free) == 12
    assert draw(temperature=2.0, filter_thres=0.0, top_p=1.0) == free
    likeliest = draw(temperature=0.0, filter_thres=0.0, top_p=1.0)
    assert draw(temperature=2.0, filter_thres=0.0, top_p=1e-6) == likeliest != free
