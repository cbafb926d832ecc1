"""Bad arguments of hk.native_sparse_attention: the error names the argument, what was given and
what is allowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hierkernels as hk

B, Hq, Hkv, N, D, W = 2, 4, 2, 10, 8, 2


def _good() -> dict[str, Any]:
    return {
        "q": torch.zeros(B, Hq, N, D),
        "k": torch.zeros(B, Hkv, N, D),
        "v": torch.zeros(B, Hkv, N, D),
        "k_cmp": torch.zeros(B, Hkv, W, D),
        "v_cmp": torch.zeros(B, Hkv, W, D),
        "gates": torch.zeros(B, Hq, N, 3),
        "preset": "paper",
        "block_size": 8,
        "num_selected": 3,
        "window_size": 4,
        "stride": 4,
        "first_end": 7,
        "compression_window": 8,
    }


# name: (what differs from good arguments, the error, what its message must contain)
BAD: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "preset": ({"preset": "deepseek"}, ValueError, ("preset must be one of paper, seed",)),
    "q-rank": ({"q": torch.zeros(N, D)}, ValueError, ("q must have 4 dimensions", "(10, 8)")),
    "k_cmp-channels": (
        {"k_cmp": torch.zeros(B, Hkv, W, D + 1)},
        ValueError,
        ("k_cmp must have the channels of q (8)", "9"),
    ),
    "v_cmp-channels": (
        {"v_cmp": torch.zeros(B, Hkv, W, D + 1)},
        ValueError,
        ("v_cmp must have the channels of v (8)", "9"),
    ),
    "gates-list": ({"gates": [1.0]}, TypeError, ("gates must be a torch.Tensor", "list")),
    "gates-shape": (
        {"gates": torch.zeros(B, Hq, N, 2)},
        ValueError,
        ("gates must have shape", "(2, 4, 10, 3)", "(2, 4, 10, 2)"),
    ),
    "gates-int": (
        {"gates": torch.zeros(B, Hq, N, 3, dtype=torch.int64)},
        TypeError,
        ("gates must be float32", "torch.int64"),
    ),
    "gates-device": (
        {"gates": torch.zeros(B, Hq, N, 3, device="meta")},
        ValueError,
        ("gates must be on the device of q (cpu)", "meta"),
    ),
    "q-longer": (
        {"k": torch.zeros(B, Hkv, N - 1, D), "v": torch.zeros(B, Hkv, N - 1, D)},
        ValueError,
        ("q must have at most the tokens of k (9)", "10"),
    ),
    "block-stride": (
        {"block_size": 6},
        ValueError,
        ("block_size must be a multiple of stride (4)", "6"),
    ),
    "block-float": ({"block_size": 8.0}, TypeError, ("block_size must be an int", "float")),
    "window-below-stride": (
        {"compression_window": 3},
        ValueError,
        ("compression_window must be at least 4", "3"),
    ),
    "window-no-multiple": (
        {"compression_window": 10, "first_end": 9},
        ValueError,
        ("window_size must be a multiple of stride (4)", "10"),
    ),
    "n-below-forced": (
        {"num_selected": 2},
        ValueError,
        ("num_selected must be at least 3", "2"),
    ),
    "n-negative": (
        {"preset": "seed", "num_selected": -1},
        ValueError,
        ("num_selected must be at least 0", "-1"),
    ),
    "window-zero": ({"window_size": 0}, ValueError, ("window_size must be at least 1", "0")),
    "memory": ({"num_memory": 3}, ValueError, ("num_memory must be at most", "2", "3")),
    "diff-topk": (
        {"use_diff_topk": True},
        ValueError,
        ('use_diff_topk must be False with preset="paper"',),
    ),
    "both-ways": (
        {"is_causal": False},
        ValueError,
        ('is_causal must be True with preset="paper"',),
    ),
    "shared": ({"shared": 1}, TypeError, ("shared must be True or False", "1")),
    "q_cmp-shape": (
        {"q_cmp": torch.zeros(B, Hq, N + 1, D)},
        ValueError,
        ("q_cmp must have the shape of q (2, 4, 10, 8)", "(2, 4, 11, 8)"),
    ),
    "k_window-shape": (
        {"k_window": torch.zeros(B, Hkv, 4, D)},
        ValueError,
        ("k_window must have the shape of k (2, 2, 10, 8)", "(2, 2, 4, 8)"),
    ),
    "v_window-list": ({"v_window": 1}, TypeError, ("v_window must be a torch.Tensor", "int")),
    "scale": ({"scale": float("nan")}, ValueError, ("scale must be finite", "nan")),
    "backend": ({"backend": "gpu"}, ValueError, ("backend must be one of", "'gpu'")),
}


def test_good_arguments() -> None:
    assert hk.native_sparse_attention(**_good()).shape == (B, Hq, N, D)


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str) -> None:
    change, error, words = BAD[name]
    with pytest.raises(error) as raised:
        hk.native_sparse_attention(**{**_good(), **change})
    for word in words:
        assert word in str(raised.value)
