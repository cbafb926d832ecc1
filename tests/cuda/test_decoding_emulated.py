"""Few queries and many keys on the CUDA kernels, emulated: blocks that share the keys of a tile."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from hierkernels import key_parts
from hierkernels.ops.attention import cuda as backend
from hierkernels.ops.attention.spec import Case, dtype_name
from hierkernels.testing import Inputs, check_accuracy, compute, make_inputs, poisoned_memory

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def _case(name: str, B: int = 1, H: int = 1, N: int = 1, D: int = 64, **options) -> Case:
    Hkv, Nk, Dv = options.pop("Hkv", 1), options.pop("Nk", 300), options.pop("Dv", D)
    return Case(name, B, H, Hkv, N, Nk, D, Dv, **options)


# Tiles have 16 to 64 keys, parts are asked for 40 each: several tiles, one, or none.
CASES = (
    (_case("one"), F32, 7),
    (_case("causal", is_causal=True), BF16, 7),
    (_case("group8-d128", H=8, D=128, is_causal=True), F16, 7),
    (_case("group2-hkv2", 2, 4, 3, Hkv=2, is_causal=True, layout="bnhd"), BF16, 3),
    (_case("speculative", H=2, N=5, Nk=90, D=40, is_causal=True), F32, 2),
    (_case("queries-70", N=70, D=256, is_causal=True), F32, 7),  # three tiles of rows
    (_case("window", H=2, N=2, window=(120, 0)), F32, 3),
    (_case("d24-dv33", D=24, Dv=33, is_causal=True), BF16, 7),
    (_case("d256", D=256, is_causal=True), BF16, 7),
    (_case("padding-empty", 2, Nk=130, padding="empty", lse_grad=True), F32, 3),
    (_case("mask-leading", N=2, mask="k", mask_pattern="leading"), BF16, 7),
    (_case("mask-rows", N=4, Nk=130, mask="q", mask_pattern="rows", lse_grad=True), F32, 3),
    (_case("bias-dropout", H=2, N=2, bias="hqk", dropout_p=0.3), F32, 7),
    (_case("logits-x100", N=2, is_causal=True, gain=100.0), F32, 7),
    (_case("keys-of-a-tile", B=3, Nk=80), BF16, 2),  # whose sequences would share a tile
)


@pytest.fixture(autouse=True)
def small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small cases have parts, too."""
    monkeypatch.setattr(backend, "multiprocessors_of", lambda t: 6)
    for name, least in (("LEAST_KEYS", 40), ("KEYS_OF_ROW", 0), ("FEWEST", 2)):
        monkeypatch.setattr(key_parts, name, least)


def _parts(inputs: Inputs) -> int:
    call = inputs.call()
    records = backend._records(call, call.new_outputs()[1])
    return 1 if records is None else records.shape[0]


@pytest.mark.parametrize(
    ("case", "dtype", "n_parts"),
    [
        pytest.param(*row, id=f"attention-cuda-{dtype_name(row[1])}-decoding-{row[0].name}")
        for row in CASES
    ],
)
def test_accuracy(emulated_cuda: ModuleType, case: Case, dtype: torch.dtype, n_parts: int) -> None:
    inputs = make_inputs(case, dtype)
    assert _parts(inputs) == n_parts
    emulated_cuda.take_counts()
    with poisoned_memory():
        results = compute(inputs, "cuda")
    check_accuracy(inputs, results)
    assert emulated_cuda.take_counts()["bank_conflicts"] == 0
    emulated_cuda.set_options(seed=5)
    again = compute(inputs, "cuda", gradients=False)
    assert all(torch.equal(again[name], results[name]) for name in again)


def test_many_parts(emulated_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a warp has lanes, some without a key."""
    monkeypatch.setattr(backend, "multiprocessors_of", lambda t: 50)
    monkeypatch.setattr(key_parts, "LEAST_KEYS", 8)
    inputs = make_inputs(_case("many", Nk=700, is_causal=True), BF16)
    assert _parts(inputs) == 87
    check_accuracy(inputs, compute(inputs, "cuda", gradients=False))
