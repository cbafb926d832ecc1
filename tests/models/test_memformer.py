"""Memformer against the package that it follows, its defects against what was meant, bad input."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from python_models import Memformer
from python_models.relative_position import RelativePositionBias, diagonal_sums, toeplitz

SMALL = {
    "dim": 16, "num_memory_slots": 5, "mem_update_attn_heads": 4,
    "enc_num_tokens": 13, "enc_max_seq_len": 8, "enc_depth": 2, "enc_heads": 2,
    "dec_num_tokens": 11, "dec_max_seq_len": 8, "dec_depth": 2, "dec_heads": 4,
}  # fmt: skip
CASES = {
    "default-heads": {
        **{name: value for name, value in SMALL.items() if not name.endswith("heads")},
        "enc_depth": 1,
    },
    "two-updates": {**SMALL, "num_mem_updates": 2},
    "no-update": {**SMALL, "num_mem_updates": 0},
    "one-slot": {**SMALL, "num_memory_slots": 1, "dec_depth": 1},
    "no-layers": {**SMALL, "enc_depth": 0, "dec_depth": 0},
    "encoder-only": {**SMALL, "encoder_only": True, "num_mem_updates": 3},
}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def upstream(**options: object) -> nn.Module:
    package = pytest.importorskip(
        "memformer", reason="memformer==0.3.1 is the oracle and not installed"
    )
    return package.Memformer(**options)


def make_ids(count: int, length: int, batch: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(count, (batch, length), generator=generator)


def mask_of(length: int, *real: int) -> Tensor:
    """The first so many tokens of each sequence are real; a negative number: the last so many."""
    mask = torch.arange(length) < torch.tensor(real).abs()[:, None]
    return torch.where(torch.tensor(real)[:, None] < 0, mask.flip(1), mask)


def randomise(model: nn.Module) -> None:
    """So that every part matters, biases and norms too."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.2)


def pair(options: dict, dtype: torch.dtype, **ours_only: object) -> tuple[nn.Module, Memformer]:
    theirs = upstream(**options).to(dtype)
    randomise(theirs)
    ours = Memformer(**options, **ours_only).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


SRC, TGT = 9, 8
# What a segment is given beside src: tgt and masks.
SEGMENTS = {
    "plain": {"tgt": TGT},
    "no-tgt": {},
    "src-mask": {"tgt": TGT, "src_mask": (9, 4, 1)},
    "src-without-real-tokens": {"tgt": TGT, "src_mask": (0, 9, -3)},
    "tgt-mask": {"tgt": TGT, "tgt_mask": (8, 3, 1)},
    "both-masks": {"tgt": TGT, "src_mask": (5, -4, 9), "tgt_mask": (2, 8, -5)},
}


def arguments(name: str, seed: int, options: dict) -> dict[str, Tensor]:
    given: dict = {"src": make_ids(13, SRC, seed=seed)}
    for key, value in SEGMENTS[name].items():
        if not options.get("encoder_only") or key == "src_mask":
            length = SRC if key == "src_mask" else TGT
            is_mask = key.endswith("mask")
            given[key] = mask_of(length, *value) if is_mask else make_ids(11, length, seed=seed)
    return given


