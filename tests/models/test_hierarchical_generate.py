"""HierarchicalTransformer's generation: caches give what recomputing gives, steps are small."""

from __future__ import annotations

import time
import warnings

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from python_models import HierarchicalTransformer
from python_models.hierarchical_decoder import Decoder

ONE = {"num_tokens": 16, "dim": 16, "depth": 2, "seq_len": 24, "dim_head": 8, "heads": 2}
TWO = {**ONE, "dim": (16, 24), "hierarchies": (1, 4), "window_sizes": (4, None)}
THREE = {**ONE, "hierarchies": (2, 1, 8), "hierarchical_stride": (2, 1, 4)}
CASES: dict[str, dict] = {
    "one": ONE,
    "one-windowed": {**ONE, "window_sizes": 3},
    "one-compressed": {**ONE, "hierarchies": 4, "window_sizes": 2},
    "two": TWO,
    "two-strides": {**TWO, "hierarchical_stride": (1, 2), "window_sizes": (None, 2)},
    "stride-is-factor": {**TWO, "hierarchical_stride": (1, 4)},
    "three-sizes": {
        **THREE, "dim": (24, 16, 10), "heads": (1, 3, 2), "dim_head": (4, 8, 6),
        "window_sizes": (3, 0, None),
    },
    "merge-all": {**THREE, "hierarchy_merge_all": True, "window_sizes": (1, 6, 3)},
    "predict-all": {**THREE, "predict_use_all_hierarchy": True},
    "strided": {
        **ONE, "hierarchies": (2, 4), "hierarchical_stride": (2, 4), "hierarchy_merge_all": True,
    },
    "strided-predict-all": {
        **ONE, "hierarchies": (2, 8), "hierarchical_stride": (2, 4), "hierarchy_merge_all": True,
        "predict_use_all_hierarchy": True, "window_sizes": (5, 1),
    },
    "factor-above-length": {**ONE, "hierarchies": (1, 32), "hierarchical_stride": (1, 8)},
    "no-layers": {**TWO, "depth": 0},
}  # fmt: skip


def make(options: dict, dtype: torch.dtype = torch.float64) -> HierarchicalTransformer:
    torch.manual_seed(1)
    model = HierarchicalTransformer(**options).to(dtype).eval()
    with torch.no_grad():  # tokens that matter: no gain at 1, no bias at 0
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


