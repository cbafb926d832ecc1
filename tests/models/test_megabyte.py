"""MEGABYTE against the package that it follows, and what its constructor and forward refuse."""

from __future__ import annotations

import warnings
from math import prod

import pytest
import torch

from python_models import MEGABYTE

SMALL = {"num_tokens": 16, "dim_head": 8, "heads": 2}
TWO = {**SMALL, "dim": (48, 32), "depth": (2, 2), "max_seq_len": (5, 4)}
THREE = {**SMALL, "dim": (48, 32, 24), "depth": (1, 2, 1), "max_seq_len": (4, 3, 5)}
EQUAL = {**SMALL, "dim": 32, "depth": (2, 1), "max_seq_len": (4, 4)}

CASES = {
    "two-stages": TWO,
    "two-stages-rotary": {**TWO, "rel_pos": True},
    "three-stages": THREE,
    "three-stages-rotary": {**THREE, "rel_pos": True},
    "odd-dims": {**TWO, "dim": (33, 21)},
    "one-dim": {**EQUAL, "pad_id": 3},
    "one-head-flash": {**EQUAL, "heads": 1, "flash_attn": True},
    "learned-positions": {**EQUAL, "pos_emb": True, "upstream_quirks": True},
    "learned-and-rotary-three": {
        **THREE,
        "dim": 24,
        "max_seq_len": (3, 3, 3),
        "pos_emb": True,
        "rel_pos": True,
        "upstream_quirks": True,
    },
}

# What the model can be asked: flat with padding and without, one token, whole hierarchies, the
# first patches of one, nothing.
INPUTS = ("flat", "flat-full", "flat-one", "hierarchy", "hierarchy-part", "empty")

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def upstream(**options: object) -> torch.nn.Module:
    package = pytest.importorskip(
        "MEGABYTE_pytorch", reason="megabyte-pytorch==0.2.1 is the oracle and not installed"
    )
    options.pop("upstream_quirks", None)
    return package.MEGABYTE(**options)


def make_ids(kind: str, options: dict, batch: int = 2) -> torch.Tensor:
    lengths = options["max_seq_len"]
    generator = torch.Generator().manual_seed(7)
    full = torch.randint(options["num_tokens"], (batch, *lengths), generator=generator)
    return {
        "flat": full.flatten(1)[:, : prod(lengths) - 3],
        "flat-full": full.flatten(1),
        "flat-one": full.flatten(1)[:, :1],
        "hierarchy": full,
        "hierarchy-part": full[:, :2],
        "empty": full.flatten(1)[:, :0],
    }[kind]