def results(model: nn.Module, options: dict, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Everything that segments give, one after another, and the gradient of every parameter."""
    model.zero_grad(set_to_none=True)
    named, total, mems = {}, 0.0, None
    for index, name in enumerate(names):
        out = model(**arguments(name, index, options), mems=mems)
        assert out._fields == (
            ("enc_out", "mem") if options.get("encoder_only") else ("enc_out", "mem", "dec_out")
        )
        mems = out.mem
        for field, value in out._asdict().items():
            named[f"{field} {index}"] = value
            weights = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)
            total = total + (value * weights).sum() + (value if field == "dec_out" else 0)
    total.sum().backward()
    for name, p in model.named_parameters():
        # Not used and used with no effect are the same.
        named[f"d {name}"] = torch.zeros_like(p) if p.grad is None else p.grad
    return named


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].shape == value.shape, name
        # Relative to the largest value of a tensor: gradients through four segments pass 1e5.
        scale = max(1.0, float(value.detach().abs().max()))
        assert float((got[name] - value).detach().abs().max()) <= TOLERANCE[dtype] * scale, name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("segment", SEGMENTS)
@pytest.mark.parametrize("case", CASES)
def test_equals_upstream(case: str, segment: str, dtype: torch.dtype) -> None:
    theirs, ours = pair(CASES[case], dtype, upstream_quirks=True)
    expected = results(theirs, CASES[case], (segment,))
    assert expected["d memory_slots"].count_nonzero()
    assert_equal(results(ours, CASES[case], (segment,)), expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", ["two-updates", "encoder-only"])
def test_equals_upstream_over_segments(case: str, dtype: torch.dtype) -> None:
    """The memory is handed on, and the gradient comes back through all segments."""
    theirs, ours = pair(CASES[case], dtype, upstream_quirks=True)
    names = ("both-masks", "no-tgt", "plain", "src-without-real-tokens")
    expected = results(theirs, CASES[case], names)
    assert_equal(results(ours, CASES[case], names), expected, dtype)


def test_equals_upstream_at_every_distance() -> None:
    """Beyond the distance from which all keys share a bucket."""
    theirs, ours = pair(SMALL, torch.float64, upstream_quirks=True)
    src, tgt = make_ids(13, 300, batch=1), make_ids(11, 301, batch=1)
    found = []
    for model in (theirs, ours):
        loss = model(src, tgt).dec_out
        tables = [p for name, p in model.named_parameters() if "relative" in name]
        found.append((loss, *torch.autograd.grad(loss, tables)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_state_dict_and_weights_are_upstreams(case: str) -> None:
    torch.manual_seed(4)
    expected = upstream(**CASES[case]).state_dict()
    torch.manual_seed(4)
    got = Memformer(**CASES[case]).state_dict()
    assert list(got) == list(expected)
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def swap_relative_positions(theirs: nn.Module) -> None:
    """Gives the original the senses of relative positions that were meant."""
    theirs.encoder.layer_blocks.rel_pos_emb.causal = True
    theirs.decoder.net.layer_blocks.rel_pos_emb.causal = False


def test_relative_positions_have_the_sense_of_t5() -> None:
    """Then, where nothing is masked, the rest is the original's."""
    theirs, ours = pair(SMALL, torch.float64)
    names = ("plain", "no-tgt")
    got = results(ours, SMALL, names)
    different = results(theirs, SMALL, names)["enc_out 0"]
    assert (got["enc_out 0"] - different).abs().max() > 1e-3
    swap_relative_positions(theirs)
    assert_equal(got, results(theirs, SMALL, names), torch.float64)


@pytest.mark.parametrize("is_causal", [False, True])
def test_buckets_of_relative_positions(is_causal: bool) -> None:
    """T5: near distances have buckets of their own, far ones share them; 32 in all."""
    bias = RelativePositionBias(heads=2, is_causal=is_causal)
    positions = range(-200, 201)
    got = bias.buckets(torch.tensor(positions)).tolist()
    count, exact = (32, 16) if is_causal else (16, 8)
    for position, bucket in zip(positions, got, strict=True):
        distance = max(-position, 0) if is_causal else abs(position)
        expected = distance
        if distance >= exact:
            share = math.log(distance / exact) / math.log(128 / exact)
            expected = min(exact + math.floor(share * (count - exact) + 1e-6), count - 1)
        assert bucket == expected + (16 if position > 0 and not is_causal else 0), position
    # On the side after the query there is no distance 0.
    assert set(got) == set(range(32)) - ({16} if not is_causal else set())


def test_bias_of_a_sequence() -> None:
    bias = RelativePositionBias(heads=3, is_causal=False).double()
    table = bias.relative_attention_bias.weight
    whole = bias(7)
    assert whole.shape == (1, 3, 7, 7)
    for i in range(7):
        for j in range(7):
            bucket = int(bias.buckets(torch.tensor(j - i)))
            assert torch.equal(whole[0, :, i, j], table[bucket])
    values = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: toeplitz(t, 4), values)
    assert torch.autograd.gradgradcheck(lambda t: toeplitz(t, 4), values)
    # The newest queries of a longer sequence.
    assert torch.equal(toeplitz(bias.by_position(-6, 1), 2), whole[0, :, 5:])


