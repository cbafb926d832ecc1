"""The CUDA attention kernels on the emulation, against the float64 oracle, by the project's rule.

bfloat16 takes all cases of spec.py; float32, whose tiles differ too, a selection that has each tile
shape and each score modifier; float16, whose products alone differ from bfloat16's, a few.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch

from hierkernels import dispatch
from hierkernels.key_range import KeyRange, Staircase
from hierkernels.ops.attention import cuda as backend
from hierkernels.ops.attention import reference
from hierkernels.ops.attention.spec import CORRECTNESS, Case, _case, dtype_name
from hierkernels.testing import (
    check_accuracy,
    compute,
    make_inputs,
    make_standard,
    poisoned_memory,
)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

FLOAT32 = (
    "causal-n0", "causal-n1", "causal-n65", "full-n193", "short-29x4x9", "causal-q40-k17",
    "full-q33-k0", "d1", "d40", "d128", "d256", "d64-dv32", "d192-dv128", "g3-hkv2", "g8-decode",
    "window-16-0", "bucketed-w16", "compressed", "bias-hqk", "bias-k", "mask-bhqk", "padding-empty",
    "dropout-half-full", "dropout-short", "softcap-bias", "lse-grad-rows-see-nothing",
    "logits-x100", "everything", "layout-unaligned", "layout-packed-short",
)  # fmt: skip
FLOAT16 = (
    "causal-n65", "short-29x4x9", "d40", "d128", "d256", "g3-hkv2", "bias-hqk", "logits-x100",
    "everything", "layout-unaligned",
)  # fmt: skip
_BY_NAME = {case.name: case for case in CORRECTNESS}
# Shapes that only this backend's tiles and slices make interesting.
OWN = (
    _case("bias-shared-by-all", 3, 3, 150, Nk=70, bias="1"),
    _case("bias-q-many-slices", 40, 2, 33, is_causal=True, bias="q"),
    _case("items-fill-the-tile", 5, 1, 32, is_causal=True),
    _case("items-with-one-key", 70, 1, 3, Nk=1),
    _case("dropout-from-an-odd-tile", B=1, H=1, N=150, window=(20, 0), dropout_p=0.3),
    _case("odd-channels-bnhd", N=40, D=31, Dv=17, is_causal=True, layout="bnhd"),
)
_RACES = {*FLOAT32, *(case.name for case in OWN)}


def _parameters() -> list:
    table = [(case, BF16) for case in (*CORRECTNESS, *OWN)]
    table += [(_BY_NAME[name], F32) for name in FLOAT32]
    table += [(_BY_NAME[name], F16) for name in FLOAT16]
    table += [(case, F32) for case in OWN]
    return [
        pytest.param(case, dtype, id=f"attention-cuda-{dtype_name(dtype)}-{case.name}")
        for case, dtype in table
    ]


@pytest.mark.parametrize(("case", "dtype"), _parameters())
def test_accuracy(emulated_cuda: ModuleType, case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    emulated_cuda.take_counts()
    # Looking for races doubles the time: where the selection does, it is done.
    emulated_cuda.set_options(seed=1, races=case.name in _RACES, bounds=True)
    with poisoned_memory():
        results = compute(inputs, "cuda")
    check_accuracy(inputs, results)
    counts = emulated_cuda.take_counts()
    assert counts["bank_conflicts"] == 0
    if inputs.case.visible and case.B:
        assert counts["mma"] > 0


@pytest.mark.parametrize("name", ["causal-n193", "short-29x4x9", "g4-cross", "bias-hqk-full"])
def test_results_do_not_depend_on_the_schedule(emulated_cuda: ModuleType, name: str) -> None:
    """Bitwise, under many orders of threads: deterministic, and no race is seen."""
    inputs = make_inputs(_BY_NAME[name], BF16)
    first = compute(inputs, "cuda")
    for seed in range(2, 8):
        emulated_cuda.set_options(seed=seed)
        for result, expected in zip(compute(inputs, "cuda").values(), first.values(), strict=True):
            assert torch.equal(result, expected)


def test_backward_follows_any_forward(emulated_cuda: ModuleType) -> None:
    """What is saved, natural-log lse included, is the same on every backend."""
    inputs = make_inputs(_case("saved", N=70, is_causal=True, lse_grad=True), F32)
    call, names = inputs.call(), ("dq", "dk", "dv")
    standard = make_standard(inputs)
    for first, second in ((reference, backend), (backend, reference)):
        out, lse = first.forward(call)
        *gradients, dbias = second.backward(call, out, lse, inputs.dout, inputs.dlse, False)
        assert dbias is None
        standard.check(dict(zip(names, gradients, strict=True)))


def test_bias_of_another_dtype(emulated_cuda: ModuleType) -> None:
    """A float64 bias with bfloat16 inputs: read and summed in float32, returned in float64."""
    inputs = make_inputs(_case("bias-dtype", N=40, is_causal=True, bias="bhqk"), BF16)
    wide = replace(inputs, bias=inputs.bias.double())
    results = compute(wide, "cuda")
    assert results["dbias"].dtype == torch.float64
    check_accuracy(inputs, results)


def test_no_access_outside_of_the_tensors(emulated_cuda: ModuleType) -> None:
    """The emulation knows the tensors of the call alone: an lse that is too short is an error."""
    call = make_inputs(_case("bounds", N=40, is_causal=True), BF16).call()
    out, lse = call.new_outputs()
    with pytest.raises(RuntimeError, match=r"attention_forward, .*store of 4 bytes .*in no tensor"):
        emulated_cuda.cuda_attention_forward(*call.arguments(), out, lse[:, :1], None, 0)


# ---- refusals ----


def _call(**changes):
    return replace(make_inputs(_case("supports", N=8), F32).call(), **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({n: torch.zeros(1, 1, 8, 16, dtype=torch.float64) for n in "qkv"}, "float64"),
        ({n: torch.zeros(1, 1, 8, 257) for n in "qk"}, "q has 257 channels"),
        ({"v": torch.zeros(1, 1, 8, 257)}, "v has 257 channels"),
        ({n: torch.zeros(1, 1, 1, 8).expand(1, 1, 2**31, 8) for n in "kv"}, "2147483648 keys"),
        (
            {"q": torch.zeros(1, 1, 1, 8).expand(1, 4, 2**29, 8)}
            | {n: torch.zeros(1, 1, 8, 8) for n in "kv"},
            "2147483648 queries of a key/value head",
        ),
        ({n: torch.zeros(1, 1, 8, 8).expand(2**30, 2, 8, 8) for n in "qkv"}, "more tiles"),
    ],
    ids=["float64", "d257", "dv257", "keys", "queries", "tiles"],
)
def test_refusals(emulated_cuda: ModuleType, changes: dict, reason: str) -> None:
    call = _call(**changes)
    assert [text for text in backend.supports(call) if reason in text]
    with pytest.raises(NotImplementedError, match=reason):
        dispatch.resolve("attention", call, "cuda")


def test_refuses_cpu_tensors_outside_of_tests() -> None:
    assert [text for text in backend.supports(_call()) if "needs a GPU" in text]


def test_any_key_range_is_supported(emulated_cuda: ModuleType) -> None:
    """Staircases are computed in 64 bits: offsets beyond 32 bits are no reason to refuse."""
    far = KeyRange(Staircase(0, 1, 2**30, -(2**40)), Staircase(offset=2**40)).canonical()
    call = _call(key_range=far)
    assert backend.supports(call) == []
    torch.testing.assert_close(backend.forward(call), reference.forward(call))
