"""Few queries and many keys in Triton, interpreted: programs that share the keys of a tile of rows.

Tiles have 16 keys, parts at least as many; some parts see nothing, some are empty, and the last one
is shorter.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from hierkernels import key_parts
from hierkernels.key_range import KeyRange
from hierkernels.ops.attention import triton_configs
from hierkernels.ops.attention.spec import Case, dtype_name
from hierkernels.ops.attention.triton_launch import plan_forward
from hierkernels.ops.selected_attention import spec as selected_spec
from hierkernels.ops.selected_attention import testing as selected_testing
from hierkernels.ops.selected_attention import triton_launch as selected_launch
from hierkernels.testing import Inputs, check_accuracy, compute, make_inputs, poisoned_memory
from hierkernels.triton_common import device

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def _case(name: str, B: int = 1, H: int = 1, N: int = 1, D: int = 16, **options) -> Case:
    Hkv, Nk, Dv = options.pop("Hkv", 1), options.pop("Nk", 150), options.pop("Dv", D)
    return Case(name, B, H, Hkv, N, Nk, D, Dv, **options)


# With the number of parts that 6 multiprocessors make of them.
CASES = (
    (_case("one"), F32, 9),
    (_case("causal-bf16", is_causal=True), BF16, 9),
    (_case("causal-f16", is_causal=True), F16, 9),
    (_case("group8", H=8, is_causal=True), BF16, 9),
    (_case("group2-hkv2", H=4, Hkv=2, N=3, is_causal=True, layout="bnhd"), BF16, 6),
    (_case("batch3", 3, Nk=70, is_causal=True), F32, 4),
    (_case("speculative", H=2, N=5, Nk=70, is_causal=True), F32, 4),
    (_case("speculative16-group3", H=3, N=16, Nk=70, is_causal=True), BF16, 4),
    (_case("queries-33", N=33, Nk=100, is_causal=True), F32, 6),  # two tiles of rows
    (_case("queries-33-see-nothing", N=33, Nk=32, is_causal=True), F32, 2),
    (_case("window", H=2, N=2, window=(60, 0)), F32, 3),
    (_case("window-two-sided", N=3, window=(30, 10)), F32, 2),
    (_case("window-within-a-tile", Nk=64, window=(31, 0)), F32, 2),
    (_case("bucketed", N=40, Nk=40, key_range=KeyRange.bucketed(40, 16, 1, 1, False)), F32, 2),
    (_case("compressed", N=90, Nk=60, key_range=KeyRange.compressed(10, 1, 3)), F32, 3),
    # One query that stands late in the sequence, as where the compressed branch decodes.
    (_case("compressed-one", key_range=KeyRange.compressed(-2399, 16, 3)), F32, 9),
    (_case("d24-dv40", D=24, Dv=40, is_causal=True), BF16, 9),
    (_case("d256", D=256, Nk=70, is_causal=True), BF16, 4),
    (_case("dv1", D=8, Dv=1, Nk=70), F32, 4),
    (_case("unaligned", D=18, is_causal=True, layout="unaligned"), F32, 9),
    (_case("broadcast-heads", H=2, Hkv=2, Nk=70, layout="broadcast"), F32, 4),
    (_case("bias", 2, 2, N=2, Nk=70, bias="hqk"), F32, 4),
    (_case("bias-keys", 2, 2, N=2, Nk=70, bias="bk"), BF16, 4),
    (_case("padding", 2, 2, N=2, padding="right", is_causal=True), F32, 6),
    (_case("padding-left", 2, padding="left", lse_grad=True), BF16, 6),
    (_case("padding-empty", 2, Nk=70, padding="empty", lse_grad=True), F32, 4),
    (_case("mask-leading", N=2, Nk=200, mask="k", mask_pattern="leading"), F32, 12),
    (_case("mask-rows", N=4, Nk=70, mask="q", mask_pattern="rows", lse_grad=True), F32, 4),
    (_case("softcap", H=2, Nk=70, softcap=5.0, gain=4.0), BF16, 4),
    (_case("dropout", H=2, N=2, Nk=70, is_causal=True, dropout_p=0.3), F32, 4),
    (_case("logits-x100", N=2, is_causal=True, gain=100.0), F32, 9),
    (_case("logits-x100-bf16", H=2, is_causal=True, gain=100.0), BF16, 9),
    (_case("scale-negative", scale=-0.2), BF16, 9),
    (
        _case(
            "everything", 2, 4, 5, 24, Hkv=2, Nk=80, Dv=40, window=(60, 3), bias="hqk", mask="bqk",
            padding="right", dropout_p=0.1, softcap=8.0, lse_grad=True, layout="bnhd",
        ),
        F32,
        3,
    ),
)  # fmt: skip


@pytest.fixture(autouse=True)
def small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small cases have parts, too."""
    monkeypatch.setitem(device.MULTIPROCESSORS, "interpreter", 6)
    for name, least in (("LEAST_KEYS", 16), ("KEYS_OF_ROW", 0), ("FEWEST", 2)):
        monkeypatch.setattr(key_parts, name, least)
    monkeypatch.setattr(triton_configs, "SHORT_ROWS", ())


def _parts(inputs: Inputs) -> int:
    call = inputs.call()
    launch = plan_forward(call, device.target_of(call.q, True), *call.new_outputs())[0]
    return launch.arguments["n_parts"]


