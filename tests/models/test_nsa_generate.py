"""Decoding with caches gives what all tokens at once give; sampling; and it is quick."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn

from python_models import NSATransformer, SparseAttention
from python_models.nsa_cache import Tokens

SMALL: dict[str, Any] = {"num_tokens": 16, "dim": 24, "depth": 2, "dim_head": 8, "heads": 4}
OVERLAP = {
    "sliding_window_size": 5,
    "compress_block_size": 5,
    "compress_block_sliding_stride": 2,
    "selection_block_size": 8,
    "num_selected_blocks": 2,
}
SPARSE: dict[str, Any] = {"use_sparse_attn": True, "kv_heads": 2}
CASES: dict[str, dict[str, Any]] = {
    "seed": {"use_sparse_attn": True},
    "overlap": {**SPARSE, "sparse_attn_kwargs": OVERLAP},
    "own-selection-of-heads": {
        **SPARSE,
        "sparse_attn_kwargs": {**OVERLAP, "query_heads_share_selected_kv": False},
    },
    "diff-topk": {**SPARSE, "sparse_attn_kwargs": {**OVERLAP, "use_diff_topk": True}},
    "no-selection-no-memory": {
        **SPARSE,
        "sparse_attn_kwargs": {**OVERLAP, "num_selected_blocks": 0, "num_compressed_mem_kv": 0},
    },
    "paper": {
        **SPARSE,
        "preset": "paper",
        "sparse_attn_kwargs": {**OVERLAP, "compress_block_size": 4, "num_selected_blocks": 4},
    },
    "dense": {"kv_heads": 2},
}
TOTAL = 43


def make(case: str, dtype: torch.dtype = torch.float64, **change: Any) -> NSATransformer:
    torch.manual_seed(2)
    model = NSATransformer(**{**SMALL, **CASES[case], **change})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.to(dtype).eval()


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "with-gradients"])
@pytest.mark.parametrize("case", CASES)
def test_cached_logits_are_those_of_all_tokens_at_once(case: str, grad: bool) -> None:
    """Token by token from the first one, and in pieces of every kind."""
    model = make(case)
    ids = torch.randint(16, (2, TOTAL))
    with torch.set_grad_enabled(grad):
        expected = model(ids)
        for pieces in ([1] * TOTAL, [TOTAL - 1, 1], [7, 1, 20, 3, 12], [0, 8, 8, 27]):
            cache, read = None, 0
            for size in pieces:
                logits, cache = model(ids[:, : read + size], cache=cache, return_cache=True)
                torch.testing.assert_close(
                    logits, expected[:, read : read + size], rtol=0, atol=1e-12
                )
                read += size


def test_a_new_token_alone_and_a_cache_used_twice() -> None:
    """As upstream's callers may; continuing a cache never changes what it was."""
    model = make("overlap")
    ids = torch.randint(16, (2, TOTAL))
    with torch.no_grad():
        expected = model(ids)
        _, cache = model(ids[:, :-3], return_cache=True)
        for _ in range(2):
            branch = cache
            other = (ids[:, -3:-2] + 1) % 16
            model(other, cache=cache, return_cache=True)  # another continuation, in between
            for n in range(TOTAL - 3, TOTAL):
                logits, branch = model(ids[:, n : n + 1], cache=branch, return_cache=True)
                torch.testing.assert_close(logits[:, 0], expected[:, n], rtol=0, atol=1e-12)


def test_rows_of_a_cache() -> None:
    model = make("paper")
    ids = torch.randint(16, (3, TOTAL))
    rows = torch.tensor([2, 0, 2, 1])
    with torch.no_grad():
        _, cache = model(ids[:, :-1], return_cache=True)
        chosen = [layer.select(rows) for layer in cache]
        logits = model(ids[rows, -1:], cache=chosen)
        torch.testing.assert_close(logits[:, 0], model(ids)[rows, -1], rtol=0, atol=1e-12)


def test_tokens_share_their_buffer_until_they_part() -> None:
    start = Tokens(torch.zeros(1, 1, 3, 2))
    one = start.append(torch.ones(1, 1, 1, 2))
    two = one.append(torch.full((1, 1, 1, 2), 2.0))
    assert two.values.data_ptr() == one.values.data_ptr()
    other = one.append(torch.full((1, 1, 1, 2), 3.0))
    assert other.values.data_ptr() != one.values.data_ptr()
    assert two.values[0, 0, :, 0].tolist() == [0, 0, 0, 1, 2]
    assert other.values[0, 0, :, 0].tolist() == [0, 0, 0, 1, 3]


def test_gradients_through_a_cache() -> None:
    model = make("overlap")
    ids = torch.randint(16, (2, TOTAL))
    whole = torch.autograd.grad(model(ids).square().mean(), model.token_emb.weight)[0]
    first, cache = model(ids[:, :20], return_cache=True)
    logits = torch.cat((first, model(ids, cache=cache)), dim=1)
    pieces = torch.autograd.grad(logits.square().mean(), model.token_emb.weight)[0]
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-12)


