"""HierarchicalTransformer against the package that it follows, and what it refuses."""

from __future__ import annotations

import contextlib
import io
import warnings

import pytest
import torch
from torch import nn

from python_models import HierarchicalTransformer

ONE = {"num_tokens": 16, "dim": 16, "depth": 2, "seq_len": 40, "dim_head": 8, "heads": 2}
TWO = {**ONE, "dim": (16, 24), "hierarchies": (1, 4), "window_sizes": (4, None)}
THREE = {**ONE, "depth": 1, "hierarchies": (2, 1, 8), "hierarchical_stride": (2, 1, 4)}

# Every argument of the constructor, and what it may interact with.
CASES: dict[str, dict] = {
    "one": ONE,
    "one-windowed": {**ONE, "window_sizes": 5},
    "one-without-attention": {**ONE, "window_sizes": 0},
    "window-of-the-whole-sequence": {**ONE, "window_sizes": 40},
    "window-larger-than-the-sequence": {**ONE, "window_sizes": 41},
    "window-larger-than-a-hierarchy": {**TWO, "window_sizes": (10, 11)},
    "one-compressed": {**ONE, "hierarchies": 4, "window_sizes": 3},
    "two": TWO,
    "two-strides": {**TWO, "hierarchical_stride": (1, 2)},
    "stride-is-factor": {**TWO, "hierarchical_stride": (1, 4), "window_sizes": (None, 2)},
    "no-layers": {**TWO, "depth": 0},
    "three": THREE,
    "three-sizes": {
        **THREE, "dim": (24, 16, 10), "heads": (1, 3, 2), "dim_head": (4, 8, 6),
        "ff_mult": (1, 2.5, 4), "window_sizes": (3, 0, None),
    },
    "odd-channels": {**TWO, "dim": (15, 21), "hierarchical_stride": (1, 2)},
    "predict-another": {**TWO, "predict_hierarchy": 4},
    "predict-all": {**TWO, "predict_use_all_hierarchy": True, "hierarchical_stride": (1, 2)},
    "merge-all": {**THREE, "hierarchy_merge_all": True},
    "merge-all-predict-all": {
        **THREE, "dim": (24, 16, 10), "hierarchy_merge_all": True,
        "predict_use_all_hierarchy": True, "predict_hierarchy": 8, "window_sizes": (4, None, 2),
    },
    "no-reconstruction": {**TWO, "recon_loss_weight": 0.0},
    "weights-of-losses": {**TWO, "recon_loss_weight": 0.7, "hierarchical_ar_loss_weight": 1.5},
    "no-weight-of-compressed": {**TWO, "hierarchical_ar_loss_weight": 0.0},
    "ignore-index": {**TWO, "ignore_index": 3, "hierarchical_stride": (1, 2)},
    "ignore-nothing": {**TWO, "ignore_index": -100},
    "flash": {**TWO, "use_flash_attn": True},
}  # fmt: skip
# The hierarchy that predicts has a stride: logits only, the package has no loss of them.
STRIDED = {**ONE, "hierarchies": (2, 4), "hierarchical_stride": (2, 4), "hierarchy_merge_all": True}
LENGTHS = (40, 23, 2)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def upstream(**options: object) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it uses an old name of autocast
        package = pytest.importorskip(
            "simple_hierarchical_transformer",
            reason="simple-hierarchical-transformer==0.2.0 is the oracle and not installed",
        )
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it makes of a window
        return package.HierarchicalTransformer(**options)