def pair(options: dict, dtype: torch.dtype) -> tuple[torch.nn.Module, MEGABYTE]:
    torch.manual_seed(0)
    theirs = upstream(**options).to(dtype)
    ours = MEGABYTE(**options).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def results(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, loss and the gradient of every parameter, of the loss and of the logits."""
    logits = model(ids)
    named = {"logits": logits}
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    objectives = {"logits": (logits * weights).sum()}
    if ids.numel():
        objectives["loss"] = named["loss"] = model(ids, return_loss=True)
    parameters = dict(model.named_parameters())
    for objective, value in objectives.items():
        gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            # Not used and used with no effect are the same.
            gradient = torch.zeros_like(parameter) if gradient is None else gradient
            named[f"d {objective} / d {name}"] = gradient
    return named


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("case", CASES)
def test_equals_upstream(case: str, kind: str, dtype: torch.dtype) -> None:
    options = CASES[case]
    theirs, ours = pair(options, dtype)
    ids = make_ids(kind, options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # upstream's flash path is deprecated
        expected = results(theirs, ids)
    got = results(ours, ids)
    assert got.keys() == expected.keys()
    assert any(value.count_nonzero() for name, value in expected.items() if name != "logits")
    for name, value in expected.items():
        value = value.detach()
        assert got[name].shape == value.shape, name
        assert float((got[name].detach() - value).abs().max()) <= TOLERANCE[dtype], name


def test_loss_skips_padding_tokens_in_the_text() -> None:
    theirs, ours = pair(TWO, torch.float64)
    ids = make_ids("flat", TWO)
    ids[0, 2:7] = ours.pad_id
    torch.testing.assert_close(
        ours(ids, return_loss=True), theirs(ids, return_loss=True), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("case", CASES)
def test_state_dict_has_upstream_keys_in_order(case: str) -> None:
    options = CASES[case]
    theirs, ours = upstream(**options), MEGABYTE(**{**options, "upstream_quirks": False})
    expected = [(name, t.shape) for name, t in theirs.state_dict().items()]
    assert [(name, t.shape) for name, t in ours.state_dict().items()] == expected


def test_positions_belong_to_their_own_stage() -> None:
    """The intended pairing is upstream's with its tables in the other order."""
    options = {**EQUAL, "pos_emb": True}
    torch.manual_seed(0)
    theirs, ours = upstream(**options).double(), MEGABYTE(**options).double()
    state = theirs.state_dict()
    coarse, fine = "pos_embs.0.weight", "pos_embs.1.weight"
    ours.load_state_dict({**state, coarse: state[fine], fine: state[coarse]}, strict=True)
    ids = make_ids("flat", options)
    torch.testing.assert_close(ours(ids), theirs(ids), rtol=0, atol=1e-9)


def test_positions_of_unequal_stages() -> None:
    """Upstream cannot run this; without the quirk it runs, and every table has an effect."""
    options = {**TWO, "pos_emb": True}
    ids = make_ids("flat", options)
    with pytest.raises(RuntimeError):
        upstream(**options)(ids)
    with pytest.raises(ValueError, match="upstream_quirks=False"):
        MEGABYTE(**options, upstream_quirks=True)(ids)
    model = MEGABYTE(**options).double()
    model(ids, return_loss=True).backward()
    assert all(table.weight.grad.abs().sum() > 0 for table in model.pos_embs)


@pytest.mark.parametrize("options", [TWO, THREE], ids=["two", "three"])
def test_no_token_sees_a_later_one(options: dict) -> None:
    model = MEGABYTE(**options, rel_pos=True).double()
    ids = make_ids("flat-full", options, batch=1)
    logits = model(ids)
    for n in range(ids.shape[1]):
        changed = ids.clone()
        changed[:, n:] = (changed[:, n:] + 1) % options["num_tokens"]
        torch.testing.assert_close(model(changed)[:, :n], logits[:, :n], rtol=0, atol=1e-12)


def test_dropout_only_while_training() -> None:
    model = MEGABYTE(**TWO, attn_dropout=0.5, ff_dropout=0.5)
    ids = make_ids("flat", TWO)
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_bfloat16_autocast_trains() -> None:
    model = MEGABYTE(**TWO, rel_pos=True)
    ids = make_ids("flat", TWO)
    exact = model(ids, return_loss=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, return_loss=True)
    loss.backward()
    assert loss.dtype == torch.float32
    assert abs(loss.item() - exact.item()) < 0.05 * exact.item()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"depth": [2, 2]}, TypeError, "depth must be a tuple"),
        ({"depth": (2,), "max_seq_len": (4,)}, ValueError, "depth must have one entry a stage"),
        ({"depth": (2, -1)}, ValueError, "depth must be at least 0"),
        ({"max_seq_len": (5, 4, 3)}, ValueError, "max_seq_len must have as many entries"),
        ({"max_seq_len": (5, 0)}, ValueError, "max_seq_len must be at least 1"),
        ({"max_seq_len": (5, 4.0)}, TypeError, "max_seq_len must be made of integers"),
        ({"dim": (48, 32, 16)}, ValueError, "dim must be one integer or one a stage"),
        ({"dim": 0}, ValueError, "dim must be at least 1"),
        ({"dim": "48"}, TypeError, "dim must be made of integers"),
        ({"num_tokens": 0}, ValueError, "num_tokens must be at least 1"),
        ({"heads": 0}, ValueError, "heads must be at least 1"),
        ({"dim_head": 7, "rel_pos": True}, ValueError, "dim_head must be even"),
        ({"attn_dropout": 1.0}, ValueError, "attn_dropout must be a probability"),
        ({"ff_dropout": -0.1}, ValueError, "ff_dropout must be a probability"),
        ({"pad_id": 1.5}, TypeError, "pad_id must be an integer"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_constructor_refuses(change: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        MEGABYTE(**{**TWO, **change})


@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        ([[1, 2]], TypeError, "ids must be a tensor"),
        (torch.zeros(2, 5), TypeError, "ids must be integers, got torch.float32"),
        (torch.zeros(2, 5, dtype=torch.bool), TypeError, "ids must be integers, got torch.bool"),
        (torch.zeros(5, dtype=torch.long), ValueError, "ids must be flat"),
        (torch.zeros(1, 2, 4, 1, dtype=torch.long), ValueError, "ids must be flat"),
        (torch.zeros(1, 2, 3, dtype=torch.long), ValueError, r"must end in max_seq_len\[1:\]"),
        (torch.zeros(1, 21, dtype=torch.long), ValueError, "at most 20 tokens"),
        (torch.zeros(1, 6, 4, dtype=torch.long), ValueError, "at most 20 tokens"),
        (torch.full((1, 4), 16), ValueError, "from 0 to num_tokens - 1 = 15"),
        (torch.full((1, 4), -1), ValueError, "from 0 to num_tokens - 1 = 15"),
        (torch.zeros(1, 4, dtype=torch.long, device="meta"), ValueError, "model's device"),
    ],
)
def test_forward_refuses(ids: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        MEGABYTE(**TWO)(ids)


def test_pad_id_outside_the_vocabulary_needs_whole_patches() -> None:
    model = MEGABYTE(**TWO, pad_id=-100)
    ids = make_ids("flat-full", TWO)
    assert model(ids, return_loss=True).isfinite()
    with pytest.raises(ValueError, match="pad_id -100 cannot fill an unfinished patch"):
        model(ids[:, :-1])


def test_narrow_integers_are_tokens_too() -> None:
    model = MEGABYTE(**TWO)
    ids = make_ids("flat", TWO)
    assert torch.equal(model(ids.to(torch.uint8)), model(ids))
