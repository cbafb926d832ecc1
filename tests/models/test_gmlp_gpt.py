"""gMLPGPT against the package that it follows, its memory, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from python_models import AutoregressiveWrapper, gMLPGPT
from python_models.gmlp_gpt import TinyAttention

SMALL = {"num_tokens": 16, "dim": 12, "depth": 2, "seq_len": 24, "heads": 2, "ff_mult": 2}
AXIAL = {"window": ((4, 1), (3, 2)), "attn_dim": (8, 6)}

# Upstream's own results: windowed attention only with its quirks.
CASES = {
    "global": SMALL,
    "global-four-heads": {**SMALL, "heads": 4, "ff_mult": 4, "depth": 1},
    "global-attention": {**SMALL, "attn_dim": 5},
    "global-axial": {**SMALL, "window": ((None, 3), (24, 2)), "attn_dim": (4, None)},
    "windowed": {**SMALL, "window": 5},
    "windowed-gelu": {**SMALL, "window": (7, 3), "act": nn.GELU()},
    "windowed-attention": {**SMALL, "window": 5, "attn_dim": 4},
    "axial-attention": {**SMALL, **AXIAL},
    "window-of-one": {**SMALL, "window": (1, 23), "attn_dim": 3},
    "tanh-attention": {**SMALL, "act": nn.Tanh(), "attn_dim": 4},
    "own-activation": {**SMALL, "act": nn.PReLU(init=0.3), "window": (5, None)},
    "approximate-gelu": {**SMALL, "act": nn.GELU("tanh")},
    "reversible": {**SMALL, "reversible": True},
    "reversible-axial-attention": {**SMALL, **AXIAL, "reversible": True, "act": nn.SiLU()},
    "reversible-own-activation": {**SMALL, "reversible": True, "act": nn.PReLU(), "window": 6},
    "reversible-layer-dropout": {
        **SMALL,
        "depth": 5,
        "reversible": True,
        "prob_survival": 0.5,
        "window": (5, (4, 2), None, 3, 24),
    },
    "layer-dropout-without-effect": {**SMALL, "prob_survival": 0.3},
}
LENGTHS = (24, 17, 1)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def upstream(name: str = "gMLPGPT", **options: object) -> nn.Module:
    package = pytest.importorskip(
        "g_mlp_gpt.g_mlp_gpt", reason="g-mlp-gpt==0.0.15 is the oracle and not installed"
    )
    return getattr(package, name)(**options)


def make_ids(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(16, (batch, length), generator=torch.Generator().manual_seed(length))


def randomise(model: nn.Module) -> None:
    """Values large enough that every part of the model matters: upstream's mixing begins at 0."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.3)