def make_ids(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(16, (batch, length), generator=torch.Generator().manual_seed(length))


def randomise(model: nn.Module) -> None:
    """No gain at 1 and no bias at 0; embeddings and weights that make tokens matter."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.1)


def pair(
    options: dict, dtype: torch.dtype, *, upstream_quirks: bool = True
) -> tuple[nn.Module, HierarchicalTransformer]:
    torch.manual_seed(0)
    theirs = upstream(**options).to(dtype)
    randomise(theirs)
    ours = HierarchicalTransformer(**options, upstream_quirks=upstream_quirks).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def outputs(
    model: nn.Module, ids: torch.Tensor, *, loss: bool = True, **inputs: bool
) -> dict[str, torch.Tensor]:
    """Logits, the total and the parts of the loss, and the lists of embeddings."""
    named = {"logits": model(ids, **inputs)}
    if loss:
        total, parts = model(ids, return_loss=True, **inputs)
        names = ("next", "reconstruction", "compressed")
        named |= {"total": total, **dict(zip(names, parts, strict=True))}
    for name in ("return_hierarchical_token_embeds", "return_hierarchical_embeds"):
        for index, embeds in enumerate(model(ids, **{name: True}, **inputs)):
            named[f"{name} {index}"] = embeds
    return named


def with_gradients(model: nn.Module, named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Adds the gradient of every parameter, of each output and of all parts of the loss."""
    parameters = dict(model.named_parameters())
    result = dict(named)
    for name, value in named.items():
        if not value.requires_grad:
            continue
        weights = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)
        scalar = (value * weights).sum() if value.ndim else value
        gradients = torch.autograd.grad(
            scalar, list(parameters.values()), allow_unused=True, retain_graph=True
        )
        for (parameter, p), gradient in zip(parameters.items(), gradients, strict=True):
            # Not used and used with no effect are the same.
            gradient = torch.zeros_like(p) if gradient is None else gradient
            result[f"d {name} / d {parameter}"] = gradient
    return result


def results(model: nn.Module, ids: torch.Tensor, **inputs: bool) -> dict[str, torch.Tensor]:
    return with_gradients(model, outputs(model, ids, **inputs))