@pytest.mark.parametrize(
    ("case", "dtype", "n_parts"),
    [
        pytest.param(*row, id=f"attention-triton-{dtype_name(row[1])}-decoding-{row[0].name}")
        for row in CASES
    ],
)
def test_parts_of_the_keys(case: Case, dtype: torch.dtype, n_parts: int) -> None:
    inputs = make_inputs(case, dtype)
    assert _parts(inputs) == n_parts
    with poisoned_memory():
        results = compute(inputs, "triton")
        again = compute(inputs, "triton", gradients=False)
    check_accuracy(inputs, results)
    assert all(torch.equal(again[name], results[name]) for name in again)


@pytest.mark.parametrize("loop", ["always", "branch", "split"])
def test_loop_forms(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part may lie at an edge of the range, in its middle, or hold both."""
    config = replace(triton_configs.INTERPRETER["forward"], loop=loop)
    monkeypatch.setitem(triton_configs.INTERPRETER, "forward", config)
    inputs = make_inputs(_case("loop", N=20, Nk=130, window=(90, 3)), F32)
    assert _parts(inputs) > 1
    check_accuracy(inputs, compute(inputs, "triton"))


def test_tensor_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(triton_configs.INTERPRETER["forward"], descriptors=True)
    monkeypatch.setitem(triton_configs.INTERPRETER, "forward", config)
    inputs = make_inputs(_case("descriptors", H=4, Nk=70, is_causal=True), F32)
    assert _parts(inputs) > 1
    check_accuracy(inputs, compute(inputs, "triton", gradients=False))


@pytest.mark.parametrize("multiprocessors", [1, 2, 5, 40])
def test_any_number_of_parts(multiprocessors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One record, more than a step of the second kernel takes, and parts without a key."""
    monkeypatch.setitem(device.MULTIPROCESSORS, "interpreter", multiprocessors)
    inputs = make_inputs(_case("parts", Nk=16 * 79, D=128, is_causal=True), F32)
    assert _parts(inputs) == min(2 * multiprocessors, 79)
    check_accuracy(inputs, compute(inputs, "triton", gradients=False))


def test_a_cache_with_room() -> None:
    """Keys and values are views of a cache that is longer; what follows them is never read."""
    case = _case("cache", 2, 4, 1, Hkv=2, Nk=70, is_causal=True)
    inputs = make_inputs(case, F32)
    k, v = (torch.full((2, 2, 200, 16), float("nan")) for _ in "kv")
    for cache, filled in ((k, inputs.k), (v, inputs.v)):
        cache[:, :, :70] = filled
    views = replace(inputs, k=k[:, :, :70], v=v[:, :, :70])
    assert _parts(views) > 1
    check_accuracy(inputs, compute(views, "triton", gradients=False))


def _selected(name: str, N: int = 1, S: int = 16, n: int = 6, **options) -> selected_spec.Case:
    H, Hkv = options.pop("H", 2), options.pop("Hkv", 1)
    D, Nk = options.pop("D", 16), options.pop("Nk", 130)
    return selected_spec.Case(
        name, options.pop("B", 1), H, Hkv, N, Nk, D, options.pop("Dv", D), S, n, **options
    )


# Tiles have 32 keys: two blocks of 16, a part of one of 64.
SELECTED = (
    (_selected("gathered"), F32, 6),
    (_selected("gathered-bf16", H=8, is_causal=False), BF16, 6),
    (_selected("in-blocks", S=64, n=2, Nk=200), F16, 8),
    (_selected("two-queries-batch2", 2, B=2), F32, 3),
    (_selected("holes-own", 3, pattern="holes", own=True, lse_grad=True), F32, 4),
    (_selected("none", pattern="none", lse_grad=True), F32, 6),
    (_selected("all-weights", B=2, n=9, pattern="all", weights=True), F32, 6),
    (_selected("per-head", H=3, Hkv=3, per_head=True, D=24, Dv=40), BF16, 4),
    (_selected("scale-negative-bnhd", scale=-0.2, layout="bnhd"), BF16, 6),
    (_selected("logits-x100", gain=100.0), F32, 6),
)


@pytest.mark.parametrize(
    ("case", "dtype", "n_parts"),
    [
        pytest.param(*row, id=f"selected_attention-triton-{dtype_name(row[1])}-{row[0].name}")
        for row in SELECTED
    ],
)
def test_parts_of_selected_blocks(
    case: selected_spec.Case, dtype: torch.dtype, n_parts: int
) -> None:
    inputs = selected_testing.make_inputs(case, dtype)
    call = inputs.call()
    target = device.target_of(call.q, True)
    launch = selected_launch.plan_forward(call, target, *call.new_outputs())[1]
    assert launch.arguments["n_parts"] == n_parts
    with poisoned_memory():
        results = compute(inputs, "triton")
    selected_testing.check_accuracy(inputs, results)


@pytest.mark.slow
def test_offsets_beyond_32_bits() -> None:
    """Keys 2**26 elements apart: the offset of key 33 exceeds 2**31 (memory is not touched)."""
    inputs = make_inputs(_case("far", Nk=66, is_causal=True), BF16)
    memory = torch.empty(66 * 2**26, dtype=BF16)
    far = memory.as_strided(inputs.k.shape, (0, 0, 2**26, 1))
    far.copy_(inputs.k)
    spread = replace(inputs, k=far, v=far)
    assert _parts(spread) > 1
    results = compute(spread, "triton", gradients=False)
    check_accuracy(replace(inputs, v=inputs.k), results)