def make_ids(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(16, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("ablate", [False, True], ids=["merged", "ablated"])
@pytest.mark.parametrize("case", CASES)
def test_decoder_gives_the_logits_of_forward(case: str, ablate: bool) -> None:
    """Prompts of several lengths, then token by token, and several tokens at once."""
    model = make(CASES[case])
    ids = make_ids(24)
    expected = [model(ids[:, :n], ablate_hierarchical_merge=ablate)[:, -1] for n in range(1, 25)]
    with torch.no_grad():
        for prompt in (1, 2, 3, 4, 7, 16, 23):
            decoder = model.decoder(ablate_hierarchical_merge=ablate)
            got = [decoder.append(ids[:, :prompt])]
            got += [decoder.append(ids[:, n : n + 1]) for n in range(prompt, 24)]
            torch.testing.assert_close(
                torch.stack(got), torch.stack(expected[prompt - 1 :]), rtol=0, atol=1e-10
            )
        decoder = model.decoder(ablate_hierarchical_merge=ablate)
        for first, last in ((0, 5), (5, 6), (6, 13), (13, 24)):
            logits = decoder.append(ids[:, first:last])
            torch.testing.assert_close(logits, expected[last - 1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prompt", [1, 30])  # shorter than seq_len, and longer
def test_greedy_is_that_of_recomputing(case: str, prompt: int) -> None:
    """Beyond seq_len too, where the newest tokens count; of several prompts at once."""
    model = make(CASES[case])
    ids = make_ids(prompt, batch=3)
    sequence = ids
    with torch.no_grad():
        for _ in range(30):
            token = model(sequence[:, -24:])[:, -1].argmax(-1)
            sequence = torch.cat((sequence, token[:, None]), dim=1)
    expected = sequence[:, prompt:]
    assert len(expected.unique()) > 2
    assert torch.equal(model.generate(ids, 30, temperature=0), expected)
    assert torch.equal(model.generate(ids, 30, temperature=0, use_cache=False), expected)
    for row in range(3):
        alone = model.generate(ids[row : row + 1], 30, temperature=0)
        assert torch.equal(alone[0], expected[row])


def test_ablated_merge_reaches_generation() -> None:
    model, ids = make(TWO), make_ids(5)
    cached, computed = (
        model.generate(ids, 30, temperature=0, ablate_hierarchical_merge=True, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(cached, computed)
    assert not torch.equal(cached, model.generate(ids, 30, temperature=0))


def test_draws_are_upstreams() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        package = pytest.importorskip(
            "simple_hierarchical_transformer",
            reason="simple-hierarchical-transformer==0.2.0 is the oracle and not installed",
        )
    ours = make(TWO)
    theirs = package.HierarchicalTransformer(**TWO).double()
    theirs.load_state_dict(ours.state_dict())
    ids = make_ids(4)
    for settings in ({}, {"temperature": 0.7, "filter_thres": 0.5}):
        torch.manual_seed(9)
        expected = theirs.generate(ids, 30, **settings)
        torch.manual_seed(9)
        assert torch.equal(ours.generate(ids, 30, **settings), expected)
        generator = torch.Generator().manual_seed(9)
        assert torch.equal(ours.generate(ids, 30, generator=generator, **settings), expected)


def test_streamed_and_mode_left_alone() -> None:
    model = make(TWO).train()
    ids = make_ids(4)
    greedy = model.generate(ids, 9, temperature=0)
    assert model.training
    stream = model.generate_tokens(ids, 9, temperature=0)
    assert torch.equal(next(stream), greedy[:, 0])
    assert not model.training
    assert torch.is_grad_enabled()
    stream.close()
    assert model.training
    assert model.generate(ids, 0).shape == (2, 0)
    assert model.generate(make_ids(4, batch=0), 3).shape == (0, 3)


def test_autocast() -> None:
    model = make(TWO, torch.float32)
    ids = make_ids(24)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        logits = model(ids)
        decoder = Decoder(model)
        steps = [decoder.append(ids[:, n : n + 1]) for n in range(24)]
        assert model.generate(make_ids(3), 12).shape == (2, 12)
    exact = model(ids)
    error = (logits.float() - exact).abs().max()
    assert (torch.stack(steps, dim=1).float() - exact).abs().max() <= 2 * error


def test_a_token_costs_its_own_place_in_the_hierarchies_that_have_one() -> None:
    options = {**TWO, "window_sizes": (4, 0), "hierarchical_stride": (1, 4), "depth": 1}
    model = make(options)
    ids = make_ids(24, batch=1)
    counts = []
    with torch.no_grad():
        decoder = Decoder(model)
        decoder.append(ids[:, :1])
        for n in range(1, 24):
            with FlopCounterMode(display=False) as counter:
                decoder.append(ids[:, n : n + 1])
            counts.append(counter.get_total_flops())
    # Products with weights alone are counted. 5 is no place of the second hierarchy, 4 is.
    attention, feed_forward, merge = 16 * 48 + 16 * 16, 2 * 16 * 64, 40 * 32 + 32 * 16
    compression, coarse_feed_forward = 4 * 24 * 96 + 96 * 24, 2 * 24 * 96
    fine = 2 * (24 * 16 + attention + feed_forward + merge + 16 * 16)
    coarse = 2 * (compression + coarse_feed_forward)
    assert counts == [fine + (coarse if n % 4 == 0 else 0) for n in range(1, 24)]


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"prompt": [1]}, TypeError, "prompt must be a tensor"),
        ({"prompt": torch.zeros(1, 2)}, TypeError, "prompt must be integers"),
        ({"prompt": make_ids(0)}, ValueError, "prompt must have at least one token"),
        ({"prompt": torch.full((1, 2), 16)}, ValueError, "prompt must be from 0 to"),
        ({"prompt": make_ids(4)[0]}, ValueError, r"prompt must be \(batch, tokens\)"),
        ({"seq_len": -1}, ValueError, "seq_len must be at least 0"),
        ({"seq_len": 2.0}, TypeError, "seq_len must be an integer"),
        ({"temperature": -1.0}, ValueError, "temperature must be 0"),
        ({"filter_thres": 1.5}, ValueError, "filter_thres must be a share"),
        ({"top_k": 3}, TypeError, "top_k"),
    ],
)
def test_generate_refuses(settings: dict, error: type[Exception], words: str) -> None:
    model = make(TWO)
    arguments = {"prompt": make_ids(3), "seq_len": 4, **settings}
    for function in (model.generate, model.generate_tokens):  # at the call, not at the token
        with pytest.raises(error, match=words):
            function(**arguments)


def test_decoder_refuses_what_does_not_fit() -> None:
    decoder = make(TWO).decoder()
    with torch.no_grad():
        with pytest.raises(ValueError, match="ids must have 1 to 24 tokens"):
            decoder.append(make_ids(25))
        decoder.append(make_ids(20))
        for length in (0, 5):
            with pytest.raises(ValueError, match="ids must have 1 to 4 tokens a sequence, up to"):
                decoder.append(make_ids(length))


@pytest.mark.slow
def test_many_times_faster_than_recomputing() -> None:
    """512 tokens on one core, in processor time so that a busy machine does not matter."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = HierarchicalTransformer(
            num_tokens=257, dim=(128, 256), depth=3, seq_len=512, heads=4, hierarchies=(1, 4),
            window_sizes=(64, None),
        )  # fmt: skip
        start = torch.randint(256, (1, 1))
        model.generate(start, 32, temperature=0)
        began = time.process_time()
        model.generate(start, 511, temperature=0)
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
