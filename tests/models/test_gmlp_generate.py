"""gMLPGPT's generation: caches give what recomputing gives, draws are upstream's, steps small."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from python_models import AutoregressiveWrapper, gMLPGPT
from python_models.gmlp_decoder import Decoder

SMALL = {"num_tokens": 16, "dim": 12, "depth": 2, "seq_len": 24, "heads": 2, "ff_mult": 2}
CASES = {
    "global": SMALL,
    "global-attention-gelu": {**SMALL, "attn_dim": 5, "act": nn.GELU()},
    "windowed": {**SMALL, "window": (5, 3)},
    "windowed-attention": {**SMALL, "window": 5, "attn_dim": (4, 3)},
    "windowed-attention-quirks": {**SMALL, "window": 5, "attn_dim": 4, "upstream_quirks": True},
    "axial-attention": {**SMALL, "window": ((4, 1), (3, 2)), "attn_dim": (8, 6)},
    "axial-quirks": {
        **SMALL,
        "window": ((4, 5), (None, 3)),
        "attn_dim": (8, 6),
        "upstream_quirks": True,
    },
    "more-classes-than-tokens": {**SMALL, "seq_len": 6, "window": ((2, 9), (None, 7))},
    "window-of-one-token": {**SMALL, "window": (1, 23), "attn_dim": 2},
    "reversible": {
        **SMALL,
        "depth": 3,
        "window": ((4, 3), None, 6),
        "attn_dim": 4,
        "reversible": True,
        "prob_survival": 0.3,
        "act": nn.PReLU(init=0.2),
    },
}


def make(options: dict, dtype: torch.dtype = torch.float64) -> gMLPGPT:
    torch.manual_seed(1)
    model = gMLPGPT(**options).to(dtype).eval()
    with torch.no_grad():  # mixing begins near 0: then tokens would hardly depend on others
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model


def make_ids(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(16, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("case", CASES)
def test_decoder_gives_the_logits_of_forward(case: str) -> None:
    """Prompts of every length, then token by token; and several tokens at once after a prompt."""
    model = make(CASES[case])
    total = model.seq_len
    ids = make_ids(total)
    with torch.no_grad():
        expected = model(ids)
        for prompt in range(1, total + 1):
            decoder = Decoder(model)
            got = [decoder.append(ids[:, :prompt])]
            got += [decoder.append(ids[:, n : n + 1]) for n in range(prompt, total)]
            torch.testing.assert_close(
                torch.stack(got, dim=1), expected[:, prompt - 1 :], rtol=0, atol=1e-11
            )
        decoder = Decoder(model)
        decoder.append(ids[:, :2])
        torch.testing.assert_close(decoder.append(ids[:, 2:]), expected[:, -1], rtol=0, atol=1e-11)
        for size in (0, 1):
            with pytest.raises(ValueError, match=r"1 to 0 tokens .* got"):
                decoder.append(ids[:, :size])


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_do_not_depend_on_the_cache(case: str) -> None:
    """Prompts from one token to more than the model holds; generation to beyond its end."""
    wrapper = AutoregressiveWrapper(make(CASES[case]))
    limit = wrapper.max_seq_len
    drawn: set[int] = set()
    for length, count in ((1, limit + 3), (limit // 2, limit // 2), (limit, 3), (limit + 4, 2)):
        start = make_ids(length, batch=3)
        cached = wrapper.generate(start, count, temperature=0)
        assert cached.shape == (3, count)
        assert torch.equal(cached, wrapper.generate(start, count, temperature=0, use_cache=False))
        drawn.update(cached.flatten().tolist())
    assert len(drawn) > 2, "a model that always says the same tests nothing"


def test_draws_are_those_of_upstream() -> None:
    """Past the end of the model too, for flat prompts, and with an end token."""
    package = pytest.importorskip(
        "g_mlp_gpt", reason="g-mlp-gpt==0.0.15 is the oracle and not installed"
    )
    from g_mlp_gpt.autoregressive_wrapper import AutoregressiveWrapper as Upstream

    options = CASES["axial-attention"]
    ours = gMLPGPT(**options, upstream_quirks=True).double()
    ours.load_state_dict(make(options).state_dict())
    theirs = package.gMLPGPT(**options).double()
    theirs.load_state_dict(ours.state_dict())
    ours, theirs = AutoregressiveWrapper(ours), Upstream(theirs)
    for start, settings in (
        (make_ids(3), {}),
        (make_ids(20), {"filter_thres": 0.5, "temperature": 0.7}),
        (make_ids(4)[0], {}),
        (make_ids(2, batch=1), {"eos_token": 5, "filter_thres": 0.0}),
    ):
        torch.manual_seed(11)
        expected = theirs.generate(start, 30, **settings)
        torch.manual_seed(11)
        assert torch.equal(ours.generate(start, 30, **settings), expected)
    assert expected.shape[1] < 30, "the end token should have come"


def test_own_filter_and_generator() -> None:
    wrapper = AutoregressiveWrapper(make(CASES["windowed"]))
    start = make_ids(4)

    def only_seven(logits: torch.Tensor, thres: float) -> torch.Tensor:
        assert thres == 0.25
        return torch.full_like(logits, -torch.inf).index_fill(-1, torch.tensor(7), 0.0)

    drawn = wrapper.generate(start, 5, filter_logits_fn=only_seven, filter_thres=0.25)
    assert torch.equal(drawn, torch.full((2, 5), 7))

    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return wrapper.generate(start, 20, generator=generator, filter_thres=0.0)

    assert torch.equal(draw(5), draw(5))
    assert not torch.equal(draw(5), draw(6))


def test_streamed_and_mode_left_alone() -> None:
    wrapper = AutoregressiveWrapper(make(CASES["reversible"])).train()
    start = make_ids(4)
    greedy = wrapper.generate(start, 9, temperature=0)
    assert wrapper.training
    assert wrapper.net.training
    assert torch.equal(greedy, wrapper.generate(start, 9, temperature=0))  # no layer dropout
    stream = wrapper.generate_tokens(start, 9, temperature=0)
    assert torch.equal(next(stream), greedy[:, 0])
    assert not wrapper.net.training
    assert torch.is_grad_enabled()
    stream.close()
    assert wrapper.net.training
    assert wrapper.generate(start, 0).shape == (2, 0)


def test_autocast() -> None:
    wrapper = AutoregressiveWrapper(make(CASES["axial-attention"], torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = wrapper.net(make_ids(24))
        decoder = Decoder(wrapper.net)
        with torch.no_grad():
            steps = [decoder.append(make_ids(24)[:, n : n + 1]) for n in range(24)]
        assert wrapper.generate(make_ids(3), 12).shape == (2, 12)
    exact = wrapper.net(make_ids(24))
    error = (logits.float() - exact).abs().max()
    assert (torch.stack(steps, dim=1).float() - exact).abs().max() <= 2 * error


def flops_of_steps(options: dict, batch: int = 3) -> list[int]:
    """Multiplications and additions of matrix products, for each token after the first."""
    model = make(options)
    ids = make_ids(model.seq_len, batch)
    counts = []
    with torch.no_grad():
        decoder = Decoder(model)
        decoder.append(ids[:, :1])
        for n in range(1, model.seq_len):
            with FlopCounterMode(display=False) as counter:
                decoder.append(ids[:, n : n + 1])
            counts.append(counter.get_total_flops())
    return counts


def test_a_token_costs_one_row_of_the_mixing_matrix() -> None:
    batch, channels, depth = 3, 12, 2
    counts = flops_of_steps(SMALL, batch)
    growth = {b - a for a, b in pairwise(counts)}
    assert growth == {2 * batch * channels * depth}  # one more row of gates, nothing else
    pointwise = 2 * batch * (depth * (12 * 24 + 12 * 12) + 12 * 16)
    assert counts[0] == pointwise + 2 * 2 * batch * channels * depth

    w = 5
    windowed = flops_of_steps({**SMALL, "window": w}, batch)
    assert windowed[w:] == windowed[:-w]
    assert max(windowed) == pointwise + 2 * w * 2 * batch * channels * depth


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"start_tokens": [1]}, TypeError, "start_tokens must be a tensor"),
        ({"start_tokens": torch.zeros(1, 2)}, TypeError, "start_tokens must be integers"),
        ({"start_tokens": make_ids(0)}, ValueError, "start_tokens must have at least one token"),
        ({"start_tokens": torch.full((1, 2), 16)}, ValueError, "start_tokens must be from 0 to"),
        ({"start_tokens": make_ids(4)[None]}, ValueError, r"start_tokens must be \(batch, tokens"),
        ({"seq_len": -1}, ValueError, "seq_len must be at least 0"),
        ({"seq_len": 2.0}, TypeError, "seq_len must be an integer"),
        ({"temperature": -1.0}, ValueError, "temperature must be 0"),
        ({"filter_thres": 1.5}, ValueError, "filter_thres must be a share"),
    ],
)
def test_generate_refuses(settings: dict, error: type[Exception], words: str) -> None:
    wrapper = AutoregressiveWrapper(make(SMALL))
    arguments = {"start_tokens": make_ids(3), "seq_len": 4, **settings}
    for function in (wrapper.generate, wrapper.generate_tokens):  # at the call, not at the token
        with pytest.raises(error, match=words):
            function(**arguments)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 128])
def test_many_times_faster_than_recomputing(window: int | None) -> None:
    """512 tokens on one core, in processor time so that a busy machine does not matter."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = gMLPGPT(num_tokens=257, dim=256, depth=6, seq_len=512, heads=4, window=window)
        wrapper = AutoregressiveWrapper(model)
        start = torch.randint(256, (1, 1))
        wrapper.generate(start, 32, temperature=0)
        began = time.process_time()
        wrapper.generate(start, 511, temperature=0)
        cached = time.process_time() - began
        ids = torch.randint(256, (1, 512))
        began = time.process_time()
        with torch.no_grad():
            for length in range(32, 512, 64):  # the sum over lengths grows linearly: 8 stand for it
                model(ids[:, :length])
        recomputed = (time.process_time() - began) * 511 / 8
    finally:
        torch.set_num_threads(threads)
    assert recomputed > 5 * cached, f"{recomputed:.2f} s against {cached:.2f} s"
