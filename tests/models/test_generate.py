"""Generation: the caches give what recomputing gives, the draws are upstream's, and it is quick."""

from __future__ import annotations

import time
from math import prod

import pytest
import torch

import hierkernels as hk
from python_models import MEGABYTE, megabyte, megabyte_decoder
from python_models.megabyte_decoder import Decoder
from python_models.registry import MODELS

SMALL = {"num_tokens": 16, "dim_head": 8, "heads": 2}
CASES = {
    "two": {**SMALL, "dim": (24, 16), "depth": (2, 2), "max_seq_len": (5, 4)},
    "two-rotary": {
        **SMALL,
        "dim": (24, 16),
        "depth": (1, 2),
        "max_seq_len": (4, 5),
        "rel_pos": True,
    },
    "three-everything": {
        **SMALL,
        "dim": (32, 24, 17),  # odd: the token shift splits it unevenly
        "depth": (2, 2, 1),
        "max_seq_len": (3, 3, 4),
        "rel_pos": True,
        "pos_emb": True,
    },
    "quirks": {
        **SMALL,
        "dim": 16,
        "depth": (1, 1),
        "max_seq_len": (4, 4),
        "pos_emb": True,
        "upstream_quirks": True,
    },
    "one-position-stages": {**SMALL, "dim": 16, "depth": (1, 1, 1), "max_seq_len": (3, 1, 2)},
    "no-blocks": {**SMALL, "dim": 16, "depth": (0, 1), "max_seq_len": (3, 2)},
}


def make(options: dict, dtype: torch.dtype = torch.float64) -> MEGABYTE:
    torch.manual_seed(1)
    return MEGABYTE(**options).to(dtype).eval()


@pytest.mark.parametrize("case", CASES)
def test_decoder_gives_the_logits_of_forward(case: str) -> None:
    """Token by token, and in pieces of every kind: inside a patch, across patches and rows."""
    model = make(CASES[case])
    total = prod(model.max_seq_len)
    ids = torch.randint(16, (2, total), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = torch.stack([model(ids[:, :n])[:, -1] for n in range(total + 1)], dim=1)
        for pieces in ([0] + [1] * total, [total], [2, 3, 1], [1, total - 1], [3, 0, 2]):
            decoder, read = Decoder(model, 2), 0
            for size in pieces:
                logits = decoder.append(ids[:, read : read + size])
                read += size
                if size or not read:
                    torch.testing.assert_close(logits, expected[:, read], rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_do_not_depend_on_the_cache(case: str) -> None:
    model = make(CASES[case])
    total = prod(model.max_seq_len)
    for length in (0, total // 2, total):
        prime = torch.randint(16, (3, length), generator=torch.Generator().manual_seed(length))
        cached = model.generate(prime, temperature=0)
        assert cached.shape == (3, *model.max_seq_len)
        assert torch.equal(cached.flatten(1)[:, :length], prime)
        assert torch.equal(cached, model.generate(prime, temperature=0, use_cache=False))


def test_draws_are_those_of_upstream() -> None:
    package = pytest.importorskip(
        "MEGABYTE_pytorch", reason="megabyte-pytorch==0.2.1 is the oracle and not installed"
    )
    ours = make(CASES["two-rotary"])
    theirs = package.MEGABYTE(**CASES["two-rotary"]).double().eval()
    theirs.load_state_dict(ours.state_dict())
    prime = torch.randint(16, (2, 3))
    for settings in ({}, {"filter_thres": 0.5, "temperature": 0.7}):
        torch.manual_seed(11)
        expected = theirs.generate(prime, **settings)
        torch.manual_seed(11)
        assert torch.equal(ours.generate(prime, **settings), expected)
    torch.manual_seed(12)
    expected = theirs.generate(default_batch_size=3)
    torch.manual_seed(12)
    assert torch.equal(ours.generate(default_batch_size=3), expected)


def test_seed_repeats_and_another_differs() -> None:
    model = make(CASES["two"])

    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(default_batch_size=4, generator=generator, filter_thres=0.0)

    assert torch.equal(draw(5), draw(5))
    assert not torch.equal(draw(5), draw(6))


def test_cold_draws_are_greedy() -> None:
    model = make(CASES["two"])
    assert torch.equal(model.generate(temperature=1e-9), model.generate(temperature=0))


def test_shorter_and_streamed() -> None:
    model = make(CASES["two"])
    prime = torch.tensor([[3, 1, 4]])
    part = model.generate(prime, temperature=0, seq_len=11)
    assert part.shape == (1, 11)
    assert torch.equal(part, model.generate(prime, temperature=0).flatten(1)[:, :11])
    stream = torch.stack(list(model.generate_tokens(prime, temperature=0, seq_len=11)), dim=1)
    assert torch.equal(stream, part[:, 3:])
    assert torch.equal(model.generate(prime, seq_len=3), prime)


def test_mode_and_gradients_are_left_alone() -> None:
    model = make({**CASES["two"], "ff_dropout": 0.5, "attn_dropout": 0.5}).train()
    greedy = model.generate(temperature=0)
    assert model.training
    assert torch.equal(greedy, model.generate(temperature=0))  # no dropout
    stream = model.generate_tokens()
    next(stream)
    assert not model.training
    assert torch.is_grad_enabled()
    stream.close()
    assert model.training


def test_autocast() -> None:
    model = make(CASES["two-rotary"], torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = model.generate(temperature=0)
    assert tokens.shape == (1, *model.max_seq_len)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"prime": torch.zeros(1, 2, 4, dtype=torch.long)}, ValueError, "prime must be flat"),
        ({"prime": torch.zeros(1, 2)}, TypeError, "prime must be integers"),
        ({"prime": torch.full((1, 2), 16)}, ValueError, "prime must be from 0"),
        ({"prime": torch.zeros(1, 21, dtype=torch.long)}, ValueError, "prime must have at most 20"),
        ({"seq_len": 21}, ValueError, "seq_len .* from 0 .* to 20"),
        ({"prime": torch.zeros(1, 4, dtype=torch.long), "seq_len": 3}, ValueError, "from 4"),
        ({"temperature": -1.0}, ValueError, "temperature must be 0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be 0"),
        ({"filter_thres": 1.5}, ValueError, "filter_thres must be a share"),
        ({"default_batch_size": -1}, ValueError, "default_batch_size must be at least 0"),
    ],
)
def test_generate_refuses(settings: dict, error: type[Exception], words: str) -> None:
    model = make(CASES["two"])
    with pytest.raises(error, match=words):
        model.generate(**settings)
    with pytest.raises(error, match=words):  # at the call, not at the first token
        model.generate_tokens(**settings)


