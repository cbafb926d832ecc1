"""Memformer's generation: caches give what recomputing gives, and a token costs a token's work."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import hierkernels as hk
from python_models import Memformer
from python_models.memformer_decoder import Conditioned, Decoder

SMALL = {
    "dim": 16, "num_memory_slots": 5, "mem_update_attn_heads": 4,
    "enc_num_tokens": 13, "enc_max_seq_len": 8, "enc_depth": 1, "enc_heads": 2,
    "dec_num_tokens": 11, "dec_max_seq_len": 12, "dec_depth": 2, "dec_heads": 4,
}  # fmt: skip
CASES = {
    "two-layers": SMALL,
    "quirks": {**SMALL, "upstream_quirks": True},
    "one-head-of-many-channels": {**SMALL, "dec_heads": 1, "num_mem_updates": 2},
    "far-apart": {**SMALL, "dec_max_seq_len": 150, "dec_depth": 1},
    "one-token": {**SMALL, "dec_max_seq_len": 1},
    "no-layers": {**SMALL, "dec_depth": 0},
}


def make(options: dict, dtype: torch.dtype = torch.float64) -> Memformer:
    torch.manual_seed(1)
    model = Memformer(**options).to(dtype).eval()
    with torch.no_grad():  # larger than at first: tokens depend on those before
        for p in (p for p in model.parameters() if p.ndim > 1):
            p.add_(torch.randn_like(p), alpha=0.3)
    return model


def make_ids(count: int, length: int, batch: int = 3) -> Tensor:
    return torch.randint(count, (batch, length), generator=torch.Generator().manual_seed(length))


SRC_MASK = torch.arange(7) < torch.tensor([[7], [2], [0]])


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("case", CASES)
def test_decoder_gives_the_logits_of_forward(case: str, masked: bool) -> None:
    """Token by token after prompts of several lengths, and several tokens at once."""
    model = make(CASES[case])
    net, total = model.decoder.net, model.decoder.net.max_seq_len
    mask = SRC_MASK if masked else None
    ids = make_ids(11, total)
    with torch.no_grad():
        context = model.encode(make_ids(13, 7), src_mask=mask).enc_out
        expected = net(ids, context, context_mask=mask)
        for prompt in sorted({1, (total + 1) // 2, total}):
            decoder = Decoder(net, context, mask)
            got = [decoder.append(ids[:, :prompt])]
            got += [decoder.append(ids[:, n : n + 1]) for n in range(prompt, total)]
            torch.testing.assert_close(
                torch.stack(got, dim=1), expected[:, prompt - 1 :], rtol=0, atol=1e-11
            )
        if total > 5:
            decoder = Decoder(net, context, mask)
            for first, last in ((0, 2), (2, 5), (5, total)):
                got = decoder.append(ids[:, first:last])
                torch.testing.assert_close(got, expected[:, last - 1], rtol=0, atol=1e-11)
        for size in (0, 1):
            with pytest.raises(ValueError, match=r"1 to 0 tokens .* got"):
                decoder.append(ids[:, :size])


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_do_not_depend_on_the_cache(case: str) -> None:
    """A source of three segments; prompts of one token to more than the decoder looks at."""
    model = make(CASES[case])
    limit = min(model.decoder.net.max_seq_len, 40)
    src = make_ids(13, 20)
    mask = torch.arange(20) < torch.tensor([[20], [17], [9]])
    drawn: set[int] = set()
    for length, count in ((1, limit + 3), (limit, 3), (limit + 4, 2)):
        start = make_ids(11, length)
        settings = {"src_mask": mask, "temperature": 0}
        cached = model.generate(src, start, count, **settings)
        assert cached.shape == (3, count)
        assert torch.equal(cached, model.generate(src, start, count, use_cache=False, **settings))
        drawn.update(cached.flatten().tolist())
    assert len(drawn) > 2 or case == "no-layers", "a model that says the same tests nothing"


def test_a_batch_generates_what_each_sequence_does() -> None:
    model = make(SMALL)
    src, start = make_ids(13, 20), make_ids(11, 3)
    whole = model.generate(src, start, 9, temperature=0)
    for b in range(3):
        alone = model.generate(src[b : b + 1], start[b], 9, temperature=0)
        assert torch.equal(alone, whole[b])


def test_the_memory_reaches_the_decoder() -> None:
    """Segments before the last one, and the memory given, change what is generated."""
    model = make(SMALL)
    src, start = make_ids(13, 20, batch=1), make_ids(11, 2, batch=1)
    tokens = model.generate(src, start, 30, temperature=0)
    mems = model.encode(src[:, 8:16], model.encode(src[:, :8]).mem).mem
    assert torch.equal(model.generate(src[:, 16:], start, 30, mems=mems, temperature=0), tokens)
    other = model.generate(src[:, 16:], start, 30, temperature=0)
    assert not torch.equal(other, tokens)


def test_drawing() -> None:
    """The temperature, the filter, the generator and the end token of AutoregressiveWrapper."""
    model = make(SMALL).train()
    src, start = make_ids(13, 9), make_ids(11, 3)

    def draw(seed: int, **settings: object) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(src, start, 20, generator=generator, **settings)

    free = draw(5, filter_thres=0.0, temperature=2.0)
    assert torch.equal(draw(5, filter_thres=0.0, temperature=2.0), free)
    assert not torch.equal(draw(6, filter_thres=0.0, temperature=2.0), free)
    # Of 11 tokens the best one is left.
    assert torch.equal(draw(5, filter_thres=0.9), model.generate(src, start, 20, temperature=0))
    assert model.training
    end = draw(5, eos_token=int(free[0, 0]), filter_logits_fn=_only(int(free[0, 0])))
    assert torch.equal(end, free[:1, :1].expand(3, 1))
    assert model.generate(src, start, 0).shape == (3, 0)


def _only(token: int) -> object:
    def keep(logits: Tensor, thres: float) -> Tensor:
        return torch.full_like(logits, -torch.inf).index_fill(-1, torch.tensor(token), 0.0)

    return keep


def test_decoder_of_its_own_and_upstreams_error() -> None:
    """``decoder.generate``, which raises upstream, with an encoder's output as its context."""
    model = make(SMALL)
    src, start = make_ids(13, 7), make_ids(11, 3)
    context = model.encode(src, src_mask=SRC_MASK).enc_out.detach()
    got = model.decoder.generate(start, 5, context=context, context_mask=SRC_MASK, temperature=0)
    expected = model.generate(src, start, 5, src_mask=SRC_MASK, temperature=0)
    assert torch.equal(got, expected)
    package = pytest.importorskip("memformer", reason="memformer==0.3.1 is not installed")
    with pytest.raises(TypeError, match="input_mask"):
        package.Memformer(**SMALL).decoder.generate(start, 5, context=context.float())


