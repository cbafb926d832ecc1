"""Bad arguments of hk.selected_attention: the error names the argument, what was given and what is
allowed, and comes before any kernel runs."""

from __future__ import annotations

import pytest
import torch

import hierkernels as hk

B, Hq, Hkv, N, D, n, S = 2, 4, 2, 10, 8, 3, 4


def _good() -> dict:
    return {
        "q": torch.zeros(B, Hq, N, D),
        "k": torch.zeros(B, Hkv, N, D),
        "v": torch.zeros(B, Hkv, N, D),
        "block_indices": torch.zeros(B, Hkv, N, n, dtype=torch.int64),
        "block_size": S,
    }


def _indices(*shape: int, **options) -> torch.Tensor:
    return torch.zeros(shape, dtype=options.pop("dtype", torch.int64), **options)


META = torch.device("meta")
# name: (what differs from good arguments, the error, what its message must contain)
BAD: dict[str, tuple[dict, type[Exception], tuple[str, ...]]] = {
    "q-list": ({"q": [1.0]}, TypeError, ("q must be a torch.Tensor", "list")),
    "q-rank": ({"q": torch.zeros(N, D)}, ValueError, ("q must have 4 dimensions", "(10, 8)")),
    "q-int": (
        {"q": torch.zeros(B, Hq, N, D, dtype=torch.int64)},
        TypeError,
        ("q must be float32, bfloat16, float16 or float64", "torch.int64"),
    ),
    "k-dtype": (
        {"k": torch.zeros(B, Hkv, N, D, dtype=torch.bfloat16)},
        TypeError,
        ("k must have the dtype of q (torch.float32)", "torch.bfloat16"),
    ),
    "v-tokens": (
        {"v": torch.zeros(B, Hkv, N + 1, D)},
        ValueError,
        ("v must have the heads and tokens of k (2, 10)", "(2, 11)"),
    ),
    "heads": (
        {"q": torch.zeros(B, 3, N, D)},
        ValueError,
        ("q must have a multiple of the heads of k and v", "3 heads for 2"),
    ),
    "indices-list": (
        {"block_indices": [[0]]},
        TypeError,
        ("block_indices must be a torch.Tensor", "list"),
    ),
    "indices-float": (
        {"block_indices": torch.zeros(B, Hkv, N, n)},
        TypeError,
        ("block_indices must be int32 or int64", "torch.float32"),
    ),
    "indices-int16": (
        {"block_indices": _indices(B, Hkv, N, n, dtype=torch.int16)},
        TypeError,
        ("block_indices must be int32 or int64", "torch.int16"),
    ),
    "indices-rank": (
        {"block_indices": _indices(B, N, n)},
        ValueError,
        ("block_indices must have shape", "(2, 2 or 4, 10, n)", "(2, 10, 3)"),
    ),
    "indices-heads": (
        {"block_indices": _indices(B, 1, N, n)},
        ValueError,
        ("block_indices must have shape", "(2, 2 or 4, 10, n)", "(2, 1, 10, 3)"),
    ),
    "indices-queries": (
        {"block_indices": _indices(B, Hkv, N - 1, n)},
        ValueError,
        ("block_indices must have shape", "(2, 2, 9, 3)"),
    ),
    "indices-device": (
        {"block_indices": _indices(B, Hkv, N, n, device=META)},
        ValueError,
        ("block_indices must be on the device of q (cpu)", "meta"),
    ),
    "indices-large": (
        {"block_indices": torch.full((B, Hkv, N, n), 3)},
        ValueError,
        ("block_indices must be at least -1 (none) and below", "= 3, got 3"),
    ),
    "indices-negative": (
        {"block_indices": torch.full((B, Hkv, N, n), -2)},
        ValueError,
        ("block_indices must be at least -1 (none)", "got -2"),
    ),
    "block-size-float": ({"block_size": 4.0}, TypeError, ("block_size must be an int", "float")),
    "block-size-bool": ({"block_size": True}, TypeError, ("block_size must be an int", "bool")),
    "block-size-0": ({"block_size": 0}, ValueError, ("block_size must be at least 1", "got 0")),
    "block-size-huge": ({"block_size": 2**40}, ValueError, ("at most 1073741824", "got 1099")),
    "weights-float": (
        {"block_weights": 1.0},
        TypeError,
        ("block_weights must be a torch.Tensor", "float"),
    ),
    "weights-int": (
        {"block_weights": _indices(B, Hkv, N, n)},
        TypeError,
        ("block_weights must be float32, bfloat16, float16 or float64", "torch.int64"),
    ),
    "weights-shape": (
        {"block_weights": torch.zeros(B, Hq, N, n)},
        ValueError,
        ("block_weights must have the shape of block_indices (2, 2, 10, 3)", "(2, 4, 10, 3)"),
    ),
    "weights-device": (
        {"block_weights": torch.zeros(B, Hkv, N, n, device=META)},
        ValueError,
        ("block_weights must be on the device of q (cpu)", "meta"),
    ),
    "own-int": ({"include_own_block": 1}, TypeError, ("include_own_block must be True", "1")),
    "lse-int": ({"return_lse": 1}, TypeError, ("return_lse must be True or False", "got 1")),
    "causal-none": ({"is_causal": None}, TypeError, ("is_causal must be True or False", "None")),
    "check-int": ({"check_indices": 1}, TypeError, ("check_indices must be True or False", "1")),
    "scale-str": ({"scale": "1"}, TypeError, ("scale must be a number", "str")),
    "scale-inf": ({"scale": float("inf")}, ValueError, ("scale must be finite", "inf")),
    "backend": ({"backend": "gpu"}, ValueError, ("backend must be one of", "'gpu'")),
}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", BAD)
def test_error_names_the_argument(name: str, backend: str | None) -> None:
    change, kind, parts = BAD[name]
    arguments = {"backend": backend, **_good(), **change}
    with pytest.raises(kind) as error:
        hk.selected_attention(**arguments)
    for part in parts:
        assert part in str(error.value)


def test_good_arguments_are_good() -> None:
    for backend in (None, "reference"):
        assert hk.selected_attention(**_good(), backend=backend).shape == (B, Hq, N, D)


@pytest.mark.parametrize("value", [3, 2**31 - 1, 2**31, 2**32, 2**62, -2, -(2**31), -(2**63)])
def test_unchecked_indices_out_of_range_count_as_none(value: int) -> None:
    good = _good()
    q, k, v = (torch.randn_like(good[name]) for name in "qkv")
    indices = good["block_indices"].clone()
    indices[..., 0] = value
    none = indices.clone()
    none[..., 0] = -1
    for backend in (None, "reference"):
        options = {"block_size": S, "backend": backend, "check_indices": False}
        out = hk.selected_attention(q, k, v, indices, **options)
        assert torch.equal(out, hk.selected_attention(q, k, v, none, **options))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_forced_backend_never_falls_back(backend: str) -> None:
    with pytest.raises(NotImplementedError, match=f"selected_attention: backend '{backend}'"):
        hk.selected_attention(**_good(), backend=backend)


def test_explain_lists_the_refusals() -> None:
    good = _good()
    tensors = [good.pop(name) for name in ("q", "k", "v", "block_indices")]
    choice = hk.explain("selected_attention", *tensors, **good)
    assert choice.backend in ("cpu", "reference") and "cuda" in choice.refusals