def upstream_layer(**options: Any) -> nn.Module:
    package = pytest.importorskip(
        "native_sparse_attention_pytorch",
        reason="native-sparse-attention-pytorch==0.2.3 is the oracle and not installed",
    )
    torch.manual_seed(4)
    layer = package.SparseAttention(**options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    return layer


def test_cached_steps_of_upstream() -> None:
    """The quirk: without a compressed token, its cached steps lose the memory tokens too."""
    options = {"dim": 24, "dim_head": 8, "heads": 4, "kv_heads": 2, "causal": True, **OVERLAP}
    theirs = upstream_layer(**options)
    quirk = SparseAttention(**options, upstream_quirks=True).double()
    mine = SparseAttention(**options).double()
    for layer in (quirk, mine):
        layer.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 30, 24, dtype=torch.float64)
    for prefill in (1, 3, 10):
        with torch.no_grad():
            caches = [layer(x[:, :prefill], return_cache=True)[1] for layer in (theirs, quirk)]
            for n in range(prefill, 30):
                new = x[:, n : n + 1]
                expected, caches[0] = theirs(new, cache=caches[0], return_cache=True)
                out, caches[1] = quirk(new, cache=caches[1], return_cache=True)
                torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)
                meant = mine(x[:, : n + 1])[:, -1:]
                # One token is before the first window's end, at which only the quirk differs.
                assert torch.allclose(out, meant, rtol=0, atol=1e-9) == (prefill > 1 or n > 1)


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_do_not_depend_on_the_cache(case: str) -> None:
    model = make(case)
    for length in (1, 6, 17):
        prompt = torch.randint(16, (3, length), generator=torch.Generator().manual_seed(length))
        cached = model.sample(prompt, 40, temperature=0.0, use_cache_kv=True)
        assert cached.shape == (3, 40 - length)
        assert torch.equal(cached, model.sample(prompt, 40, temperature=0.0))


def test_draws_are_those_of_upstream() -> None:
    package = pytest.importorskip(
        "native_sparse_attention_pytorch.transformer",
        reason="native-sparse-attention-pytorch==0.2.3 is the oracle and not installed",
    )
    ours = make("overlap")
    theirs = package.Transformer(**SMALL, **CASES["overlap"]).double().eval()
    theirs.load_state_dict(ours.state_dict())
    prompt = torch.randint(16, (2, 9))
    for settings in ({}, {"filter_thres": 0.5, "temperature": 0.7}, {"temperature": 0.0}):
        for cached in (False, True):
            torch.manual_seed(5)
            expected = theirs.sample(prompt, 20, use_cache_kv=cached, **settings)
            torch.manual_seed(5)
            got = ours.sample(prompt, 20, use_cache_kv=cached, **settings)
            assert torch.equal(got, expected)


def test_sampling_and_the_mode() -> None:
    model = make("seed").train()
    prompt = torch.randint(16, (1, 3))
    generator = torch.Generator().manual_seed(1)
    first = model.sample(prompt, 9, generator=generator)
    assert torch.equal(first, model.sample(prompt, 9, generator=generator.manual_seed(1)))
    assert not first.is_inference() and model.training
    assert model.sample(prompt, 2).shape == (1, 0)
    stream = model.sample_tokens(prompt, 3)
    next(stream)
    assert not model.training
    stream.close()
    assert model.training


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"prompt": torch.zeros(1, 2)}, TypeError, "prompt must be integers"),
        ({"prompt": torch.full((1, 2), 16)}, ValueError, "prompt must be from 0"),
        ({"prompt": torch.zeros(1, 0, dtype=torch.long)}, ValueError, "one token or more"),
        ({"seq_len": -1}, ValueError, "seq_len must be at least 0"),
        ({"temperature": float("inf")}, ValueError, "temperature must be 0"),
        ({"filter_thres": 1.5}, ValueError, "filter_thres must be a share"),
    ],
)
def test_sample_refuses(settings: dict, error: type[Exception], words: str) -> None:
    arguments = {"prompt": torch.zeros(1, 2, dtype=torch.long), "seq_len": 5, **settings}
    with pytest.raises(error, match=words):
        make("seed").sample(**arguments)


TIMED = {
    "seed": {"use_sparse_attn": True},
    "overlap": {
        "use_sparse_attn": True,
        "kv_heads": 2,
        "sparse_attn_kwargs": {
            "sliding_window_size": 64,
            "compress_block_size": 16,
            "compress_block_sliding_stride": 8,
            "selection_block_size": 16,
            "num_selected_blocks": 4,
        },
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMED)
def test_five_times_faster_than_recomputing(name: str) -> None:
    """1024 tokens on one core, in processor time so that a busy machine does not matter.

    The cost of recomputing is the sum over lengths of one forward pass; sixteen lengths, spread
    evenly, stand for 1024.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = NSATransformer(257, 256, 4, dim_head=64, heads=4, **TIMED[name]).eval()
        prompt = torch.randint(256, (1, 1))
        model.sample(prompt, 64, temperature=0.0, use_cache_kv=True)
        ids = torch.randint(256, (1, 1024))
        cached, recomputed = [], []
        for _ in range(2):  # the better of two: what else runs here slows either
            began = time.process_time()
            model.sample(prompt, 1024, temperature=0.0, use_cache_kv=True)
            cached.append(time.process_time() - began)
            began = time.process_time()
            with torch.no_grad():
                for length in range(32, 1024, 64):
                    model(ids[:, :length])
            recomputed.append((time.process_time() - began) * 1024 / 16)
    finally:
        torch.set_num_threads(threads)
    ratio = min(recomputed) / min(cached)
    print(f"{name}: cached {min(cached):.2f} s, recomputed {min(recomputed):.2f} s, {ratio:.1f}x")
    assert ratio > 5, f"{recomputed} s against {cached} s"
