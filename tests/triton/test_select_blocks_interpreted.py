"""hk.select_blocks on the Triton backend, interpreted on the CPU, by the rule of chosen blocks.

Its tiles are small there (triton_launch: 32 queries by 16 blocks); cases are cut to 100 queries.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from hierkernels.ops.select_blocks import triton as backend
from hierkernels.ops.select_blocks.spec import CORRECTNESS, SelectCase
from hierkernels.ops.select_blocks.testing import check_selection, make_inputs
from hierkernels.testing import poisoned_memory

BY_NAME = {case.name: case for case in CORRECTNESS}
BOTH = (
    "n0", "n1", "n15", "n63", "n65", "batch0", "d1", "d40", "d100", "g1", "g3", "g6", "g16", "g20",
    "g3-hkv2", "not-shared", "layout-bnhd", "layout-channels", "l32-d16-s64", "l12-d4-s4",
    "l2-d1-s8", "n507", "select0", "select1", "select17", "select80", "offset", "not-causal",
    "ties", "logits-x100", "scale-negative",
)  # fmt: skip
FLOAT32 = (
    *BOTH, *(f"logit-{name}" for name in BOTH), "padded-l12-d4-s4", "padded-l40-d4-s8",
    "forced-paper", "forced-all", "no-own-block-local", "offset-forced", "not-causal-no-own",
    "ties-forced", "ties-paper", "scale-zero", "logit-own-block-inclusive", "logit-not-causal-own",
    "logit-offset-one-query", "logit-ties-not-shared", "logit-logits-x1000",
)  # fmt: skip
BFLOAT16 = ("n65", "g4", "forced-paper", "l32-d16-s64", "logits-x100", "logit-n65", "logit-g6")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(
            pytest.param(name, torch.float32, id=f"select_blocks-float32-{name}")
            for name in FLOAT32
        ),
        *(pytest.param(n, torch.bfloat16, id=f"select_blocks-bfloat16-{n}") for n in BFLOAT16),
        pytest.param("n65", torch.float16, id="select_blocks-float16-n65"),
    ],
)
def test_chosen_blocks(name: str, dtype: torch.dtype) -> None:
    case = BY_NAME[name]
    inputs = make_inputs(replace(case, B=min(case.B, 1), N=min(case.N, 100)), dtype)
    with poisoned_memory():
        indices = inputs.run("triton")
    check_selection(inputs, indices)


def test_scores_that_are_no_numbers() -> None:
    """They lose against all others, and indices stay indices."""
    for scoring in ("probability", "logit"):
        case = SelectCase("nan", 1, 2, 1, 60, 16, 8, 4, 8, 3, scoring)
        inputs = make_inputs(case, torch.float32)
        inputs.k[:, :, ::5] = float("nan")
        inputs.k[:, :, 3] = float("inf")
        indices = inputs.run("triton")
        assert indices.min() >= -1
        assert indices.max() < case.num_blocks
        inputs.k[:] = float("nan")
        assert torch.equal(inputs.run("triton"), inputs.run("reference"))


@pytest.mark.slow
def test_offsets_beyond_32_bits() -> None:
    """Tokens 2**26 elements apart: the offset of token 33 exceeds 2**31 (memory is not touched)."""
    for scoring in ("probability", "logit"):
        case = SelectCase("far", 1, 1, 1, 36, 16, 1, 1, 4, 3, scoring)
        inputs = make_inputs(case, torch.bfloat16)
        memory = torch.empty(36 * 2**26, dtype=torch.bfloat16)
        far = memory.as_strided(inputs.k.shape, (0, 0, 2**26, 1))
        far.copy_(inputs.k)
        near = replace(inputs, q=inputs.k)
        assert torch.equal(replace(inputs, q=far, k=far).run("triton"), near.run("triton"))


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(BY_NAME["n65"], torch.float64)
    with pytest.raises(NotImplementedError, match="float64 is not one of"):
        inputs.run("triton")
    wide = replace(BY_NAME["n65"], D=257)
    assert "257 channels" in backend.supports(make_inputs(wide, torch.float32).call())[0]
    far = replace(inputs.to(torch.float32).call(), query_offset=2**30)
    assert backend.supports(far) == ["lengths or positions beyond 32 bits"]
    monkeypatch.setattr(backend, "INTERPRETED", False)
    call = inputs.to(torch.float32).call()
    assert [text for text in backend.supports(call) if "needs a GPU" in text]
