"""Bad arguments of hk.select_blocks: the error names the argument, what came, what is allowed."""

from __future__ import annotations

import pytest
import torch

import hierkernels as hk

B, HQ, HKV, N, W, D = 2, 4, 2, 33, 7, 8


def _good() -> dict:
    return {
        "q": torch.zeros(B, HQ, N, D), "k_cmp": torch.zeros(B, HKV, W, D), "num_selected": 3,
        "block_size": 8, "stride": 4, "first_end": 7, "window_size": 8,
        "lse": torch.zeros(B, HQ, N),
    }  # fmt: skip


LOGIT = {"scoring": "logit", "lse": None, "window_size": None}
# name: (the arguments that differ from good ones, the error, what its message must contain)
BAD: dict[str, tuple[dict, type[Exception], tuple[str, ...]]] = {
    "q-list": ({"q": [1.0]}, TypeError, ("q must be a torch.Tensor", "list")),
    "q-int": ({"q": torch.zeros(B, HQ, N, D).int()}, TypeError, ("q must be float32", "int32")),
    "k-rank": ({"k_cmp": torch.zeros(W, D)}, ValueError, ("k_cmp must have 4 dim", "(7, 8)")),
    "k-dtype": (
        {"k_cmp": torch.zeros(B, HKV, W, D).double()},
        TypeError,
        ("k_cmp must have the dtype of q (torch.float32)", "float64"),
    ),
    "k-channels": (
        {"k_cmp": torch.zeros(B, HKV, W, 5)}, ValueError, ("k_cmp must have the channels", "5")
    ),
    "heads": (
        {"k_cmp": torch.zeros(B, 3, W, D)},
        ValueError,
        ("q must have a multiple of the heads of k_cmp, got 4 heads for 3",),
    ),
    "k-device": (
        {"k_cmp": torch.zeros(B, HKV, W, D, device="meta")}, ValueError, ("k_cmp must be on",)
    ),
    "selected-negative": ({"num_selected": -1}, ValueError, ("num_selected", "at least 0", "-1")),
    "selected-float": ({"num_selected": 2.0}, TypeError, ("num_selected must be an int",)),
    "block-zero": ({"block_size": 0}, ValueError, ("block_size must be at least 1",)),
    "block-stride": (
        {"block_size": 10}, ValueError, ("block_size must be a multiple of stride (4), got 10",)
    ),
    "block-stride-logit": (
        {"block_size": 10, **LOGIT}, ValueError, ("block_size must be a multiple of stride (4)",)
    ),
    "stride-zero": ({"stride": 0}, ValueError, ("stride must be at least 1", "0")),
    "stride-bool": ({"stride": True}, TypeError, ("stride must be an int", "bool")),
    "first-end": ({"first_end": -1}, ValueError, ("first_end must be at least 0", "-1")),
    "window-stride": (
        {"window_size": 6}, ValueError, ("window_size must be a multiple of stride (4), got 6",)
    ),
    "window-none": ({"window_size": None}, ValueError, ("window_size must be given",)),
    "window-phase": ({"first_end": 8}, ValueError, ("first_end must be such that", "got 8")),
    "scoring": ({"scoring": "sum"}, ValueError, ("scoring must be one of probability", "'sum'")),
    "scoring-none": ({"scoring": None}, ValueError, ("scoring must be one of", "None")),
    "lse-none": ({"lse": None}, ValueError, ("lse must be given",)),
    "lse-shape": (
        {"lse": torch.zeros(B, HKV, N)}, ValueError, ("lse must have shape", "(2, 4, 33)")
    ),
    "lse-int": ({"lse": torch.zeros(B, HQ, N).int()}, TypeError, ("lse must be float32", "int32")),
    "lse-list": ({"lse": [0.0]}, TypeError, ("lse must be a torch.Tensor", "list")),
    "lse-device": (
        {"lse": torch.zeros(B, HQ, N, device="meta")}, ValueError, ("lse must be on the device",)
    ),
    "lse-logit": (
        {**LOGIT, "lse": torch.zeros(B, HQ, N)}, ValueError, ("lse must be None with scoring",)
    ),
    "window-logit": ({**LOGIT, "window_size": 8}, ValueError, ("window_size must be None",)),
    "forced-logit": (
        {**LOGIT, "num_local": 1}, ValueError, ("num_initial and num_local must be 0",)
    ),
    "forced-many": (
        {"num_initial": 2, "num_local": 2},
        ValueError,
        ("num_initial + num_local must be at most num_selected (3), got 4",),
    ),
    "initial": ({"num_initial": -1}, ValueError, ("num_initial must be at least 0", "-1")),
    "local": ({"num_local": None}, TypeError, ("num_local must be an int", "None")),
    "strict": ({"strict": 1}, TypeError, ("strict must be True or False", "1")),
    "causal": ({"is_causal": None}, TypeError, ("is_causal must be True or False",)),
    "shared": ({"shared": "yes"}, TypeError, ("shared must be True or False", "'yes'")),
    "own": ({"exclude_own_block": 0}, TypeError, ("exclude_own_block must be True or False",)),
    "offset": ({"query_offset": -1}, ValueError, ("query_offset must be at least 0", "-1")),
    "keys": ({"num_keys": -4}, ValueError, ("num_keys must be at least 0", "-4")),
    "scale": ({"scale": "1"}, TypeError, ("scale must be a number", "str")),
    "scale-inf": ({"scale": float("inf")}, ValueError, ("scale must be finite", "inf")),
    "probabilities": (
        {"return_probabilities": True}, ValueError, ("return_probabilities must be False",)
    ),
    "probabilities-int": (
        {"return_probabilities": 1}, TypeError, ("return_probabilities must be True or False",)
    ),
    "backend": ({"backend": "gpu"}, ValueError, ("backend must be one of", "'gpu'")),
}  # fmt: skip