def pair(options: dict, dtype: torch.dtype, **ours_only: object) -> tuple[nn.Module, gMLPGPT]:
    theirs = upstream(**options).to(dtype)
    randomise(theirs)
    ours = gMLPGPT(**options, **ours_only).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def results(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, loss and the gradient of every parameter, while training."""
    named = {}
    weights = torch.linspace(-1, 1, ids.numel() * 16).view(*ids.shape, 16)
    for objective in ("logits", "loss"):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(3)  # the same layers survive
        logits = named["logits"] = model.train()(ids)
        if objective == "loss":
            value = F.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten())
            named["loss"] = value
        else:
            value = (logits * weights.to(logits.dtype)).sum()
        value.backward()
        for name, p in model.named_parameters():
            # Not used and used with no effect are the same.
            named[f"d {objective} / d {name}"] = torch.zeros_like(p) if p.grad is None else p.grad
    return named


def assert_equal(
    got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].shape == value.shape, name
        # float32: relative to the largest value of a tensor; sums of 0.3 * randn pass 100.
        scale = 1.0 if dtype == torch.float64 else max(1.0, float(value.detach().abs().max()))
        assert float((got[name] - value).detach().abs().max()) <= TOLERANCE[dtype] * scale, name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("case", CASES)
def test_equals_upstream(case: str, length: int, dtype: torch.dtype) -> None:
    theirs, ours = pair(CASES[case], dtype, upstream_quirks=True)
    ids = make_ids(length)
    expected = results(theirs, ids)
    assert any(v.count_nonzero() for name, v in expected.items() if name.endswith("sgu.weight"))
    assert_equal(results(ours, ids), expected, dtype)
    theirs.eval(), ours.eval()
    with torch.no_grad():
        assert_equal({"logits": ours(ids)}, {"logits": theirs(ids)}, dtype)


@pytest.mark.parametrize(
    "case", ["global-attention", "global-axial", "windowed-gelu", "reversible"]
)
def test_equals_upstream_where_quirks_do_not_matter(case: str) -> None:
    theirs, ours = pair(CASES[case], torch.float64)
    ids = make_ids(17)
    assert_equal(results(ours, ids), results(theirs, ids), torch.float64)


@pytest.mark.parametrize("case", CASES)
def test_state_dict_has_upstream_keys_in_order(case: str) -> None:
    theirs, ours = upstream(**CASES[case]), gMLPGPT(**CASES[case])
    expected = [(name, t.shape, t.dtype) for name, t in theirs.state_dict().items()]
    assert [(name, t.shape, t.dtype) for name, t in ours.state_dict().items()] == expected
    for name, mask in theirs.state_dict().items():
        if name.endswith(".mask"):
            assert torch.equal(ours.state_dict()[name], mask), name


@pytest.mark.parametrize("case", ["axial-attention", "reversible-layer-dropout"])
def test_same_seed_same_model(case: str) -> None:
    torch.manual_seed(4)
    expected = upstream(**CASES[case]).state_dict()
    torch.manual_seed(4)
    got = gMLPGPT(**CASES[case], upstream_quirks=True).state_dict()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_mixing_begins_near_zero() -> None:
    """Intended: uniform in 1e-3 / S; upstream: exactly 0, because of a misplaced argument."""
    options = {**SMALL, "window": (5, None)}
    for quirks in (False, True):
        model = gMLPGPT(**options, upstream_quirks=quirks)
        for (layer,), size in zip(model.net.layers, (5, 24), strict=True):
            sgu = layer.fn.fn.sgu
            largest = float(sgu.weight.detach().abs().max())
            assert largest == 0 if quirks else 0.5e-3 < largest * size <= 1e-3
            assert torch.equal(sgu.bias, torch.ones(2, size))


@pytest.mark.parametrize(
    ("window", "quirks"), [(None, False), (5, False), (1, False), (30, False), (5, True)]
)
def test_tiny_attention_against_its_definition(window: int | None, quirks: bool) -> None:
    """Values of their own and no keys before the first, which upstream's package has not."""
    n = 17
    module = TinyAttention(dim=6, dim_out=7, dim_inner=4, window=window, upstream_quirks=quirks)
    x = torch.randn(2, n, 6, dtype=torch.float64)
    module.double()
    q, k, v = module.to_qkv(x).chunk(3, dim=-1)
    w = n if window is None else window
    rows = []
    for t in range(n):
        first = max(0, (t // w - 1) * w)
        keys, values = k[:, first : t + 1], (k if quirks else v)[:, first : t + 1]
        if quirks and t < w:
            keys, values = (F.pad(s, (0, 0, w, 0)) for s in (keys, values))
        share = (torch.einsum("bd,bnd->bn", q[:, t], keys) / 2).softmax(-1)
        rows.append(torch.einsum("bn,bnd->bd", share, values))
    expected = module.to_out(torch.stack(rows, dim=1))
    got = module(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    for p, other in zip(
        torch.autograd.grad(got.square().sum(), list(module.parameters())),
        torch.autograd.grad(expected.square().sum(), list(module.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(p, other, rtol=0, atol=1e-10)


def test_layer_dropout() -> None:
    """Intended: a layer is left out, whole; the first one stays if all would go."""
    options = {**SMALL, "depth": 3}
    whole = gMLPGPT(**options).double()
    randomise(whole)
    ids = make_ids(9)
    for survivors, probability in (((0, 2), 0.5), ((1,), 0.5), ((0,), 0.0)):
        model = gMLPGPT(**options, prob_survival=probability).double()
        model.load_state_dict(whole.state_dict())
        seed = next(
            s
            for s in range(100)
            if survivors_of(s, probability) == (survivors if probability else ())
        )
        torch.manual_seed(seed)
        got = model(ids)
        x = whole.to_embed(ids)
        for index in survivors:
            x = x + whole.net.layers[index][0](x)
        torch.testing.assert_close(got, whole.to_logits(x), rtol=0, atol=1e-12)
        torch.testing.assert_close(model.eval()(ids), whole(ids), rtol=0, atol=1e-12)


def survivors_of(seed: int, probability: float) -> tuple[int, ...]:
    """The layers out of three whose random number does not leave them out."""
    torch.manual_seed(seed)
    return tuple((torch.rand(3) >= 1 - probability).nonzero()[:, 0].tolist())


class _Held:
    """Bytes that autograd holds, now and at most; what belongs to the model is left out."""

    def __init__(self, model: nn.Module) -> None:
        self.own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self.now = self.most = 0

    def pack(self, t: torch.Tensor) -> object:
        size = 0 if t.untyped_storage().data_ptr() in self.own else t.nbytes
        held = self

        class Saved:
            tensor = t

            def __del__(self) -> None:
                held.now -= size

        self.now += size
        self.most = max(self.most, self.now)
        return Saved()

    @staticmethod
    def unpack(saved: object) -> torch.Tensor:
        return saved.tensor


def most_held(**changes: object) -> int:
    """Most bytes of activations held at once in a training step."""
    model = gMLPGPT(**{**SMALL, **AXIAL, **changes, "window": 5, "attn_dim": 4})
    held = _Held(model)
    with torch.autograd.graph.saved_tensors_hooks(held.pack, held.unpack):
        loss = AutoregressiveWrapper(model)(make_ids(25))
        loss.backward()
    assert model.to_embed.weight.grad.abs().sum() > 0
    return held.most


def test_reversible_memory_does_not_grow_with_depth() -> None:
    constant = [most_held(depth=depth, reversible=True) for depth in (1, 2, 4, 16)]
    assert constant[0] > 0
    assert len(set(constant)) == 1, constant
    growing = [most_held(depth=depth) for depth in (2, 4, 16)]
    assert growing[1] > 1.8 * growing[0]
    assert growing[2] > 3.5 * growing[1]


def test_reversible_works_with_autograd_grad_hooks_and_frozen_parts() -> None:
    model = gMLPGPT(**SMALL, reversible=True).double()
    randomise(model)
    model.net.blocks[0].f.requires_grad_(False)
    seen = []
    model.net.blocks[1].g.net.net[0].weight.register_hook(lambda g: seen.append(g.clone()))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = AutoregressiveWrapper(model)(make_ids(20))
    got = torch.autograd.grad(loss, list(parameters.values()))
    assert len(seen) == 1

    # The same without recomputation.
    ids = make_ids(20)
    x1 = x2 = model.to_embed(ids[:, :-1])
    for block in model.net.blocks:
        x1, x2 = block(x1, x2)
    plain = F.cross_entropy(model.to_logits(x1 + x2).flatten(0, 1), ids[:, 1:].flatten())
    expected = torch.autograd.grad(plain, list(parameters.values()))
    for name, a, b in zip(parameters, got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=name)


def test_reversible_draws_the_same_random_numbers_again() -> None:
    """With a function that drops gates, recomputed gradients are those of what was computed."""
    model = gMLPGPT(**SMALL, reversible=True, act=nn.Dropout(0.5)).double()
    randomise(model)
    ids = make_ids(20)
    parameters = list(model.parameters())

    torch.manual_seed(2)
    got = torch.autograd.grad(AutoregressiveWrapper(model)(ids), parameters)
    after = torch.rand(3)

    torch.manual_seed(2)
    x1 = x2 = model.to_embed(ids[:, :-1])
    for block in model.net.blocks:
        x1, x2 = block(x1, x2)
    plain = F.cross_entropy(model.to_logits(x1 + x2).flatten(0, 1), ids[:, 1:].flatten())
    for a, b in zip(got, torch.autograd.grad(plain, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert torch.equal(torch.rand(3), after)  # the backward pass leaves the generator alone


@pytest.mark.parametrize("case", ["axial-attention", "reversible-axial-attention", "global-axial"])
def test_no_token_sees_a_later_one(case: str) -> None:
    model = gMLPGPT(**CASES[case]).double()
    randomise(model)
    ids = make_ids(24, batch=1)
    logits = model(ids)
    for n in range(24):
        changed = ids.clone()
        changed[:, n:] = (changed[:, n:] + 1) % 16
        other = model(changed)
        torch.testing.assert_close(other[:, :n], logits[:, :n], rtol=0, atol=1e-12)
        assert not torch.equal(other[:, n], logits[:, n])


@pytest.mark.parametrize("case", ["axial-attention", "reversible-axial-attention"])
def test_bfloat16_autocast_trains(case: str) -> None:
    model = gMLPGPT(**CASES[case])
    wrapper = AutoregressiveWrapper(model)
    ids = make_ids(25)
    exact = wrapper(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = wrapper(ids)
    loss.backward()
    assert loss.dtype == torch.float32
    assert abs(loss.item() - exact.item()) < 0.05 * exact.item()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_wrapper_loss_is_upstreams() -> None:
    package = pytest.importorskip(
        "g_mlp_gpt.autoregressive_wrapper", reason="g-mlp-gpt==0.0.15 is not installed"
    )
    theirs, ours = pair(SMALL, torch.float64)
    ids = make_ids(25)
    for settings in ({}, {"ignore_index": 3}):
        expected = package.AutoregressiveWrapper(theirs, **settings)(ids)
        got = AutoregressiveWrapper(ours, **settings)(ids)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_empty_sequences_and_narrow_integers() -> None:
    model = gMLPGPT(**SMALL, **AXIAL)
    assert model(make_ids(0)).shape == (2, 0, 16)
    ids = make_ids(9)
    assert torch.equal(model(ids.to(torch.uint8)), model(ids))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"num_tokens": 0}, ValueError, "num_tokens must be at least 1"),
        ({"dim": 8.0}, TypeError, "dim must be an integer"),
        ({"depth": 0}, ValueError, "depth must be at least 1"),
        ({"seq_len": True}, TypeError, "seq_len must be an integer"),
        ({"heads": 5}, ValueError, "heads must divide .* 12 channels, got 5"),
        ({"dim": 7, "ff_mult": 3}, ValueError, r"dim \* ff_mult must be even"),
        ({"prob_survival": 1.5}, ValueError, "prob_survival must be a probability"),
        ({"window": 0}, ValueError, "window must be at least 1"),
        ({"window": (4, 4, 4)}, ValueError, "window must be .* depth = 2"),
        ({"window": [4, 4]}, TypeError, "window must be an integer"),
        ({"window": ((4, 1, 2), 4)}, ValueError, r"window must have .* got \(4, 1, 2\)"),
        ({"window": ((4, 0), 4)}, ValueError, r"window \(axial\) must be at least 1"),
        ({"window": ("4", 4)}, TypeError, "window must be an integer"),
        ({"attn_dim": (4,)}, ValueError, "attn_dim must be .* depth = 2"),
        ({"attn_dim": 0}, ValueError, "attn_dim must be at least 1"),
        ({"attn_dim": (4, 2.5)}, TypeError, "attn_dim must be an integer"),
        ({"act": "gelu"}, TypeError, "act must be a module or a function"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_constructor_refuses(change: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        gMLPGPT(**{**SMALL, **change})


@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        ([[1, 2]], TypeError, "x must be a tensor"),
        (torch.zeros(2, 5), TypeError, "x must be integers, got torch.float32"),
        (torch.zeros(5, dtype=torch.long), ValueError, r"x must be \(batch, tokens\)"),
        (torch.full((1, 4), 16), ValueError, "x must be from 0 to num_tokens - 1 = 15"),
        (torch.full((1, 4), -1), ValueError, "x must be from 0 to num_tokens - 1 = 15"),
        (torch.zeros(1, 26, dtype=torch.long), ValueError, "x must have .* seq_len"),
        (torch.zeros(1, 4, dtype=torch.long, device="meta"), ValueError, "model's device"),
    ],
)
def test_forward_and_loss_refuse(ids: object, error: type[Exception], words: str) -> None:
    model = gMLPGPT(**SMALL)
    for function in (model, AutoregressiveWrapper(model)):
        with pytest.raises(error, match=words):
            function(ids)


def test_lengths_at_the_limit() -> None:
    model = gMLPGPT(**SMALL)
    assert model(make_ids(24)).shape == (2, 24, 16)
    with pytest.raises(ValueError, match="x must have at most seq_len = 24 tokens"):
        model(make_ids(25))
    wrapper = AutoregressiveWrapper(model)
    assert wrapper(make_ids(25)).isfinite()
    with pytest.raises(ValueError, match="x must have from 2 to seq_len"):
        wrapper(make_ids(1))
