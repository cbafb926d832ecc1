"""The CUDA kernel of block selection on the emulation, by the rule of chosen blocks.

bfloat16 takes all cases of spec.py; float32, whose tiles differ too, a selection; float16, whose
products alone differ from bfloat16's, a few.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch

import hierkernels as hk
from hierkernels.ops.select_blocks import cuda as backend
from hierkernels.ops.select_blocks.spec import CORRECTNESS, SelectCase, _case, _logit
from hierkernels.ops.select_blocks.testing import check_selection, make_inputs
from hierkernels.testing import poisoned_memory

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

BOTH = (
    "n0",
    "n1",
    "n65",
    "d1",
    "d40",
    "d128",
    "g3-hkv2",
    "not-shared",
    "layout-channels",
    "select17",
    "offset",
)
FLOAT32 = (
    *BOTH, *(f"logit-{name}" for name in BOTH), "d256", "g20", "l2-d1-s8", "padded-l40-d4-s8",
    "forced-paper", "no-own-block-local", "offset-forced", "not-causal-no-own", "ties-forced",
    "ties-paper", "logits-x100", "scale-negative", "logit-ties", "logit-logits-x1000",
    "logit-not-causal-own", "logit-offset-one-query",
)  # fmt: skip
FLOAT16 = ("n65", "d128", "d256", "forced-paper", "ties-paper", "logits-x100")
_BY_NAME = {case.name: case for case in CORRECTNESS}
# Shapes that only this backend's tiles make interesting.
OWN = (
    _case("heads-in-parts", 60, B=1, H=70, Hkv=1, window=8, stride=4, block=4),
    _case("windows-of-many-tiles", 300, B=1, window=100, stride=1, block=100, n=2),
    _case("paper", 700, B=1, H=16, Hkv=1, D=128, window=32, stride=16, block=64, n=6, num_initial=1,
          num_local=2),
    _case("many-selected", 200, B=1, H=1, D=8, window=2, stride=2, block=2, n=70),
    _logit("many-selected", 200, B=1, H=1, D=8, window=2, stride=2, block=2, n=70),
)  # fmt: skip


def _parameters() -> list:
    table = [(case, BF16) for case in (*CORRECTNESS, *OWN)]
    table += [(_BY_NAME[name], F32) for name in FLOAT32] + [
        (_BY_NAME[name], F16) for name in FLOAT16
    ]
    table += [(OWN[0], F32), (OWN[2], F32)]
    return [
        pytest.param(case, dtype, id=f"select_blocks-cuda-{str(dtype)[6:]}-{case.name}")
        for case, dtype in table
    ]


@pytest.mark.parametrize(("case", "dtype"), _parameters())
def test_chosen_blocks(emulated_cuda: ModuleType, case: SelectCase, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    emulated_cuda.take_counts()
    # Looking for races doubles the time: where the selection does, it is done.
    emulated_cuda.set_options(seed=1, races=case in OWN or case.name in FLOAT32, bounds=True)
    with poisoned_memory():
        indices = inputs.run("cuda")
    check_selection(inputs, indices)
    assert emulated_cuda.take_counts()["bank_conflicts"] == 0


@pytest.mark.parametrize("name", ["forced-paper", "logit-n65", "ties-paper"])
def test_results_do_not_depend_on_the_schedule(emulated_cuda: ModuleType, name: str) -> None:
    inputs = make_inputs(_BY_NAME[name], BF16)
    first = inputs.run("cuda")
    for seed in range(2, 6):
        emulated_cuda.set_options(seed=seed)
        assert torch.equal(inputs.run("cuda"), first)


def test_scores_that_are_no_numbers(emulated_cuda: ModuleType) -> None:
    """They lose against all others, and indices stay indices."""
    for scoring in ("probability", "logit"):
        case = SelectCase("nan", 1, 2, 1, 60, 16, 8, 4, 8, 3, scoring)
        inputs = make_inputs(case, F32)
        inputs.k[:, :, ::5] = float("nan")
        inputs.k[:, :, 3] = float("inf")
        indices = inputs.run("cuda")
        assert indices.min() >= -1
        assert indices.max() < case.num_blocks
        inputs.k[:] = float("nan")
        assert torch.equal(inputs.run("cuda"), inputs.run("reference"))


def test_probabilities_of_the_chosen_blocks(emulated_cuda: ModuleType) -> None:
    """With their gradients, as the reference has them."""
    inputs = make_inputs(_BY_NAME["logit-g3"], F32)
    found = []
    for backend_name in ("cuda", "reference"):
        q, k = (t.clone().requires_grad_() for t in (inputs.q, inputs.k))
        indices, p = hk.select_blocks(
            q, k, **inputs.options(), return_probabilities=True, backend=backend_name
        )
        found.append((indices, p, *torch.autograd.grad(p.square().sum(), (q, k))))
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference)


def test_refusals(emulated_cuda: ModuleType) -> None:
    inputs = make_inputs(_BY_NAME["n65"], torch.float64)
    with pytest.raises(NotImplementedError, match="float64 is not one of"):
        inputs.run("cuda")
    wide = replace(_BY_NAME["n65"], D=257)
    assert "257 channels" in backend.supports(make_inputs(wide, F32).call())[0]
    call = inputs.to(F32).call()
    assert backend.supports(replace(call, query_offset=2**30)) == [
        "lengths or positions beyond 32 bits"
    ]
    many = replace(call, num_selected=1025, num_keys=2**20)
    assert backend.supports(many) == ["more than 1024 blocks are chosen"]


def test_refuses_cpu_tensors_outside_of_tests() -> None:
    call = make_inputs(_BY_NAME["n65"], F32).call()
    assert [text for text in backend.supports(call) if "needs a GPU" in text]