def test_a_token_is_one_position_of_the_finest_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts what decoding sends to attention: no query is ever sent twice, none is missing."""
    options = CASES["three-everything"]
    model = make(options)
    queries = 0

    def counting(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **rest: object) -> object:
        nonlocal queries
        queries += q.shape[2]
        return hk.attention(q, k, v, **rest)

    class Counting:
        attention = staticmethod(counting)
        rotary = staticmethod(hk.rotary)

    monkeypatch.setattr(megabyte, "hk", Counting)
    monkeypatch.setattr(megabyte_decoder, "hk", Counting)
    model.generate(temperature=0)
    coarse, middle, fine = options["max_seq_len"]
    # A stage runs the start token of each row and its patches; of the last, nothing is asked in
    # the stages above the finest. The last token is drawn and never read, and the very first
    # distribution comes from the start tokens alone.
    positions = (coarse, coarse * middle, coarse * middle * (fine + 1) - 1)
    expected = sum(d * (n + 1) for d, n in zip(options["depth"], positions, strict=True))
    assert queries == expected


def test_tokens_are_ordinary_tensors() -> None:
    """Not of inference mode: they can be trained on."""
    model = make(CASES["two"])
    for settings in ({"temperature": 0}, {"temperature": 1.0}):
        tokens = model.generate(**settings)
        assert not tokens.is_inference()
        assert not next(model.generate_tokens(**settings)).is_inference()
        model(tokens, return_loss=True).backward()


DEFAULT = MODELS["megabyte"]
TIMED = {
    "default": DEFAULT.options,
    "larger": {**DEFAULT.options, "dim": (384, 256), "depth": (4, 2)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMED)
def test_ten_times_faster_than_recomputing(name: str) -> None:
    """512 tokens on one core, in processor time so that a busy machine does not matter.

    The cost of recomputing is the sum over lengths of one forward pass, which grows linearly but
    for steps of a patch: eight lengths stand for 512.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = DEFAULT.make(TIMED[name]).eval()
        ids = torch.randint(256, (1, 512))
        model.generate(seq_len=64)
        cached, recomputed = [], []
        for _ in range(2):  # the better of two: what else runs here slows either
            began = time.process_time()
            model.generate(temperature=0)
            cached.append(time.process_time() - began)
            began = time.process_time()
            with torch.no_grad():
                for length in range(32, 512, 64):
                    model(ids[:, :length])
            recomputed.append((time.process_time() - began) * 512 / 8)
    finally:
        torch.set_num_threads(threads)
    assert min(recomputed) > 10 * min(cached), f"{recomputed} s against {cached} s"
