"""The CUDA kernels of selected attention on the emulation, against the float64 oracle.

bfloat16 takes all cases of spec.py; float32, whose tiles differ too, a selection that has each tile
shape and each kind of choice; float16, whose products alone differ from bfloat16's, a few.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from hierkernels.ops.selected_attention import cuda as backend
from hierkernels.ops.selected_attention import reference, work_items
from hierkernels.ops.selected_attention.spec import CORRECTNESS, Case, _case, dtype_name
from hierkernels.ops.selected_attention.testing import check_accuracy, make_inputs, make_standard
from hierkernels.testing import compute, poisoned_memory

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

FLOAT32 = (
    "n1", "n65", "q7-k200", "q33-k5", "q9-k0", "g3", "g20", "g3-per-head-own", "b1", "b4", "b20",
    "b100", "named-0-own", "any-own-g4", "holes", "future", "none", "any-full", "weights-any",
    "d40", "d128", "d192", "d32-dv72", "lse-grad-none-seen", "scale-negative", "logits-x100-any",
    "layout-unaligned",
)  # fmt: skip
FLOAT16 = ("n65", "g3", "b4", "weights-any", "d128", "d192", "logits-x100-any", "layout-unaligned")
_BY_NAME = {case.name: case for case in CORRECTNESS}


def _parameters() -> list:
    table = [(case, BF16) for case in CORRECTNESS if max(case.D, case.Dv) <= backend.MAX_DIM]
    table += [(_BY_NAME[name], F32) for name in FLOAT32] + [
        (_BY_NAME[name], F16) for name in FLOAT16
    ]
    return [
        pytest.param(case, dtype, id=f"selected_attention-cuda-{dtype_name(dtype)}-{case.name}")
        for case, dtype in table
    ]


@pytest.mark.parametrize(("case", "dtype"), _parameters())
def test_accuracy(emulated_cuda: ModuleType, case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    emulated_cuda.take_counts()
    # Looking for races doubles the time: where the selection does, it is done.
    emulated_cuda.set_options(seed=1, races=case.name in FLOAT32, bounds=True)
    with poisoned_memory():
        results = compute(inputs, "cuda")
    check_accuracy(inputs, results)
    assert emulated_cuda.take_counts()["bank_conflicts"] == 0


@pytest.mark.parametrize("name", ["n130", "weights-any", "b4", "g20"])
def test_results_do_not_depend_on_the_schedule(emulated_cuda: ModuleType, name: str) -> None:
    """Bitwise, under many orders of threads: deterministic, and no race is seen."""
    inputs = make_inputs(replace(_BY_NAME[name], B=1), BF16)
    first = compute(inputs, "cuda")
    for seed in range(2, 5):
        emulated_cuda.set_options(seed=seed)
        for result, expected in zip(compute(inputs, "cuda").values(), first.values(), strict=True):
            assert torch.equal(result, expected)


@pytest.mark.parametrize(
    "case",
    [
        _case("popular", 1, 2, 200, n=1, pattern="same", S=8, D=24, Dv=40),
        _case("popular-odd", 1, 3, 150, n=1, pattern="same", S=20, Hkv=1, D=17),
        _case("popular-long", 1, 2, 200, n=1, pattern="same", S=100, Nk=420),
        _case("popular-weights", 1, 2, 120, n=1, pattern="same", S=8, weights=True),
    ],
    ids=str,
)
def test_popular_blocks_are_split(
    emulated_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    """A block that every query selects is summed in parts, which are added in order."""
    made = []

    def recorded(*args: Any) -> Any:
        made.append(work_items.work_items(*args))
        return made[-1]

    monkeypatch.setattr(backend, "LEAST_ROWS", 8)
    monkeypatch.setattr(work_items, "_CHUNK", 1)
    monkeypatch.setattr(backend, "work_items", recorded)
    inputs = make_inputs(case, F32)
    with poisoned_memory():
        results = compute(inputs, "cuda")
    check_accuracy(inputs, results)
    assert made[0].parts and (made[0].item_block == 0).sum(1).min() > 1


def test_neighbours_that_agree_share_their_products(emulated_cuda: ModuleType) -> None:
    """16 queries of one head that name the same two blocks take the products of a single one."""
    inputs = make_inputs(_case("agree", 1, 1, 64, n=2, pattern="same", Hkv=1), BF16)
    emulated_cuda.take_counts()
    compute(inputs, "cuda", gradients=False)
    of_tile = 4 * (2 * 4 + 8)  # four warps with 16 keys each; 64 channels in scores and output
    assert emulated_cuda.take_counts()["mma"] == 64 // 16 * of_tile


def test_backward_follows_any_forward(emulated_cuda: ModuleType) -> None:
    """What is saved, natural-log lse included, is the same on every backend."""
    inputs = make_inputs(_case("saved", lse_grad=True), F32)
    call, standard = inputs.call(), make_standard(inputs)
    for first, second in ((reference, backend), (backend, reference)):
        out, lse = first.forward(call)
        *gradients, none = second.backward(call, out, lse, inputs.dout, inputs.dlse, False)
        assert none is None
        standard.check(dict(zip(("dq", "dk", "dv"), gradients, strict=True)))


def test_no_access_outside_of_the_tensors(emulated_cuda: ModuleType) -> None:
    """The emulation knows the tensors of the call alone: an lse that is too short is an error."""
    call = make_inputs(_case("bounds"), BF16).call()
    out, lse = call.new_outputs()
    arguments = call.arguments()
    lists = lse.new_empty(emulated_cuda.cuda_selected_plan(arguments)[0])
    with pytest.raises(RuntimeError, match=r"selected_forward, .*store of 4 bytes .*in no tensor"):
        emulated_cuda.cuda_selected_forward(arguments, out, lse[:, :1], lists, 0)


def test_indices_of_32_bits(emulated_cuda: ModuleType) -> None:
    """They are read as they are, whatever their strides; out of range they count as -1."""
    inputs = make_inputs(_case("int32", N=40, pattern="any"), F32)
    far = inputs.indices.clone()
    far[..., 1] = torch.where(far[..., 1] % 2 == 0, 10**6, -7)
    near = far.masked_fill((far < 0) | (far > 2), -1)
    expected = replace(inputs, indices=near).run("cuda")
    for indices in (far, far.int(), far.int().mT.contiguous().mT):
        found = replace(inputs, indices=indices)
        out = backend.forward(found.call())[0]
        assert torch.equal(out, expected[0])


def test_refusals(emulated_cuda: ModuleType) -> None:
    inputs = make_inputs(_case("refused"), torch.float64)
    with pytest.raises(NotImplementedError, match="float64 is not one of"):
        inputs.run("cuda")
    wide = make_inputs(_case("refused", D=257), F32).call()
    assert len([text for text in backend.supports(wide) if "257 channels" in text]) == 2
    indices = torch.zeros(1, 1, 1, 1, dtype=torch.int32).expand(2, 2, 65, 2**28)
    call = replace(make_inputs(_case("refused"), F32).call(), indices=indices)
    assert [text for text in backend.supports(call) if "beyond 32 bits" in text]


def test_refuses_cpu_tensors_outside_of_tests() -> None:
    call = make_inputs(_case("refused"), F32).call()
    assert [text for text in backend.supports(call) if "needs a GPU" in text]
