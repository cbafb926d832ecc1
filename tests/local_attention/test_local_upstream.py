"""hk.local_attention against the package local-attention, where that is without defects.

Its defects (python_models and the docs name them): padded tail keys are attended when nothing
masks them, a row that sees nothing is the mean over all slots. So every call here passes a mask,
and each query sees a key or is left out of the comparison.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import hierkernels as hk

upstream = pytest.importorskip(
    "local_attention", reason="local-attention==1.11.2 is the oracle and not installed"
)
B, H, D, W = 2, 3, 8, 6

# Options of hk.local_attention; beyond these the defaults.
CASES: dict[str, dict] = {
    "causal": {},
    "causal-exact": {"exact_window": True},
    "causal-back2": {"look_backward": 2},
    "causal-back2-exact": {"look_backward": 2, "exact_window": True},
    "causal-back3": {"look_backward": 3},
    "causal-back3-exact": {"look_backward": 3, "exact_window": True},
    "both": {"is_causal": False},
    "both-exact": {"is_causal": False, "exact_window": True},
    "both-back2-forward2": {"is_causal": False, "look_backward": 2, "look_forward": 2},
    "both-back2-forward2-exact": {
        "is_causal": False, "look_backward": 2, "look_forward": 2, "exact_window": True,
    },
    "both-forward0": {"is_causal": False, "look_forward": 0},
    "both-back3": {"is_causal": False, "look_backward": 3},
    "both-forward3-exact": {"is_causal": False, "look_forward": 3, "exact_window": True},
    "back0": {"look_backward": 0},
    "scale": {"scale": 0.7},
}  # fmt: skip
LENGTHS = (1, 5, 6, 7, 24, 37)


def _theirs(options: dict) -> Callable[..., torch.Tensor]:
    return upstream.LocalAttention(
        window_size=W,
        causal=options.get("is_causal", True),
        look_backward=options.get("look_backward", 1),
        look_forward=options.get("look_forward"),
        exact_windowsize=options.get("exact_window", False),
        scale=options.get("scale"),
        autopad=True,
        use_rotary_pos_emb=False,
    )


def _tensors(n: int, options: dict, bias: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    buckets = options.get("look_backward", 1) + 1
    buckets += options.get("look_forward", 0 if options.get("is_causal", True) else 1)
    shapes = [(B, H, n, D)] * 3 + ([(H, W, buckets * W)] if bias else [])
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]


@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("case", CASES)
def test_equals_upstream(case: str, bias: bool, padding: bool) -> None:
    options = CASES[case]
    for n in LENGTHS:
        leaves = _tensors(n, options, bias)
        mask = torch.ones(B, n, dtype=torch.bool)
        if padding:
            mask[0, n - n // 3 :] = False
            mask[1, 1 : n // 4 + 1] = False
        ours, lse = hk.local_attention(
            *leaves[:3], W, **options, attn_bias=leaves[3] if bias else None,
            key_padding_mask=mask, return_lse=True,
        )  # fmt: skip
        theirs = _theirs(options)(*leaves[:3], mask=mask, attn_bias=leaves[3] if bias else None)
        seen = (lse > -torch.inf)[..., None]
        assert seen.double().mean() > 0.5
        weights = torch.linspace(-1, 1, ours.numel(), dtype=ours.dtype).view_as(ours) * seen
        torch.testing.assert_close(ours * seen, theirs * seen, rtol=0, atol=1e-12)
        gradients = [torch.autograd.grad((out * weights).sum(), leaves) for out in (ours, theirs)]
        for name, a, e in zip(("dq", "dk", "dv", "dbias"), *gradients, strict=False):
            torch.testing.assert_close(a, e, rtol=0, atol=1e-12, msg=f"{name}, length {n}")


def test_defects_are_not_followed() -> None:
    """Where the package errs we do what is meant: no tail keys, and 0 for rows that see nothing."""
    q, k, v = _tensors(W + 1, {"is_causal": False}, bias=False)
    ours = hk.local_attention(q, k, v, W, is_causal=False)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(ours, expected)
    assert not torch.allclose(_theirs({"is_causal": False})(q, k, v), expected)
    nothing = torch.zeros(B, W + 1, dtype=torch.bool)
    assert not hk.local_attention(q, k, v, W, key_padding_mask=nothing).any()


@pytest.mark.parametrize("n", [1, 5, 6, 7, 24, 37])
def test_zero_lookback_equals_gmlp(n: int) -> None:
    """The windowed attention of g-mlp-gpt pads with zero keys and takes its keys as values."""
    gmlp = pytest.importorskip("g_mlp_gpt.g_mlp_gpt", reason="g-mlp-gpt==0.0.15 is not installed")
    layer = gmlp.LocalAttention(10, D, 10, window=W).double()
    x = torch.randn(B, n, 10, dtype=torch.float64, requires_grad=True)
    q, k, _ = layer.to_qkv(x)[:, None].chunk(3, dim=-1)
    ours = layer.to_out(hk.local_attention(q, k, k, W, zero_lookback=True)[:, 0])
    theirs = layer(x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    leaves = (x, layer.to_qkv.weight)
    gradients = [torch.autograd.grad(out.square().sum(), leaves) for out in (ours, theirs)]
    for a, e in zip(*gradients, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-12)
