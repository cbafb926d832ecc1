"""Attention's sm_90a kernels (TMA, wgmma) on the emulation, against the float64 oracle.

Lengths at and around the tiles of 128 and 192 rows and 128 keys; more than two stages of keys; more
tiles than the emulated device has blocks, so that a block computes several.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from hierkernels.key_range import KeyRange, Staircase
from hierkernels.ops.attention.spec import Case, _case, dtype_name
from hierkernels.testing import check_accuracy, compute, make_inputs, poisoned_memory

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture
def hopper(emulated_cuda: ModuleType) -> Iterator[ModuleType]:
    """The emulated device is an sm_90."""
    emulated_cuda.set_options(seed=1, hopper=True)
    yield emulated_cuda
    emulated_cuda.set_options(seed=1)


def _range(name: str, lo: Staircase, hi: Staircase, **options) -> Case:
    return _case(name, key_range=KeyRange(lo, hi), **options)


SERVED = (
    _case("h-causal-n128", B=1, N=128, is_causal=True),
    _case("h-causal-n129-d128", B=1, N=129, D=128, is_causal=True),
    _case("h-causal-n193", B=2, H=2, N=193, is_causal=True),
    _case("h-causal-n700", B=1, H=1, N=700, is_causal=True),
    _case("h-causal-n520-d128", B=1, H=1, N=520, D=128, is_causal=True),
    _case("h-full-n257", B=1, H=1, N=257),
    _case("h-full-q130-k391-d128", B=1, H=1, N=130, Nk=391, D=128),
    _case("h-causal-q130-k300", B=1, H=2, N=130, Nk=300, is_causal=True),
    # The first 70 queries see nothing.
    _case("h-causal-q300-k230", B=1, H=1, N=300, Nk=230, is_causal=True),
    _case("h-window-100-30", B=1, H=1, N=400, window=(100, 30)),
    _case("h-window-17-0-d128", B=1, H=1, N=300, D=128, window=(17, 0)),
    _range("h-empty", Staircase(), Staircase(), B=1, N=128, Nk=128),
    _range("h-bucketed", Staircase(0, 48, 48, -48), Staircase(0, 1, 1, 1), B=1, N=300),
    # Row packing: 64 rows are whole queries; a tile ends within a query's heads; 3 does not divide.
    _case("h-g2", B=1, H=4, Hkv=2, N=150, is_causal=True),
    _case("h-g8-d128", B=2, H=8, Hkv=1, N=40, Nk=150, D=128, is_causal=True),
    _case("h-g64", B=1, H=64, Hkv=1, N=3, Nk=200),
    _case("h-g3", B=1, H=6, Hkv=2, N=140, is_causal=True),
    _case("h-bnhd", B=2, H=2, N=140, is_causal=True, layout="bnhd"),
    _case("h-packed", B=2, H=2, N=140, is_causal=True, layout="packed"),
    _case("h-logits-x100", B=1, N=200, is_causal=True, gain=100.0),
    _case("h-lse-grad", B=1, H=1, N=200, is_causal=True, lse_grad=True),
    _case("h-scale", B=1, H=1, N=150, D=128, scale=0.3, window=(90, 0)),
)
# These the kernels of sm_80 compute, although the device is an sm_90.
NOT_SERVED = (
    _case("h-not-short", B=2, N=127, is_causal=True),
    _case("h-not-few-keys", B=1, H=1, N=130, Nk=127),
    _case("h-not-d96", B=1, H=1, N=130, D=96),
    _case("h-not-dv", B=1, H=1, N=130, D=128, Dv=64),
    _case("h-not-softcap", B=1, H=1, N=130, softcap=20.0),
    _case("h-not-bias", B=1, H=1, N=130, bias="k"),
    _case("h-not-padding", B=1, H=1, N=130, padding="right"),
    _case("h-not-dropout", B=1, H=1, N=130, dropout_p=0.3),
    _case("h-not-negative-scale", B=1, H=1, N=130, scale=-0.1),
    _case("h-not-unaligned", B=1, H=1, N=130, layout="unaligned"),
    _case("h-not-broadcast", B=1, H=2, N=130, layout="broadcast"),
)
OTHER_TYPE = ("h-causal-n193", "h-causal-n520-d128", "h-g8-d128")


def _ids(cases: tuple[Case, ...], dtype: torch.dtype) -> list:
    return [
        pytest.param(c, dtype, id=f"attention-sm90a-{dtype_name(dtype)}-{c.name}") for c in cases
    ]


@pytest.mark.parametrize(
    ("case", "dtype"),
    _ids(SERVED, BF16) + _ids(tuple(c for c in SERVED if c.name in OTHER_TYPE), F16),
)
def test_accuracy(hopper: ModuleType, case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    hopper.take_counts()
    with poisoned_memory():
        results = compute(inputs, "cuda")
    check_accuracy(inputs, results)
    counts = hopper.take_counts()
    assert counts["tensor_copies"] > 0
    assert counts["wgmma"] > 0 or not case.visible


@pytest.mark.parametrize(("case", "dtype"), _ids(NOT_SERVED, BF16) + _ids(SERVED[:1], F32))
def test_all_else_goes_to_the_kernels_of_sm_80(
    hopper: ModuleType, case: Case, dtype: torch.dtype
) -> None:
    call = make_inputs(case, dtype).call()
    hopper.take_counts()
    out, lse = call.new_outputs()
    hopper.cuda_attention_forward(*call.arguments(), out, lse, 0)
    counts = hopper.take_counts()
    assert counts["wgmma"] == counts["tensor_copies"] == 0
    assert counts["mma"] > 0


def test_other_devices_keep_the_kernels_of_sm_80(emulated_cuda: ModuleType) -> None:
    emulated_cuda.take_counts()
    compute(make_inputs(SERVED[0], BF16), "cuda")
    assert emulated_cuda.take_counts()["wgmma"] == 0


@pytest.mark.parametrize("name", ["h-causal-n700", "h-g8-d128"])
def test_results_do_not_depend_on_the_schedule(hopper: ModuleType, name: str) -> None:
    """Bitwise, under many orders of threads and arrivals of copies; and no race is seen."""
    (case,) = (c for c in SERVED if c.name == name)
    inputs = make_inputs(case, BF16)
    first = compute(inputs, "cuda")
    for seed in range(2, 6):
        hopper.set_options(seed=seed, hopper=True)
        for result, expected in zip(compute(inputs, "cuda").values(), first.values(), strict=True):
            assert torch.equal(result, expected)