@pytest.mark.parametrize("backend", [None, "reference"], ids=["auto", "reference"])
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str, backend: str | None) -> None:
    changes, kind, words = BAD[name]
    with pytest.raises(kind) as raised:
        hk.select_blocks(**{**_good(), "backend": backend, **changes})
    for word in words:
        assert word in str(raised.value), raised.value


def test_a_forced_backend_does_not_fall_back() -> None:
    with pytest.raises(NotImplementedError, match="backend 'cuda' does not support this call"):
        hk.select_blocks(**_good(), backend="cuda")


def test_explain() -> None:
    choice = hk.explain("select_blocks", **_good())
    assert "cuda" in choice.refusals and choice.backend in ("cpu", "reference")
    assert hk.explain("select_blocks", **_good(), backend="reference").backend == "reference"


def _compressed() -> dict:
    return {
        "q": torch.zeros(B, HQ, N, D), "k_cmp": torch.zeros(B, HKV, W, D),
        "v_cmp": torch.zeros(B, HKV, W, D), "stride": 4, "first_end": 7,
    }  # fmt: skip


BAD_COMPRESSED: dict[str, tuple[dict, type[Exception], tuple[str, ...]]] = {
    "k-list": ({"k_cmp": [1.0]}, TypeError, ("k_cmp must be a torch.Tensor", "list")),
    "v-tokens": (
        {"v_cmp": torch.zeros(B, HKV, 5, D)},
        ValueError,
        ("v_cmp must have the heads and tokens of k_cmp (2, 7)", "(2, 5)"),
    ),
    "heads": (
        {name: torch.zeros(B, 3, W, D) for name in ("k_cmp", "v_cmp")},
        ValueError,
        ("q must have a multiple of the heads of k_cmp and v_cmp", "4 heads for 3"),
    ),
    "stride": ({"stride": 0}, ValueError, ("stride must be at least 1", "0")),
    "first-end": ({"first_end": -1}, ValueError, ("first_end must be at least 0", "-1")),
    "memory": ({"num_memory": 8}, ValueError, ("num_memory must be at most the tokens", "got 8")),
    "memory-negative": ({"num_memory": -1}, ValueError, ("num_memory must be at least 0",)),
    "offset": ({"query_offset": 1.5}, TypeError, ("query_offset must be an int", "float")),
    "strict": ({"strict": None}, TypeError, ("strict must be True or False", "None")),
    "causal": ({"is_causal": 1}, TypeError, ("is_causal must be True or False", "1")),
    "scale": ({"scale": "1"}, TypeError, ("scale must be a number", "str")),
    "backend": ({"backend": "gpu"}, ValueError, ("backend must be one of", "'gpu'")),
}


@pytest.mark.parametrize("name", BAD_COMPRESSED)
def test_bad_arguments_of_compressed_attention(name: str) -> None:
    changes, kind, words = BAD_COMPRESSED[name]
    with pytest.raises(kind) as raised:
        hk.compressed_attention(**{**_compressed(), **changes})
    for word in words:
        assert word in str(raised.value), raised.value
    with pytest.raises(NotImplementedError, match="backend 'cuda' does not support this call"):
        hk.compressed_attention(**_compressed(), backend="cuda")