def test_autocast() -> None:
    model = make(SMALL, torch.float32)
    ids, src = make_ids(11, 12), make_ids(13, 7)
    with torch.no_grad():
        context = model.encode(src).enc_out
        exact = Conditioned(model.decoder.net, context)(ids)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            error = (Conditioned(model.decoder.net, context)(ids).float() - exact).abs().max()
            decoder = Decoder(model.decoder.net, context)
            steps = [decoder.append(ids[:, n : n + 1]) for n in range(12)]
            assert model.generate(src, ids[:, :2], 12).shape == (3, 12)
    assert (torch.stack(steps, dim=1).float() - exact).abs().max() <= 2 * error


def test_a_token_costs_a_token() -> None:
    """The products of a step grow by one key and value a token; the context costs nothing more."""
    model = make({**SMALL, "dec_max_seq_len": 20})
    net, batch, n = model.decoder.net, 3, 7
    counts = []
    with torch.no_grad(), hk.use_backend("reference"):
        decoder = Decoder(net, model.encode(make_ids(13, n)).enc_out)
        for ids in make_ids(11, 20).split(1, dim=1):
            with FlopCounterMode(display=False) as counter:
                decoder.append(ids)
            counts.append(counter.get_total_flops())
    channels, depth = 16, 2
    counts = counts[1:]  # a product with one key is not counted as one
    assert {b - a for a, b in pairwise(counts)} == {2 * 2 * batch * channels * depth}
    layer = (3 + 1 + 2 + 8) * channels * channels + 2 * n * channels
    assert counts[0] == 2 * batch * (depth * (layer + 2 * 2 * channels) + channels * 11)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"src": torch.zeros(3, 4)}, TypeError, "src must be integers"),
        ({"src": make_ids(13, 0)}, ValueError, "src must have at least one token"),
        ({"src_mask": SRC_MASK}, ValueError, r"src_mask must have .* \(3, 9\)"),
        ({"mems": torch.zeros(2, 5, 16)}, ValueError, "mems must have shape"),
        ({"start_tokens": make_ids(11, 0)}, ValueError, "start_tokens must have at least one"),
        ({"start_tokens": torch.full((3, 2), 11)}, ValueError, "start_tokens must be from 0"),
        ({"start_tokens": make_ids(11, 4, batch=2)}, ValueError, "start_tokens .* batch size"),
        ({"start_tokens": make_ids(11, 4)[0]}, ValueError, "start_tokens .* batch size"),
        ({"start_tokens": [1]}, TypeError, "start_tokens must be a tensor"),
        ({"seq_len": -1}, ValueError, "seq_len must be at least 0"),
        ({"temperature": -1.0}, ValueError, "temperature must be 0"),
        ({"filter_thres": 1.5}, ValueError, "filter_thres must be a share"),
        ({"top_k": 5}, TypeError, "top_k"),
    ],
)
def test_generate_refuses(change: dict, error: type[Exception], words: str) -> None:
    given = {"src": make_ids(13, 9), "start_tokens": make_ids(11, 3), "seq_len": 4, **change}
    with pytest.raises(error, match=words):
        make(SMALL, torch.float32).generate(**given)
