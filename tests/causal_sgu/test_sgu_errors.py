"""Bad arguments of hk.causal_sgu: the error names the argument, what was given, what is allowed."""

from __future__ import annotations

import pytest
import torch

import hierkernels as hk

B, N, C, H, W = 2, 5, 8, 2, 3


def _good(window: int | None = None) -> dict:
    rows, columns = (N, N) if window is None else (window, 2 * window)
    return {
        "residual": torch.zeros(B, N, C),
        "gate": torch.zeros(B, N, C),
        "weight": torch.zeros(H, rows, columns),
        "bias": torch.zeros(H, rows),
        "window": window,
    }


def _all(dtype: torch.dtype, parameters: torch.dtype) -> dict:
    good = {k: v.to(dtype) for k, v in _good().items() if v is not None}
    return good | {"weight": good["weight"].to(parameters), "bias": good["bias"].to(parameters)}


META = torch.device("meta")
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
# name: (window, what differs from good arguments, the error, what its message must contain)
BAD: dict[str, tuple[int | None, dict, type[Exception], tuple[str, ...]]] = {
    "gate-list": (None, {"gate": [1.0]}, TypeError, ("gate must be a torch.Tensor", "list")),
    "residual-none": (None, {"residual": None}, TypeError, ("residual must be a torch", "NoneTy")),
    "weight-none": (None, {"weight": None}, TypeError, ("weight must be a torch", "NoneType")),
    "bias-float": (None, {"bias": 1.0}, TypeError, ("bias must be a torch.Tensor", "float")),
    "gate-rank": (
        None,
        {"gate": torch.zeros(B, C)},
        ValueError,
        ("gate must have 3 dimensions (batch, tokens, channels)", "(2, 8)"),
    ),
    "gate-int": (
        None,
        {"gate": torch.zeros(B, N, C, dtype=torch.int64)},
        TypeError,
        ("gate must be float32, bfloat16, float16 or float64", "torch.int64"),
    ),
    "residual-shape": (
        None,
        {"residual": torch.zeros(B, N, 1)},
        ValueError,
        ("residual must have the shape of gate (2, 5, 8)", "(2, 5, 1)"),
    ),
    "gate-residual-shape": (
        None,
        {"gate_residual": torch.zeros(N, C)},
        ValueError,
        ("gate_residual must have the shape of gate (2, 5, 8)", "(5, 8)"),
    ),
    "residual-dtype": (
        None,
        {"residual": torch.zeros(B, N, C, dtype=BF16)},
        TypeError,
        ("residual must have the dtype of gate (torch.float32)", "torch.bfloat16"),
    ),
    "gate-residual-device": (
        None,
        {"gate_residual": torch.zeros(B, N, C, device=META)},
        ValueError,
        ("gate_residual must be on the device of gate (cpu)", "meta"),
    ),
    "window-0": (W, {"window": 0}, ValueError, ("window must be at least 1", "got 0")),
    "window-negative": (W, {"window": -3}, ValueError, ("window must be at least 1", "got -3")),
    "window-float": (W, {"window": 3.0}, TypeError, ("window must be an int or None", "float")),
    "window-bool": (W, {"window": True}, TypeError, ("window must be an int or None", "bool")),
    "weight-rank": (
        None,
        {"weight": torch.zeros(N, N)},
        ValueError,
        ("weight must have shape (heads, size, size)", "(5, 5)"),
    ),
    "weight-not-square": (
        None,
        {"weight": torch.zeros(H, N, N + 1)},
        ValueError,
        ("weight must have shape (heads, size, size)", "(2, 5, 6)"),
    ),
    "weight-of-the-windowed-unit": (
        None,
        {"weight": torch.zeros(H, W, 2 * W)},
        ValueError,
        ("weight must have shape (heads, size, size)", "(2, 3, 6)"),
    ),
    "weight-of-the-global-unit": (
        W,
        {"weight": torch.zeros(H, N, N)},
        ValueError,
        ("weight must have shape (heads, 3, 6)", "(2, 5, 5)"),
    ),
    "tokens-above-the-size": (
        None,
        {"weight": torch.zeros(H, N - 1, N - 1), "bias": torch.zeros(H, N - 1)},
        ValueError,
        ("weight must have a size of at least the 5 tokens of gate", "got 4"),
    ),
    "heads-do-not-divide": (
        None,
        {"weight": torch.zeros(3, N, N), "bias": torch.zeros(3, N)},
        ValueError,
        ("weight must have a number of heads that divides the 8 channels", "got 3 heads"),
    ),
    "no-heads": (
        None,
        {"weight": torch.zeros(0, N, N), "bias": torch.zeros(0, N)},
        ValueError,
        ("weight must have a number of heads that divides the 8 channels", "got 0 heads"),
    ),
    "bias-shape": (
        None,
        {"bias": torch.zeros(H, N + 1)},
        ValueError,
        ("bias must have shape (2, 5)", "(2, 6)"),
    ),
    "bias-shape-windowed": (
        W,
        {"bias": torch.zeros(H, 2 * W)},
        ValueError,
        ("bias must have shape (2, 3)", "(2, 6)"),
    ),
    "weight-dtype": (
        None,
        {"weight": torch.zeros(H, N, N, dtype=BF16)},
        TypeError,
        ("weight must be torch.float32 where gate is torch.float32", "torch.bfloat16"),
    ),
    "weight-dtype-half": (
        None,
        _all(BF16, F64),
        TypeError,
        ("weight must be torch.bfloat16 or torch.float32 where gate is", "torch.float64"),
    ),
    "bias-dtype": (
        None,
        _all(BF16, F32) | {"bias": torch.zeros(H, N, dtype=BF16)},
        TypeError,
        ("bias must have the dtype of weight (torch.float32)", "torch.bfloat16"),
    ),
    "weight-device": (
        None,
        {"weight": torch.zeros(H, N, N, device=META)},
        ValueError,
        ("weight must be on the device of gate (cpu)", "meta"),
    ),
    "bias-device": (
        None,
        {"bias": torch.zeros(H, N, device=META)},
        ValueError,
        ("bias must be on the device of gate (cpu)", "meta"),
    ),
    "activation": (
        None,
        {"activation": "swish"},
        ValueError,
        ("activation must be one of relu, gelu, silu, tanh, sigmoid or None", "'swish'"),
    ),
    "activation-function": (
        None,
        {"activation": torch.relu},
        ValueError,
        ("activation must be one of relu, gelu, silu, tanh, sigmoid or None", "relu"),
    ),
    "backend": (
        None,
        {"backend": "gpu"},
        ValueError,
        ("backend must be one of cuda, triton, cpu, reference", "'gpu'"),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument(name: str) -> None:
    window, changes, kind, parts = BAD[name]
    arguments = _good(window) | changes
    for call in (hk.causal_sgu, lambda **kw: _explain(**kw)):
        with pytest.raises(kind) as raised:
            call(**arguments)
        for part in parts:
            assert part in str(raised.value)


def _explain(
    residual: object, gate: object, weight: object, bias: object, **options: object
) -> None:
    hk.explain("causal_sgu", residual, gate, weight, bias, **options)


@pytest.mark.parametrize("window", [None, W, N, 2 * N])
def test_good_arguments(window: int | None) -> None:
    assert hk.causal_sgu(**_good(window)).shape == (B, N, C)


def test_kinds_of_parameters() -> None:
    for dtype, parameters in ((BF16, BF16), (BF16, F32), (torch.float16, F32), (F64, F64)):
        assert hk.causal_sgu(**_all(dtype, parameters)).dtype == dtype