@pytest.mark.parametrize("keys", [1, 5, 130])
@pytest.mark.parametrize("queries", [1, 2, 63, 64, 65, 130])
def test_gradient_of_the_bias_is_a_sum_over_diagonals(queries: int, keys: int) -> None:
    """Blocks of 64 queries: one, whole ones, and a part of one."""
    grad = torch.randn(2, queries, keys, dtype=torch.float64)
    expected = torch.zeros(2, queries + keys - 1, dtype=torch.float64)
    for i in range(queries):
        expected[:, queries - 1 - i : queries - 1 - i + keys] += grad[:, i]
    torch.testing.assert_close(diagonal_sums(grad), expected, rtol=0, atol=1e-12)
    values = torch.randn(2, queries + keys - 1, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(toeplitz(values, queries), values, grad)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_masked_tokens_attend_to_nothing() -> None:
    """Intended: 0 from attention, so that only the residual and biases are left of them; upstream:
    the mean of all values. What is real does not depend on it.
    """
    options = {**SMALL, "enc_depth": 1}
    theirs, ours = pair(options, torch.float64)
    swap_relative_positions(theirs)
    given = arguments("src-mask", 0, options)
    expected, got = theirs(**given), ours(**given)
    real = given["src_mask"]
    torch.testing.assert_close(got.enc_out[real], expected.enc_out[real], rtol=0, atol=1e-12)
    torch.testing.assert_close(got.mem, expected.mem, rtol=0, atol=1e-12)
    torch.testing.assert_close(got.dec_out, expected.dec_out, rtol=0, atol=1e-12)
    assert (got.enc_out[~real] - expected.enc_out[~real]).abs().max() > 1e-3

    x = ours.encoder.token_emb(given["src"])
    self_attention, cross_attention, feed_forward = ours.encoder.layer_blocks.layers[0]
    x = x + self_attention.fn.fn.to_out.bias
    memory = ours.get_initial_mem(3)
    x = ours.encoder.norm(feed_forward(cross_attention(x, memory)))
    torch.testing.assert_close(got.enc_out[~real], x[~real], rtol=0, atol=1e-12)


@pytest.mark.parametrize("shorter", [0, 1])
def test_mask_of_tgt_with_and_without_its_last_token(shorter: int) -> None:
    """Upstream drops the shorter one silently; intended: it says as much as the other."""
    theirs, ours = pair(SMALL, torch.float64)
    given = arguments("tgt-mask", 0, SMALL)
    given["tgt_mask"] = mask = mask_of(TGT, 8, 3, 2)
    expected = ours(**given).dec_out
    given["tgt_mask"] = mask[:, : TGT - shorter]
    # The shorter one does not say that the last token of the first sequence is real: it is as real
    # as the one before.
    assert torch.equal(ours(**given).dec_out, expected)
    quirky = Memformer(**SMALL, upstream_quirks=True).double()
    quirky.load_state_dict(ours.state_dict())
    torch.testing.assert_close(quirky(**given).dec_out, theirs(**given).dec_out, rtol=0, atol=1e-12)
    del given["tgt_mask"]
    unmasked = quirky(**given).dec_out
    given["tgt_mask"] = mask[:, : TGT - shorter]
    assert torch.equal(quirky(**given).dec_out, unmasked) == bool(shorter)


def logits_of(model: Memformer, given: dict[str, Tensor]) -> Tensor:
    """Of the token after each token of tgt, without masks of it."""
    enc = model.encode(given["src"], src_mask=given.get("src_mask")).enc_out
    return model.decoder.net(given["tgt"], enc, context_mask=given.get("src_mask"))


def test_loss_skips_padding() -> None:
    """Intended: the mean over real tokens that follow a real one; whatever stands in the pads."""
    ours = Memformer(**SMALL).double()
    randomise(ours)
    given = arguments("both-masks", 0, SMALL)
    given["tgt_mask"] = mask_of(TGT, 2, 8, 5)
    loss = ours(**given).dec_out
    log_p = logits_of(ours, given).log_softmax(-1)
    lengths = (2, 8, 5)
    chosen = [
        log_p[b, t, given["tgt"][b, t + 1]] for b, n in enumerate(lengths) for t in range(n - 1)
    ]
    torch.testing.assert_close(loss, -torch.stack(chosen).mean(), rtol=0, atol=1e-12)

    as_list = [ids[:n] for ids, n in zip(given["tgt"], lengths, strict=True)]
    without = {name: value for name, value in given.items() if name != "tgt_mask"}
    torch.testing.assert_close(
        ours(**{**without, "tgt": as_list}).dec_out, loss, rtol=0, atol=1e-12
    )
    pads = {**given, "tgt": given["tgt"].where(given["tgt_mask"], 7)}
    assert torch.equal(ours(**pads).dec_out, loss)

    nothing = ours(**{**given, "tgt_mask": mask_of(TGT, 1, 0, 1)}).dec_out
    nothing.backward()
    assert nothing == 0
    assert all(p.grad.isfinite().all() for p in ours.parameters() if p.grad is not None)


def test_loss_of_a_list_is_upstreams_with_its_quirks() -> None:
    theirs, ours = pair(SMALL, torch.float64, upstream_quirks=True)
    src = make_ids(13, SRC)
    tgt = [make_ids(11, n, batch=1)[0] for n in (2, 8, 5)]
    expected, got = theirs(src, tgt).dec_out, ours(src, tgt).dec_out
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    intended = Memformer(**SMALL).double()
    intended.load_state_dict(ours.state_dict())
    assert abs(intended(src, tgt).dec_out.item() - expected.item()) > 1e-3


def test_decoder_sees_no_later_token_and_no_padding() -> None:
    model = Memformer(**SMALL).double()
    randomise(model)
    given = arguments("src-mask", 0, SMALL)
    logits = logits_of(model, given)
    for n in range(TGT):
        changed = {**given, "tgt": given["tgt"].clone()}
        changed["tgt"][:, n:] = (changed["tgt"][:, n:] + 1) % 11
        other = logits_of(model, changed)
        torch.testing.assert_close(other[:, :n], logits[:, :n], rtol=0, atol=1e-12)
        assert not torch.equal(other[:, n], logits[:, n])
    changed = {**given, "src": given["src"].where(given["src_mask"], 12)}
    torch.testing.assert_close(logits_of(model, changed), logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(model(**changed).mem, model(**given).mem, rtol=0, atol=1e-12)


def test_a_slot_of_the_memory_sees_no_other() -> None:
    model = Memformer(**CASES["two-updates"]).double()
    randomise(model)
    mems = model.get_initial_mem(2).detach().clone()
    enc = torch.randn(2, 4, 16, dtype=torch.float64)
    after = model._update(mems, enc, None)
    mems[:, 3] += 1
    changed = (model._update(mems, enc, None) - after).abs().amax(dim=(0, 2))
    assert (changed > 0).tolist() == [False, False, False, True, False]


def test_bfloat16_autocast_trains() -> None:
    model = Memformer(**CASES["two-updates"])
    given = arguments("both-masks", 0, SMALL)
    exact = model(**given).dec_out
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = model(**given)
        second = model(**{**given, "mems": first.mem})
    (first.dec_out + second.dec_out + second.mem.float().square().mean()).backward()
    assert first.dec_out.dtype == torch.float32
    assert abs(first.dec_out.item() - exact.item()) < 0.05 * exact.item()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    model = Memformer(**SMALL)
    given = arguments("both-masks", 0, SMALL)
    found = []
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        results = function(**given)
        (results.dec_out + results.mem.square().mean()).backward()
        found.append([*results, *(p.grad for p in model.parameters())])
        model.zero_grad(set_to_none=True)
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_empty_segments_and_narrow_integers() -> None:
    model = Memformer(**SMALL)
    given = arguments("plain", 0, SMALL)
    small = {name: ids.to(torch.uint8) for name, ids in given.items()}
    assert all(map(torch.equal, model(**small), model(**given)))
    empty = model(make_ids(13, 0), given["tgt"])
    assert empty.enc_out.shape == (3, 0, 16)
    assert empty.dec_out.isfinite()
    assert empty.mem.isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"wings": 2}, TypeError, "wings"),
        ({"enc_wings": 2}, TypeError, "enc_wings"),
        ({"enc_dim": 16}, TypeError, "enc_dim"),
        ({"dec_depth": None}, TypeError, "missing dec_depth"),
        ({"dim": 16.0}, TypeError, "dim must be an integer"),
        ({"dim": 0}, ValueError, "dim must be at least 1"),
        ({"num_memory_slots": 0}, ValueError, "num_memory_slots must be at least 1"),
        ({"num_mem_updates": -1}, ValueError, "num_mem_updates must be at least 0"),
        ({"enc_heads": 3}, ValueError, "enc_heads must divide dim = 16, got 3"),
        ({"dec_heads": 0}, ValueError, "dec_heads must be at least 1"),
        ({"mem_update_attn_heads": 5}, ValueError, "mem_update_attn_heads must divide dim"),
        ({"enc_num_tokens": 0}, ValueError, "enc_num_tokens must be at least 1"),
        ({"dec_max_seq_len": 0}, ValueError, "dec_max_seq_len must be at least 1"),
        ({"enc_depth": True}, TypeError, "enc_depth must be an integer"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_constructor_refuses(change: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Memformer(**{**SMALL, **change})


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"src": [[1, 2]]}, TypeError, "src must be a tensor"),
        ({"src": torch.zeros(3, 4)}, TypeError, "src must be integers"),
        ({"src": make_ids(13, 4)[0]}, ValueError, r"src must be \(batch, tokens\)"),
        ({"src": torch.full((3, 4), 13)}, ValueError, "src must be from 0 to num_tokens - 1 = 12"),
        ({"tgt": torch.full((3, 4), 11)}, ValueError, "tgt must be from 0 to num_tokens - 1 = 10"),
        ({"tgt": torch.full((3, 4), -100)}, ValueError, "tgt must be from 0"),
        ({"tgt": make_ids(11, 4, batch=2)}, ValueError, r"tgt must have the batch size of src \(3"),
        ({"tgt": make_ids(11, 1)}, ValueError, "tgt must have at least two tokens"),
        ({"tgt": 5}, TypeError, "tgt must be"),
        (
            {"tgt": [make_ids(11, 4)[0]]},
            ValueError,
            r"tgt must have the batch size of src \(3\), got a list of 1",
        ),
        ({"tgt": [make_ids(11, 1)[0]] * 3}, ValueError, "tgt must be .* at least two"),
        ({"tgt": [torch.zeros(3)] * 3}, TypeError, "tgt must be integers"),
        ({"tgt": [torch.full((3,), 11)] * 3}, ValueError, "tgt must be from 0"),
        (
            {"tgt": [make_ids(11, 4)[0]] * 3, "tgt_mask": mask_of(4, 4, 4, 4)},
            ValueError,
            "tgt_mask must be None if tgt is a list",
        ),
        ({"src_mask": mask_of(8, 8, 8, 8)}, ValueError, r"src_mask must have .* \(3, 9\), got"),
        ({"src_mask": torch.ones(3, 9)}, TypeError, "src_mask must be bool"),
        ({"src_mask": True}, TypeError, "src_mask must be a tensor"),
        ({"tgt_mask": mask_of(6, 6, 6, 6)}, ValueError, r"\(3, 8\) or \(3, 7\), got \(3, 6\)"),
        ({"tgt_mask": mask_of(8, 8, 8)}, ValueError, "tgt_mask must have shape"),
        ({"tgt_mask": torch.ones(3, 8)}, TypeError, "tgt_mask must be bool"),
        ({"mems": torch.zeros(2, 5, 16)}, ValueError, r"mems must have .* \(3, 5, 16\), got \(2"),
        ({"mems": torch.zeros(3, 4, 16)}, ValueError, r"mems must have .* \(3, 5, 16\)"),
        ({"mems": torch.zeros(3, 5, 16).long()}, TypeError, "mems must be floating point"),
        ({"mems": 0}, TypeError, "mems must be a tensor"),
        ({"mems": torch.zeros(3, 5, 16, device="meta")}, ValueError, "mems .* model's device"),
        ({"src": make_ids(13, 4).to("meta")}, ValueError, "src must be on the model's device"),
    ],
)
def test_forward_refuses(change: dict, error: type[Exception], words: str) -> None:
    model = Memformer(**SMALL)
    with pytest.raises(error, match=words):
        model(**{**arguments("plain", 0, SMALL), **change})


def test_saved_loaded_and_taken_over_from_upstream(tmp_path: Path) -> None:
    theirs = upstream(**SMALL)
    torch.save({"model": theirs.state_dict()}, tmp_path / "upstream.pt")
    ours = Memformer(**SMALL, upstream_quirks=True).load_upstream(tmp_path / "upstream.pt")
    ours.save_pretrained(tmp_path / "folder")
    again = Memformer.from_pretrained(tmp_path / "folder")
    assert again.options == {**SMALL, "upstream_quirks": True}
    given = arguments("both-masks", 0, SMALL)
    for got, kept, expected in zip(again(**given), ours(**given), theirs(**given), strict=True):
        assert torch.equal(got, kept)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_encoder_only_refuses_what_needs_a_decoder() -> None:
    model = Memformer(**CASES["encoder-only"])
    ids = make_ids(11, 4)
    with pytest.raises(ValueError, match="tgt must be None, as the model has no decoder"):
        model(ids, ids)
    with pytest.raises(ValueError, match="generate needs a decoder"):
        model.generate(ids, ids, 3)