def assert_equal(
    got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    assert got.keys() <= expected.keys()
    for name, value in expected.items():
        value = value.detach()
        # Upstream has constants that require a gradient where there is nothing to learn.
        result = got[name].detach() if name in got else torch.zeros_like(value)
        # float32: relative to the largest value of a tensor. A NaN is a result like any other.
        largest = 1.0 if dtype == torch.float64 else max(1.0, float(value.nan_to_num().abs().max()))
        torch.testing.assert_close(
            result, value, rtol=0, atol=TOLERANCE[dtype] * largest, equal_nan=True, msg=name
        )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("case", CASES)
def test_equals_upstream(case: str, length: int, dtype: torch.dtype) -> None:
    theirs, ours = pair(CASES[case], dtype)
    expected = results(theirs, make_ids(length))
    assert "total" in expected
    assert expected["d total / d token_emb.weight"].count_nonzero()
    assert_equal(results(ours, make_ids(length)), expected, dtype)


@pytest.mark.parametrize("case", ["two", "three-sizes", "merge-all-predict-all", "one"])
def test_ablated_merge_equals_upstream(case: str) -> None:
    theirs, ours = pair(CASES[case], torch.float64)
    ids, ablate = make_ids(23), {"ablate_hierarchical_merge": True}
    assert_equal(results(ours, ids, **ablate), results(theirs, ids, **ablate), torch.float64)
    assert torch.equal(ours(ids), ours(ids, **ablate)) == (case == "one")


@pytest.mark.parametrize("length", [1, 2, 5, 23])
@pytest.mark.parametrize("predict_all", [False, True])
def test_predictions_of_strided_hierarchies(predict_all: bool, length: int) -> None:
    """Upstream has logits at each stride, or behind the last token too, and then no loss."""
    options = {**STRIDED, "predict_use_all_hierarchy": predict_all}
    theirs, quirks = pair(options, torch.float64)
    expected = results(theirs, make_ids(length), loss=False)
    assert_equal(results(quirks, make_ids(length), loss=False), expected, torch.float64)
    ours = pair(options, torch.float64, upstream_quirks=False)[1]
    logits = ours(make_ids(length))
    if not predict_all:
        assert torch.equal(logits, quirks(make_ids(length)))
        assert logits.shape == (2, -(-length // 2), 16)
        if length > 2:
            with pytest.raises(ValueError, match="return_loss needs a prediction at each of"):
                ours(make_ids(length), return_loss=True)
        return
    torch.testing.assert_close(logits, quirks(make_ids(length))[:, :length], rtol=0, atol=1e-12)
    if length > 1:
        total, _ = ours(make_ids(length), return_loss=True)
        assert total.isfinite()


@pytest.mark.parametrize("case", [*CASES, "strided"])
def test_state_dict_has_upstream_keys_in_order(case: str) -> None:
    options = {**CASES, "strided": STRIDED}[case]
    torch.manual_seed(4)
    theirs = upstream(**options)
    torch.manual_seed(4)
    ours = HierarchicalTransformer(**options)
    expected = [(name, t.shape, t.dtype) for name, t in theirs.state_dict().items()]
    assert [(name, t.shape, t.dtype) for name, t in ours.state_dict().items()] == expected
    for name, t in ours.state_dict().items():  # the same seed makes the same model
        assert torch.equal(t, theirs.state_dict()[name]), name


@pytest.mark.parametrize("ignore_index", [-100, 3, 0])
def test_reconstruction_skips_the_ignored_token(ignore_index: int) -> None:
    """Intended: ignore_index, and what stands before the first token; upstream: always token 0."""
    options = {**TWO, "ignore_index": ignore_index, "hierarchical_stride": (1, 2)}
    theirs, ours = pair(options, torch.float64, upstream_quirks=False)
    ids = make_ids(24)
    _, (next_token, recon, compressed) = ours(ids, return_loss=True)
    expected = theirs(ids, return_loss=True)[1]
    torch.testing.assert_close((next_token, compressed), (expected[0], expected[2]))
    assert torch.isclose(recon, expected[1]) == (ignore_index == 0)

    embeds = ours(ids[:, :-1], return_hierarchical_embeds=True)[1]
    logits = ours.compressors[1].to_recon(embeds).unflatten(-1, (4, 16)).log_softmax(-1)
    terms = [
        -logits[b, m, i, ids[b, place]]
        for b in range(2)
        for m in range(12)
        for i in range(4)
        if (place := 2 * m - 3 + i) >= 0 and ids[b, place] != ignore_index
    ]
    torch.testing.assert_close(recon, torch.stack(terms).mean())


def test_one_compressed_token_has_no_next_one() -> None:
    """Intended: no loss of it; upstream: NaN."""
    quirks, ours = (pair(TWO, torch.float64, upstream_quirks=q)[1] for q in (True, False))
    for length in (2, 3):
        total, (next_token, recon, compressed) = ours(make_ids(length), return_loss=True)
        assert (compressed == 0) == (length == 2)
        torch.testing.assert_close(total, next_token + 0.1 * recon + 0.25 * compressed)
        expected = quirks(make_ids(length), return_loss=True)[1][2]
        assert expected.isnan() if length == 2 else torch.equal(expected, compressed)


@pytest.mark.parametrize("case", ["two-strides", "three-sizes", "merge-all-predict-all"])
def test_no_token_sees_a_later_one(case: str) -> None:
    model = HierarchicalTransformer(**CASES[case], upstream_quirks=False).double()
    randomise(model)
    ids = make_ids(24, batch=1)
    logits = model(ids)
    for n in range(24):
        changed = ids.clone()
        changed[:, n:] = (changed[:, n:] + 1) % 16
        other = model(changed)
        torch.testing.assert_close(other[:, :n], logits[:, :n], rtol=0, atol=1e-12)
        assert not torch.equal(other[:, n], logits[:, n])


@pytest.mark.parametrize("case", ["two", "merge-all"])
def test_bfloat16_autocast_trains(case: str) -> None:
    model = HierarchicalTransformer(**CASES[case])
    ids = make_ids(41)
    exact, _ = model(ids, return_loss=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, parts = model(ids, return_loss=True)
    loss.backward()
    assert all(part.dtype == torch.float32 for part in (loss, *parts))
    assert abs(loss.item() - exact.item()) < 0.05 * exact.item()
    unused = {n for n, p in model.named_parameters() if p.grad is None}
    assert unused == set()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_no_sequences_and_narrow_integers() -> None:
    model = HierarchicalTransformer(**TWO)
    assert model(make_ids(9, batch=0)).shape == (0, 9, 16)
    assert torch.equal(model(make_ids(9).to(torch.uint8)), model(make_ids(9)))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"num_tokens": 0}, ValueError, "num_tokens must be at least 1"),
        ({"depth": 1.0}, TypeError, "depth must be an integer"),
        ({"seq_len": 0}, ValueError, "seq_len must be at least 1"),
        ({"hierarchies": (1, 3)}, ValueError, "hierarchies must be powers of two, got 3"),
        ({"hierarchies": (1, 1)}, ValueError, "hierarchies must be one or more, all different"),
        ({"hierarchies": ()}, ValueError, "hierarchies must be one or more, all different"),
        ({"hierarchies": (1, 0)}, ValueError, "hierarchies must be at least 1"),
        ({"hierarchies": [1, 4]}, TypeError, "hierarchies must be an integer"),
        ({"hierarchical_stride": (1, 3)}, ValueError, "hierarchical_stride must be powers of two"),
        ({"hierarchical_stride": 2}, ValueError, "hierarchical_stride must be at most the factor"),
        ({"hierarchical_stride": (1, 2, 4)}, ValueError, "hierarchical_stride must be one value"),
        ({"dim": (16, 24, 8)}, ValueError, "dim must be one value or a tuple of 2, as many as"),
        ({"dim": [16, 24]}, TypeError, "dim must be one value or a tuple, got the list"),
        ({"dim": (16, 1)}, ValueError, "dim must be at least 2"),
        ({"dim_head": 7}, ValueError, "dim_head must be even"),
        ({"dim_head": (8, 8, 8)}, ValueError, "dim_head must be one value"),
        ({"heads": (2, 0)}, ValueError, "heads must be at least 1"),
        ({"heads": "2"}, TypeError, "heads must be an integer"),
        ({"ff_mult": None}, TypeError, "ff_mult must be a number"),
        ({"ff_mult": 0.01}, ValueError, "ff_mult must leave a channel"),
        ({"window_sizes": -1}, ValueError, "window_sizes must be at least 0"),
        ({"window_sizes": (4, 2.5)}, TypeError, "window_sizes must be an integer"),
        ({"window_sizes": (4,)}, ValueError, "window_sizes must be one value or a tuple of 2"),
        ({"predict_hierarchy": 2}, ValueError, r"predict_hierarchy must be one of .* = \(1, 4\)"),
        (
            {"predict_hierarchy": 4, "hierarchical_stride": (1, 2)},
            ValueError,
            "hierarchical_stride of the hierarchy that predicts must be 1",
        ),
        ({"recon_loss_weight": -0.1}, ValueError, "recon_loss_weight must be 0 or more"),
        (
            {"hierarchical_ar_loss_weight": float("nan")},
            ValueError,
            "hierarchical_ar_loss_weight must be 0 or more",
        ),
        ({"ignore_index": None}, TypeError, "ignore_index must be an integer"),
        ({"window_size": 4}, TypeError, "window_size"),
    ],
    ids=str,
)
def test_constructor_refuses(change: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        HierarchicalTransformer(**{**TWO, **change})


@pytest.mark.parametrize(
    ("ids", "inputs", "error", "words"),
    [
        ([[1, 2]], {}, TypeError, "ids must be a tensor"),
        (torch.zeros(2, 5), {}, TypeError, "ids must be integers, got torch.float32"),
        (make_ids(5)[0], {}, ValueError, r"ids must be \(batch, tokens\)"),
        (make_ids(5)[None], {}, ValueError, r"ids must be \(batch, tokens\)"),
        (make_ids(0), {}, ValueError, "ids must have from 1 to 40 tokens"),
        (make_ids(41), {}, ValueError, "ids must have from 1 to 40 tokens"),
        (make_ids(1), {"return_loss": True}, ValueError, "ids must have from 2 to 41 tokens"),
        (make_ids(42), {"return_loss": True}, ValueError, "ids must have from 2 to 41 tokens"),
        (torch.full((1, 4), 16), {}, ValueError, "from 0 to num_tokens - 1 = 15"),
        (torch.full((1, 4), -1), {}, ValueError, "from 0 to num_tokens - 1 = 15"),
        (torch.zeros(1, 4, dtype=torch.long, device="meta"), {}, ValueError, "model's device"),
        (make_ids(5), {"return_losses": True}, TypeError, "return_losses"),
    ],
)
def test_forward_refuses(ids: object, inputs: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        HierarchicalTransformer(**TWO)(ids, **inputs)
