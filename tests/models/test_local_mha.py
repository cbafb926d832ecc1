"""LocalMHA against the package that it follows, and where it does better."""

from __future__ import annotations

import pytest
import torch

from python_models.layers import LocalMHA

W = 4
SMALL = {"dim": 12, "window_size": W, "dim_head": 8, "heads": 3}
CASES: dict[str, dict] = {
    "default": {},
    "causal": {"causal": True, "prenorm": True},
    "causal-bucketed": {"causal": True, "exact_windowsize": False},
    "bucketed": {"exact_windowsize": False},
    "causal-back2": {"causal": True, "look_backward": 2},
    "back2-forward2": {"look_backward": 2, "look_forward": 2},
    "forward0": {"look_forward": 0},
    "no-rotary": {"causal": True, "use_rotary_pos_emb": False},
    "xpos": {"causal": True, "use_xpos": True},
    "xpos-base": {"use_xpos": True, "xpos_scale_base": 7, "exact_windowsize": False},
    "xpos-back2-forward2": {"use_xpos": True, "look_backward": 2, "look_forward": 2},
    "qk-rmsnorm": {"causal": True, "qk_rmsnorm": True, "qk_scale": 5},
    "gated": {"causal": True, "prenorm": True, "gate_values_per_head": True},
}


def _pair(case: str) -> tuple[torch.nn.Module, LocalMHA]:
    package = pytest.importorskip(
        "local_attention", reason="local-attention==1.11.2 is the oracle and not installed"
    )
    torch.manual_seed(0)
    theirs = package.LocalMHA(**SMALL, **CASES[case]).double()
    ours = LocalMHA(**SMALL, **CASES[case]).double()
    for parameter in theirs.parameters():  # scales and norms start at one
        torch.nn.init.normal_(parameter)
    expected = [(name, t.shape) for name, t in theirs.state_dict().items()]
    assert [(name, t.shape) for name, t in ours.state_dict().items()] == expected
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def _results(module: torch.nn.Module, x: torch.Tensor, **inputs) -> list[torch.Tensor]:
    out = module(x, **inputs)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    leaves = [x, *module.parameters(), *(t for t in inputs.values() if t.requires_grad)]
    return [out, *torch.autograd.grad((out * weights).sum(), leaves)]


def _assert_same(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert float((a - e).detach().abs().max()) <= 1e-9


# Whole windows and not, one, fewer tokens than a window, more than a segment of xpos. Upstream pads
# to whole windows and attends the padding unless there is a mask.
@pytest.mark.parametrize("n", [1, 3, 8, 21, 50])
@pytest.mark.parametrize("case", CASES)
def test_equals_upstream(case: str, n: int) -> None:
    theirs, ours = _pair(case)
    x = torch.randn(2, n, SMALL["dim"], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, n, dtype=torch.bool)
    _assert_same(_results(ours, x, mask=mask), _results(theirs, x, mask=mask))
    if n % W == 0:
        _assert_same(_results(ours, x), _results(theirs, x))
    mask[1, n - min(n // 5, W - 1) :] = False  # less than a window: every token sees one
    _assert_same(_results(ours, x, mask=mask), _results(theirs, x, mask=mask))


@pytest.mark.parametrize("case", ["causal", "bucketed", "xpos"])
def test_bias_equals_upstream(case: str) -> None:
    theirs, ours = _pair(case)
    x = torch.randn(2, 21, SMALL["dim"], dtype=torch.float64, requires_grad=True)
    slots = 2 * W if CASES[case].get("causal") else 3 * W
    bias = torch.randn(SMALL["heads"], W, slots, dtype=torch.float64, requires_grad=True)
    inputs = {"mask": torch.ones(2, 21, dtype=torch.bool), "attn_bias": bias}
    _assert_same(_results(ours, x, **inputs), _results(theirs, x, **inputs))


@pytest.mark.parametrize("case", [name for name in CASES if CASES[name].get("causal")])
def test_one_token_at_a_time(case: str) -> None:
    torch.manual_seed(0)
    layer = LocalMHA(**SMALL, **CASES[case]).double()
    x = torch.randn(2, 19, SMALL["dim"], dtype=torch.float64)
    expected = layer(x)
    out, cache = layer(x[:, :3], return_cache=True)
    steps = [out]
    for t in range(3, 19):
        out, cache = layer(x[:, t : t + 1], cache=cache, return_cache=True)
        steps.append(out)
    assert cache.shape == (2, 2, SMALL["heads"], 19, SMALL["dim_head"])
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_xpos_of_a_long_sequence_is_finite(dtype: torch.dtype) -> None:
    """Counted from the middle of 4000 tokens the factors would overflow, in float32 as well."""
    torch.manual_seed(0)
    layer = LocalMHA(**SMALL, causal=True, use_xpos=True)
    x = torch.randn(1, 4000, SMALL["dim"])
    expected = layer.double()(x.double())
    out = layer.to(dtype)(x.to(dtype)).double()
    error = (out - expected).abs().max() / expected.abs().max()
    assert error < 32 * torch.finfo(dtype).eps


def test_dropout_is_for_training_alone() -> None:
    layer = LocalMHA(**SMALL, causal=True, dropout=0.5)
    x = torch.randn(1, 9, SMALL["dim"])
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_bad_caches() -> None:
    layer = LocalMHA(**SMALL, causal=True)
    x = torch.randn(1, 2, SMALL["dim"])
    _, cache = layer(x, return_cache=True)
    with pytest.raises(ValueError, match="cache needs one token"):
        layer(x, cache=cache)
    with pytest.raises(ValueError, match="mask and attn_bias must be None"):
        layer(x[:, :1], cache=cache, mask=torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="causal=True"):
        LocalMHA(**SMALL)(x[:, :1], cache=cache)
