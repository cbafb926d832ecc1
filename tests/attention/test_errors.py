"""Bad arguments of hk.attention: the error names the argument, what was given, what is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

import hierkernels as hk
from hierkernels.ops.attention import reference
from hierkernels.ops.attention.call import AttentionCall

B, HQ, HKV, NQ, NK, D, DV = 2, 4, 2, 3, 5, 8, 6


def _good() -> dict:
    return {
        "q": torch.zeros(B, HQ, NQ, D),
        "k": torch.zeros(B, HKV, NK, D),
        "v": torch.zeros(B, HKV, NK, DV),
    }


META = torch.device("meta")
# name: (the arguments that differ from good ones, the error, what its message must contain)
BAD: dict[str, tuple[dict, type[Exception], tuple[str, ...]]] = {
    "is_causal-text": ({"is_causal": "no"}, TypeError, ("is_causal must be True or False", "'no'")),
    "is_causal-tensor": ({"is_causal": torch.ones(NQ, NK)}, TypeError, ("is_causal must be True",)),
    "return_lse-text": ({"return_lse": "no"}, TypeError, ("return_lse must be True or False",)),
    # q, k, v
    "q-list": ({"q": [1.0]}, TypeError, ("q must be a torch.Tensor", "list")),
    "k-none": ({"k": None}, TypeError, ("k must be a torch.Tensor", "NoneType")),
    "q-rank-3": ({"q": torch.zeros(B, NQ, D)}, ValueError, ("q must have 4 dim", "(2, 3, 8)")),
    "v-rank-5": (
        {"v": torch.zeros(1, 1, 1, 1, 1)},
        ValueError,
        ("v must have 4", "(1, 1, 1, 1, 1)"),
    ),
    "q-int": (
        {"q": torch.zeros(B, HQ, NQ, D, dtype=torch.int64)},
        TypeError,
        ("q must be float32, bfloat16, float16 or float64", "torch.int64"),
    ),
    "q-complex": (
        {"q": torch.zeros(B, HQ, NQ, D, dtype=torch.complex64)},
        TypeError,
        ("q must be float32", "torch.complex64"),
    ),
    "k-dtype": (
        {"k": torch.zeros(B, HKV, NK, D, dtype=torch.float16)},
        TypeError,
        ("k must have the dtype of q (torch.float32)", "torch.float16"),
    ),
    "v-dtype": (
        {"v": torch.zeros(B, HKV, NK, DV, dtype=torch.float64)},
        TypeError,
        ("v must have the dtype of q (torch.float32)", "torch.float64"),
    ),
    "k-device": (
        {"k": torch.zeros(B, HKV, NK, D, device=META)},
        ValueError,
        ("k must be on the device of q (cpu)", "meta"),
    ),
    "v-device": (
        {"v": torch.zeros(B, HKV, NK, DV, device=META)},
        ValueError,
        ("v must be on the device of q (cpu)", "meta"),
    ),
    "k-batch": ({"k": torch.zeros(3, HKV, NK, D)}, ValueError, ("k must have the batch size", "3")),
    "v-batch": ({"v": torch.zeros(1, HKV, NK, D)}, ValueError, ("v must have the batch size", "1")),
    "k-channels": (
        {"k": torch.zeros(B, HKV, NK, 9)},
        ValueError,
        ("k must have the channels of q (8)", "9"),
    ),
    "no-channels": (
        {"q": torch.zeros(B, HQ, NQ, 0), "k": torch.zeros(B, HKV, NK, 0)},
        ValueError,
        ("q must have at least one channel", "(2, 4, 3, 0)"),
    ),
    "v-no-channels": (
        {"v": torch.zeros(B, HKV, NK, 0)},
        ValueError,
        ("v must have at least one channel", "(2, 2, 5, 0)"),
    ),
    "v-length": (
        {"v": torch.zeros(B, HKV, NK + 1, DV)},
        ValueError,
        ("v must have the heads and tokens of k (2, 5)", "(2, 6)"),
    ),
    "v-heads": (
        {"v": torch.zeros(B, 1, NK, DV)},
        ValueError,
        ("v must have the heads and tokens of k (2, 5)", "(1, 5)"),
    ),
    "heads-do-not-divide": (
        {"k": torch.zeros(B, 3, NK, D), "v": torch.zeros(B, 3, NK, DV)},
        ValueError,
        ("q must have a multiple of the heads of k and v", "4 heads for 3"),
    ),
    "more-kv-heads": (
        {"k": torch.zeros(B, 8, NK, D), "v": torch.zeros(B, 8, NK, DV)},
        ValueError,
        ("q must have a multiple of the heads of k and v", "4 heads for 8"),
    ),
    "no-kv-heads": (
        {"k": torch.zeros(B, 0, NK, D), "v": torch.zeros(B, 0, NK, DV)},
        ValueError,
        ("q must have a multiple of the heads of k and v", "4 heads for 0"),
    ),
    # window
    "window-int": ({"window_size": 5}, ValueError, ("window_size must be (left, right)", "5")),
    "window-one": (
        {"window_size": (5,)},
        ValueError,
        ("window_size must be (left, right)", "(5,)"),
    ),
    "window-float": (
        {"window_size": (1.5, 0)},
        TypeError,
        ("window_size must hold ints or None", "(1.5, 0)"),
    ),
    "window-bool": (
        {"window_size": (True, 0)},
        TypeError,
        ("window_size must hold ints or None", "(True, 0)"),
    ),
    "window-left-negative": (
        {"window_size": (-1, 0)},
        ValueError,
        ("window_size must not be negative", "(-1, 0)"),
    ),
    "window-right-negative": (
        {"window_size": (None, -2)},
        ValueError,
        ("window_size must not be negative", "(None, -2)"),
    ),
    "window-right-negative-causal": (
        {"window_size": (None, -2), "is_causal": True},
        ValueError,
        ("window_size must not be negative", "(None, -2)"),
    ),
    # bias and masks
    "bias-list": ({"attn_bias": [0.0]}, TypeError, ("attn_bias must be a torch.Tensor", "list")),
    "bias-bool": (
        {"attn_bias": torch.ones(NQ, NK, dtype=torch.bool)},
        TypeError,
        ("attn_bias must be a float tensor", "attn_mask", "torch.bool"),
    ),
    "bias-shape": (
        {"attn_bias": torch.zeros(NK, NQ)},
        ValueError,
        ("attn_bias must broadcast to (batch, heads, queries, keys) = (2, 4, 3, 5)", "(5, 3)"),
    ),
    "bias-kv-heads": (  # a head of k is no head of the scores
        {"attn_bias": torch.zeros(HKV, NQ, NK)},
        ValueError,
        ("attn_bias must broadcast", "(2, 3, 5)"),
    ),
    "bias-rank-5": (
        {"attn_bias": torch.zeros(1, 1, 1, 1, 1)},
        ValueError,
        ("attn_bias must broadcast", "(1, 1, 1, 1, 1)"),
    ),
    "bias-device": (
        {"attn_bias": torch.zeros(NQ, NK, device=META)},
        ValueError,
        ("attn_bias must be on the device of q (cpu)", "meta"),
    ),
    "mask-float": (
        {"attn_mask": torch.zeros(NQ, NK)},
        TypeError,
        ("attn_mask must be bool (True = may attend)", "torch.float32"),
    ),
    "mask-shape": (
        {"attn_mask": torch.ones(NQ, NK + 1, dtype=torch.bool)},
        ValueError,
        ("attn_mask must broadcast", "(2, 4, 3, 5)", "(3, 6)"),
    ),
    "mask-device": (
        {"attn_mask": torch.ones(NQ, NK, dtype=torch.bool, device=META)},
        ValueError,
        ("attn_mask must be on the device of q (cpu)", "meta"),
    ),
    "mask-string": (
        {"attn_mask": "causal"},
        TypeError,
        ("attn_mask must be a torch.Tensor", "str"),
    ),
    "padding-list": (
        {"key_padding_mask": [[True] * NK] * B},
        TypeError,
        ("key_padding_mask must be a torch.Tensor", "list"),
    ),
    "padding-shape": (
        {"key_padding_mask": torch.ones(B, NQ, dtype=torch.bool)},
        ValueError,
        ("key_padding_mask must have shape (batch, keys) = (2, 5)", "(2, 3)"),
    ),
    "padding-broadcast": (
        {"key_padding_mask": torch.ones(1, NK, dtype=torch.bool)},
        ValueError,
        ("key_padding_mask must have shape (batch, keys) = (2, 5)", "(1, 5)"),
    ),
    "padding-dtype": (
        {"key_padding_mask": torch.ones(B, NK, dtype=torch.int64)},
        TypeError,
        ("key_padding_mask must be bool (True = real token)", "torch.int64"),
    ),
    "padding-device": (
        {"key_padding_mask": torch.ones(B, NK, dtype=torch.bool, device=META)},
        ValueError,
        ("key_padding_mask must be on the device of q", "meta"),
    ),
    # numbers
    "dropout-negative": ({"dropout_p": -0.1}, ValueError, ("dropout_p must be at least 0", "-0.1")),
    "dropout-one": ({"dropout_p": 1.0}, ValueError, ("dropout_p must be", "below 1", "1.0")),
    "dropout-nan": ({"dropout_p": math.nan}, ValueError, ("dropout_p must be", "nan")),
    "dropout-none": ({"dropout_p": None}, TypeError, ("dropout_p must be a number", "NoneType")),
    "seed-float": (
        {"dropout_p": 0.1, "dropout_seed": 1.0},
        TypeError,
        ("dropout_seed must be an int or an int64 tensor", "float"),
    ),
    "seed-too-large": (
        {"dropout_p": 0.1, "dropout_seed": 2**63},
        ValueError,
        ("dropout_seed must fit 64 bits", str(2**63)),
    ),
    "seed-tensor-dtype": (
        {"dropout_p": 0.1, "dropout_seed": torch.zeros((), dtype=torch.int32)},
        ValueError,
        ("dropout_seed must be", "int64", "torch.int32"),
    ),
    "seed-tensor-shape": (
        {"dropout_p": 0.1, "dropout_seed": torch.zeros(2, dtype=torch.int64)},
        ValueError,
        ("dropout_seed must be", "one", "(2,)"),
    ),
    "seed-without-dropout": (  # checked even where it has no effect
        {"dropout_seed": "seven"},
        TypeError,
        ("dropout_seed must be an int or an int64 tensor", "str"),
    ),
    "softcap-zero": ({"softcap": 0.0}, ValueError, ("softcap must be a positive", "None", "0.0")),
    "softcap-negative": ({"softcap": -1.0}, ValueError, ("softcap must be a positive", "-1.0")),
    "softcap-nan": ({"softcap": math.nan}, ValueError, ("softcap must be a positive", "nan")),
    "softcap-inf": ({"softcap": math.inf}, ValueError, ("softcap must be a positive", "inf")),
    "softcap-text": ({"softcap": "5"}, TypeError, ("softcap must be a number", "str")),
    "scale-nan": ({"scale": math.nan}, ValueError, ("scale must be finite", "nan")),
    "scale-inf": ({"scale": -math.inf}, ValueError, ("scale must be finite", "-inf")),
    "scale-tensor": ({"scale": torch.ones(())}, TypeError, ("scale must be a number", "Tensor")),
    "scale-bool": ({"scale": True}, TypeError, ("scale must be a number", "bool")),
    "backend": ({"backend": "gpu"}, ValueError, ("backend must be one of", "reference", "'gpu'")),
}


@pytest.fixture
def no_kernel_may_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("a kernel ran")

    monkeypatch.setattr(reference, "attention", fail)
    monkeypatch.setattr(AttentionCall, "new_outputs", fail)  # every kernel's first step


@pytest.mark.parametrize("backend", [None, "reference"], ids=["auto", "reference"])
@pytest.mark.parametrize("name", BAD)
def test_bad_argument_is_named(name: str, backend: str | None, no_kernel_may_run: None) -> None:
    changes, kind, words = BAD[name]
    with pytest.raises(kind) as raised:
        hk.attention(**{**_good(), "backend": backend, **changes})
    message = str(raised.value)
    assert type(raised.value) is kind
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("name", ["q-list", "q-int", "k-dtype", "q-rank-3"])
def test_autocast_hides_no_error(name: str) -> None:
    # It casts floating-point inputs, which makes dtypes agree, and nothing else.
    changes, kind, words = BAD[name]
    with torch.autocast("cpu", torch.bfloat16):
        if name == "k-dtype":
            assert hk.attention(**{**_good(), **changes}).dtype == torch.bfloat16
            return
        with pytest.raises(kind, match=words[0]):
            hk.attention(**{**_good(), **changes})


def test_misspelt_option() -> None:
    with pytest.raises(TypeError, match="causal"):
        hk.attention(**_good(), causal=True)


@pytest.mark.parametrize(
    "options",
    [
        {"window_size": [2, None]},
        {"window_size": (10**30, 10**30)},
        {"attn_bias": torch.zeros(())},
        {"attn_bias": torch.zeros(1, 4, 1, 5), "attn_mask": torch.ones(5, dtype=torch.bool)},
        {"dropout_p": 0, "softcap": 3, "scale": 1},
        {"dropout_p": 0.1, "dropout_seed": torch.tensor([7])},
        {"dropout_p": 0.1, "dropout_seed": -(2**63)},
    ],
    ids=[
        "list",
        "huge-window",
        "scalar-bias",
        "partial-broadcast",
        "ints",
        "seed",
        "negative-seed",
    ],
)
@pytest.mark.parametrize("backend", [None, "reference"], ids=["auto", "reference"])
def test_unusual_but_allowed(options: dict, backend: str | None) -> None:
    out = hk.attention(**_good(), **options, backend=backend)
    assert out.shape == (B, HQ, NQ, DV) and not out.any()


def test_huge_window_is_no_window() -> None:
    q, k, v = (torch.randn(1, 2, n, 8) for n in (5, 9, 9))
    for huge in (2**31, 2**62, 2**63, 10**30):
        out = hk.attention(q, k, v, window_size=(huge, huge))
        assert torch.equal(out, hk.attention(q, k, v))


def _call_op(**changes: object) -> Callable[[], object]:
    arguments = {"q": torch.zeros(1, 1, 2, 4), "backend": "reference", **changes}

    def call() -> object:
        q = arguments["q"]
        return torch.ops.hierkernels.attention_forward(
            q, q, q, None, None, None, None, [0, 1, 0, 0, 0, 0, 1, 0, 2, 0], 1.0, 0.0, 0.0, 0, 0,
            arguments["backend"],
        )  # fmt: skip

    return call


def test_operator_called_directly_refuses_what_the_backend_cannot_do() -> None:
    _call_op()()
    with pytest.raises(NotImplementedError, match="backend 'cuda' does not support this call"):
        _call_op(backend="cuda")()
