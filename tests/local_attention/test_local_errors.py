"""Bad arguments of hk.local_attention: the error names the argument, what came, what is allowed."""

from __future__ import annotations

import pytest
import torch

import hierkernels as hk

B, HQ, HKV, N, D, W = 2, 4, 2, 9, 8, 4


def _good() -> dict:
    q, kv = torch.zeros(B, HQ, N, D), torch.zeros(B, HKV, N, D)
    return {"q": q, "k": kv, "v": kv, "window_size": W}


# name: (the arguments that differ from good ones, the error, what its message must contain)
BAD: dict[str, tuple[dict, type[Exception], tuple[str, ...]]] = {
    "q-list": ({"q": [1.0]}, TypeError, ("q must be a torch.Tensor", "list")),
    "k-rank": ({"k": torch.zeros(N, D)}, ValueError, ("k must have 4 dimensions", "(9, 8)")),
    "lengths": (
        {name: torch.zeros(B, HKV, 7, D) for name in "kv"},
        ValueError,
        ("k must have the tokens of q (9)", "7"),
    ),
    "heads": (
        {name: torch.zeros(B, 3, N, D) for name in "kv"},
        ValueError,
        ("q must have a multiple of the heads", "4 heads for 3"),
    ),
    "window-zero": ({"window_size": 0}, ValueError, ("window_size must be at least 1", "got 0")),
    "window-negative": ({"window_size": -3}, ValueError, ("window_size must be at least 1", "-3")),
    "window-huge": ({"window_size": 2**31}, ValueError, ("window_size", "at most", str(2**31))),
    "window-float": ({"window_size": 4.0}, TypeError, ("window_size must be an int", "float")),
    "window-bool": ({"window_size": True}, TypeError, ("window_size must be an int", "bool")),
    "window-pair": ({"window_size": (4, 0)}, TypeError, ("window_size must be an int", "tuple")),
    "back-negative": (
        {"look_backward": -1}, ValueError, ("look_backward must be at least 0", "got -1")
    ),
    "back-none": ({"look_backward": None}, TypeError, ("look_backward must be an int", "None")),
    "forward-causal": (
        {"look_forward": 1}, ValueError, ("look_forward must be 0 or None with is_causal", "got 1")
    ),
    "forward-negative": (
        {"look_forward": -1, "is_causal": False}, ValueError, ("look_forward must be at least 0",)
    ),
    "forward-float": (
        {"look_forward": 0.5, "is_causal": False}, TypeError, ("look_forward must be an int",)
    ),
    "lse-int": ({"return_lse": 1}, TypeError, ("return_lse must be True or False", "got 1")),
    "causal-none": ({"is_causal": None}, TypeError, ("is_causal must be True or False", "None")),
    "exact-int": ({"exact_window": 1}, TypeError, ("exact_window must be True or False", "1")),
    "zero-int": ({"zero_lookback": 0}, TypeError, ("zero_lookback must be True or False", "0")),
    "bias-slots": (
        {"attn_bias": torch.zeros(HQ, W, 3 * W)},
        ValueError,
        ("attn_bias must have shape", "(4, 4, 8)", "(4, 4, 12)"),
    ),
    "bias-slots-forward": (
        {"attn_bias": torch.zeros(HQ, W, 2 * W), "is_causal": False},
        ValueError,
        ("attn_bias must have shape", "(4, 4, 12)", "(4, 4, 8)"),
    ),
    "bias-heads": (
        {"attn_bias": torch.zeros(1, W, 2 * W)}, ValueError, ("attn_bias must have shape",)
    ),
    "bias-rank": (
        {"attn_bias": torch.zeros(1, HQ, W, 2 * W)}, ValueError, ("attn_bias must have shape",)
    ),
    "bias-bool": (
        {"attn_bias": torch.zeros(HQ, W, 2 * W, dtype=torch.bool)},
        TypeError,
        ("attn_bias must be float32", "torch.bool"),
    ),
    "bias-list": ({"attn_bias": [0.0]}, TypeError, ("attn_bias must be a torch.Tensor", "list")),
    "bias-device": (
        {"attn_bias": torch.zeros(HQ, W, 2 * W, device="meta")},
        ValueError,
        ("attn_bias must be on the device of q (cpu)", "meta"),
    ),
    "padding-shape": (
        {"key_padding_mask": torch.ones(B, 7, dtype=torch.bool)},
        ValueError,
        ("key_padding_mask must have shape (batch, keys) = (2, 9)", "(2, 7)"),
    ),
    "dropout": ({"dropout_p": 1.0}, ValueError, ("dropout_p must be at least 0 and below 1",)),
    "scale": ({"scale": "1"}, TypeError, ("scale must be a number", "str")),
    "backend": ({"backend": "gpu"}, ValueError, ("backend must be one of", "'gpu'")),
}  # fmt: skip


@pytest.mark.parametrize("backend", [None, "reference"], ids=["auto", "reference"])
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str, backend: str | None) -> None:
    changes, kind, words = BAD[name]
    with pytest.raises(kind) as raised:
        hk.local_attention(**{**_good(), "backend": backend, **changes})
    for word in words:
        assert word in str(raised.value), raised.value
    if name != "backend":
        with pytest.raises(kind):
            hk.explain("local_attention", **{**_good(), **changes})


def test_misspelt_option() -> None:
    with pytest.raises(TypeError, match="causal"):
        hk.local_attention(**_good(), causal=True)


def test_a_forced_backend_does_not_fall_back() -> None:
    with pytest.raises(NotImplementedError, match="backend 'cuda' does not support this call"):
        hk.local_attention(**_good(), backend="cuda")


def test_explain() -> None:
    tensors = (_good()[name] for name in "qkv")
    choice = hk.explain("local_attention", *tensors, W, zero_lookback=True, return_lse=True)
    assert "cuda" in choice.refusals and choice.backend in ("cpu", "reference")
    assert hk.explain("local_attention", **_good(), backend="reference").backend == "reference"
