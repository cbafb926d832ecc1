"""hk.attention on the Triton backend, interpreted on the CPU, against the float64 oracle.

Lengths are small because a tile takes the interpreter about 10 ms; its tiles are small too
(triton_configs.INTERPRETER: 16 and 32), so that every case still has dead, edge and whole tiles.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from hierkernels import dispatch
from hierkernels.key_range import KeyRange, Staircase
from hierkernels.ops.attention import reference, triton_configs
from hierkernels.ops.attention import triton as backend
from hierkernels.ops.attention.spec import CORRECTNESS, Case, dtype_name
from hierkernels.ops.attention.triton_launch import is_short, plan_forward
from hierkernels.testing import check_accuracy, compute, make_inputs, make_standard, poisoned_memory
from hierkernels.triton_common.device import target_of

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def _case(name: str, B: int = 1, H: int = 2, N: int = 70, D: int = 16, **options) -> Case:
    Hkv, Nk, Dv = options.pop("Hkv", H), options.pop("Nk", N), options.pop("Dv", D)
    return Case(name, B, H, Hkv, N, Nk, D, Dv, **options)


# Every pattern of a key range, in every loop form (the forward's, dQ's and dK/dV's differ). Lengths
# beyond the short kernels' 64, or with what these leave to the long ones.
PATTERNS = (
    (_case("full", N=66, Nk=35), F32),
    (_case("causal", is_causal=True), F32),
    (_case("causal-bf16", is_causal=True), BF16),
    (_case("causal-f16", is_causal=True), F16),
    (_case("causal-q40-k90", N=40, Nk=90, is_causal=True), F32),
    (_case("causal-q90-k40-rows-see-nothing", N=90, Nk=40, is_causal=True, lse_grad=True), F32),
    (_case("window", N=100, window=(20, 5)), F32),
    (_case("window-rows-see-nothing", N=90, Nk=30, window=(3, 3)), BF16),
    (_case("bucketed-w10", key_range=KeyRange.bucketed(70, 10)), F32),
    (
        _case("bucketed-w16-both", N=80, key_range=KeyRange.bucketed(80, 16, 1, 1, False)),
        BF16,
    ),
    (_case("bucketed-exact", key_range=KeyRange.bucketed(70, 12, exact=True)), F32),
    (_case("compressed", N=90, Nk=25, key_range=KeyRange.compressed(10, 4, 3)), F32),
    (_case("compressed-strict", N=90, Nk=22, key_range=KeyRange.compressed(3, 4, 0, True)), F32),
    # Both bounds with a floor and a rise above the step.
    (
        _case(
            "steep", N=66, Nk=90,
            key_range=KeyRange(Staircase(3, 4, 5, -30, 2), Staircase(1, 3, 4, 9, 20)),
        ),
        F32,
    ),
)  # fmt: skip

SHAPES = (
    # Heads of a group as rows of one tile (few queries), and tiles of their own (128 and more).
    (_case("group2-packed", 2, 4, 30, Hkv=2, Nk=70, is_causal=True), BF16),
    (_case("group3-packed", H=3, N=23, Hkv=1, Nk=66, window=(30, 0)), F32),
    (_case("group8-decode", H=8, N=1, Hkv=1, Nk=70, is_causal=True), F16),
    (_case("group2-unpacked", H=2, N=130, Hkv=1, window=(40, 0)), F32),
    (_case("d1-dv24", H=1, D=1, Dv=24, is_causal=True), F32),
    (_case("d40-dv8", H=1, D=40, Dv=8, is_causal=True), BF16),
    (_case("d256", H=1, D=256, is_causal=True), BF16),
    (_case("logits-x100", is_causal=True, gain=100.0), F32),
    (_case("logits-x300", H=1, N=130, D=64, is_causal=True, gain=300.0), F32),
    (_case("bnhd", H=2, is_causal=True, layout="bnhd"), BF16),
    (_case("packed-projection", 2, 2, 66, Hkv=1, is_causal=True, layout="packed"), F32),
    (_case("unaligned", D=18, is_causal=True, layout="unaligned"), F32),
    (_case("broadcast-heads", is_causal=True, layout="broadcast"), F32),
    (_case("no-queries", N=0, Nk=33), F32),
    (_case("no-keys", N=33, Nk=0, bias="hqk", lse_grad=True), F32),
    (_case("no-batch", B=0, is_causal=True), F32),
)

MODIFIERS = (
    # One for each way that the gradient of a bias is summed; heads packed and not.
    (_case("bias-bhqk", 2, 2, 40, is_causal=True, bias="bhqk"), F32),
    (_case("bias-bhqk-even", 2, 2, 48, is_causal=True, bias="bhqk"), F32),
    (_case("bias-qk-even-packed", 2, 2, 34, Hkv=1, Nk=48, bias="qk"), BF16),
    (_case("mask-qk-even", 2, 1, 40, Nk=64, mask="qk"), F32),
    (_case("bias-bhqk-packed", 1, 2, 40, Hkv=1, Nk=50, bias="bhqk"), BF16),
    (_case("bias-hqk", 3, 2, 40, is_causal=True, bias="hqk"), F32),
    (_case("bias-hqk-window-bf16", 2, 2, 66, window=(20, 0), bias="hqk"), BF16),
    (_case("bias-bqk-group", 2, 2, 40, Hkv=1, is_causal=True, bias="bqk"), F32),
    (_case("bias-qk", 2, 2, 33, bias="qk"), F32),
    (_case("bias-bk-packed", 2, 2, 40, Hkv=1, is_causal=True, bias="bk"), F32),
    (_case("bias-hk-packed", 2, 2, 40, Hkv=1, is_causal=True, bias="hk"), F32),
    (_case("bias-bhq", 2, 2, 40, is_causal=True, bias="bhq", lse_grad=True), F32),
    (_case("bias-h", 2, 2, 40, is_causal=True, bias="h"), F32),
    (_case("mask-bhqk-packed", 2, 2, 40, Hkv=1, mask="bhqk"), F32),
    (_case("mask-hk-packed", 2, 2, 40, Hkv=1, mask="hk"), F32),
    (_case("mask-qk", is_causal=True, mask="qk"), BF16),
    (_case("mask-rows-see-nothing", N=40, mask="q", mask_pattern="rows", lse_grad=True), F32),
    (_case("mask-first-tiles", N=20, Nk=150, mask="k", mask_pattern="leading"), F32),
    (_case("padding-right", 2, 2, 66, is_causal=True, padding="right"), F32),
    (_case("padding-left-packed", 2, 2, 40, Hkv=1, padding="left"), BF16),
    (_case("padding-empty", 2, 1, 40, padding="empty", lse_grad=True), F32),
    (_case("dropout", N=35, Nk=70, H=1, is_causal=True, dropout_p=0.3), F32),
    (_case("dropout-packed", N=20, Nk=35, Hkv=1, dropout_p=0.5, bias="hqk"), F32),
    (_case("dropout-bf16", N=35, H=1, is_causal=True, dropout_p=0.2), BF16),
    (_case("softcap", is_causal=True, softcap=5.0, gain=4.0), F32),
    (_case("softcap-large", N=40, softcap=50.0, bias="hqk", B=2), F32),
    (_case("lse-grad", is_causal=True, lse_grad=True), F32),
    (_case("scale-negative", is_causal=True, scale=-0.2), F32),
    (_case("scale-zero", is_causal=True, scale=0.0), F32),
    (
        _case(
            "everything", 2, 2, 20, 24, Hkv=1, Nk=50, Dv=40, window=(30, 5), bias="hqk",
            mask="bqk", padding="right", dropout_p=0.1, softcap=8.0, lse_grad=True, layout="bnhd",
        ),
        F32,
    ),
)  # fmt: skip

# Several sequences in one tile of 64 rows and 64 keys.
SHORT = (
    (_case("short-n1", 70, 1, 1), F32),
    (_case("short-n9", 5, 3, 9, is_causal=True), F32),
    (_case("short-n9-bf16", 5, 3, 9, is_causal=True), BF16),
    (_case("short-n33-f16", 2, 1, 33, is_causal=True), F16),
    (_case("short-n64", 1, 2, 64, window=(20, 3)), F32),
    (_case("short-q5-k11", 4, 3, 5, Nk=11, is_causal=True, lse_grad=True), F32),
    (_case("short-rows-see-nothing", 3, 3, 11, Nk=5, is_causal=True, lse_grad=True), F32),
    (_case("short-group3", 3, 6, 7, Hkv=2, is_causal=True, lse_grad=True), F32),
    (_case("short-group4-bf16", 3, 4, 9, Hkv=1, is_causal=True), BF16),
    (_case("short-decode", 9, 4, 1, Hkv=2, Nk=13, is_causal=True), F32),
    (_case("short-d40-dv24", 4, 2, 9, D=40, Dv=24, is_causal=True), BF16),
    (_case("short-compressed", 3, 2, 30, Nk=8, key_range=KeyRange.compressed(10, 4, 3)), F32),
    (_case("short-bnhd", 4, 2, 9, is_causal=True, layout="bnhd"), F32),
    (_case("short-packed-projection", 4, 4, 9, Hkv=2, layout="packed"), F32),
    (_case("short-scale-negative", 4, 2, 9, is_causal=True, scale=-0.5), F32),
    (_case("short-d256", 2, 2, 9, D=256, is_causal=True), BF16),
    # Every way in which a bias is broadcast, with its gradient; heads packed and not.
    (_case("short-bias-bhqk", 3, 4, 9, Hkv=2, is_causal=True, bias="bhqk"), F32),
    (_case("short-bias-bhqk-bf16", 5, 2, 9, is_causal=True, bias="bhqk"), BF16),
    (_case("short-bias-hqk", 9, 2, 9, is_causal=True, bias="hqk"), F32),
    (_case("short-bias-hqk-group-bf16", 7, 4, 9, Hkv=2, bias="hqk"), BF16),
    (_case("short-bias-bqk-group", 3, 6, 5, Hkv=2, Nk=8, bias="bqk"), F32),
    (_case("short-bias-qk", 5, 3, 8, bias="qk", lse_grad=True), F32),
    (_case("short-bias-bk-group", 3, 4, 7, Hkv=2, is_causal=True, bias="bk"), F32),
    (_case("short-bias-hk-group", 5, 4, 7, Hkv=2, bias="hk"), F32),
    (_case("short-bias-k", 5, 2, 7, bias="k"), F32),
    (_case("short-bias-bhq", 3, 2, 9, is_causal=True, bias="bhq", lse_grad=True), F32),
    (_case("short-bias-h", 3, 2, 9, is_causal=True, bias="h"), F32),
    (_case("short-mask-bhqk-group", 3, 4, 9, Hkv=2, mask="bhqk"), F32),
    (_case("short-mask-hk", 3, 3, 9, mask="hk"), F32),
    (_case("short-mask-bq", 3, 3, 9, mask="bq", mask_pattern="rows", lse_grad=True), F32),
    (_case("short-padding-left", 5, 2, 9, padding="left", is_causal=True), BF16),
    (_case("short-padding-empty", 4, 2, 12, padding="empty", lse_grad=True), F32),
    (_case("short-dropout", 3, 2, 9, is_causal=True, dropout_p=0.3), F32),
    (_case("short-dropout-group-bf16", 3, 4, 9, Hkv=2, dropout_p=0.5, bias="hqk"), BF16),
    (_case("short-softcap", 3, 2, 9, is_causal=True, softcap=5.0, gain=4.0), F32),
    (_case("short-window", 4, 2, 20, window=(5, 2)), F32),
    (
        _case(
            "short-everything", 5, 4, 8, 24, Hkv=2, Nk=15, Dv=40, window=(9, 3), bias="hqk",
            mask="bqk", padding="right", dropout_p=0.1, softcap=8.0, lse_grad=True, layout="bnhd",
        ),
        F32,
    ),
)  # fmt: skip

# Those that all backends share, the types by turns.
SHARED = tuple(
    (case, (F32, BF16)[i % 2])
    for i, case in enumerate(case for case in CORRECTNESS if "short" in case.name)
)


def _parameters(table: tuple[tuple[Case, torch.dtype], ...]) -> list:
    return [
        pytest.param(case, dtype, id=f"attention-triton-{dtype_name(dtype)}-{case.name}")
        for case, dtype in table
    ]


def _check(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    with poisoned_memory():
        results = compute(inputs, "triton")
    check_accuracy(inputs, results)


@pytest.fixture
def long_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of one sequence, however short it is."""
    monkeypatch.setattr(triton_configs, "SHORT_ROWS", ())


@pytest.mark.usefixtures("long_kernels")
@pytest.mark.parametrize(("case", "dtype"), _parameters(PATTERNS + SHAPES + MODIFIERS))
def test_long_kernels(case: Case, dtype: torch.dtype) -> None:
    _check(case, dtype)


@pytest.mark.parametrize(("case", "dtype"), _parameters(SHORT + SHARED))
def test_several_sequences_in_a_tile(case: Case, dtype: torch.dtype) -> None:
    assert is_short(make_inputs(case, dtype).call())
    _check(case, dtype)


@pytest.mark.parametrize("loop", ["always", "branch", "split"])
def test_loop_forms(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three forms of the loop agree with the oracle where all kinds of tiles occur."""
    for kernel, config in triton_configs.INTERPRETER.items():
        monkeypatch.setitem(triton_configs.INTERPRETER, kernel, replace(config, loop=loop))
    _check(_case("loop", N=100, window=(40, 3)), F32)


@pytest.mark.parametrize("case", [
    _case("causal", N=70, D=24, is_causal=True), _case("window", 1, 4, 66, Hkv=2, window=(20, 5)),
    _case("packed", 2, 4, 30, Hkv=2, Nk=70, layout="bnhd", bias="hqk"),
    _case("unaligned", D=18, is_causal=True, layout="unaligned"),
], ids=str)  # fmt: skip
def test_tensor_descriptors(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values fetched by descriptors; where their rows are not aligned, by pointers."""
    config = replace(triton_configs.INTERPRETER["forward"], descriptors=True)
    monkeypatch.setitem(triton_configs.INTERPRETER, "forward", config)
    call = make_inputs(case, F32).call()
    launch = plan_forward(call, target_of(call.q, True), *call.new_outputs())[0]
    assert launch.arguments["DESCRIPTORS"] == (case.layout != "unaligned")
    _check(case, F32)


def test_row_statistics_of_any_two_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """dK/dV reads whole tiles of the statistics that dQ leaves in smaller ones."""
    for kernel, rows in (("dq", 16), ("dkv", 64)):
        config = replace(triton_configs.INTERPRETER[kernel], block_m=rows)
        monkeypatch.setitem(triton_configs.INTERPRETER, kernel, config)
    _check(_case("statistics", N=70, is_causal=True), F32)


def test_dropout_in_whole_periods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 64 keys share the generator's four words; the mask is the same."""
    for kernel in ("forward", "dq", "dkv"):
        config = replace(triton_configs.INTERPRETER[kernel], block_m=16, block_n=64)
        monkeypatch.setitem(triton_configs.INTERPRETER, kernel, config)
    _check(_case("dropout-64", N=20, Nk=131, Hkv=1, dropout_p=0.4), F32)


def test_backward_follows_any_forward() -> None:
    """What is saved, natural-log lse included, is the same on every backend."""
    inputs = make_inputs(_case("saved", N=70, is_causal=True, lse_grad=True), F32)
    call, names = inputs.call(), ("dq", "dk", "dv")
    standard = make_standard(inputs)
    for first, second in ((reference, backend), (backend, reference)):
        out, lse = first.forward(call)
        *gradients, dbias = second.backward(call, out, lse, inputs.dout, inputs.dlse, False)
        assert dbias is None
        standard.check(dict(zip(names, gradients, strict=True)))


def test_bias_gradient_slices_do_not_change_with_the_order() -> None:
    """A bias that 5 batches share is summed in slices; the last slice may be shorter."""
    case = _case("slices", 5, 1, 17, bias="qk")
    inputs = make_inputs(case, F32)
    first, second = (compute(inputs, "triton")["dbias"] for _ in range(2))
    assert torch.equal(first, second)
    check_accuracy(inputs, {"dbias": first})


def test_bias_of_another_dtype() -> None:
    """A float64 bias with float32 inputs: read and summed in float32, returned in float64."""
    inputs = make_inputs(_case("bias-dtype", N=40, is_causal=True, bias="bhqk"), F32)
    wide = replace(inputs, bias=inputs.bias.double())
    results = compute(wide, "triton")
    assert results["dbias"].dtype == torch.float64
    check_accuracy(inputs, results)


@pytest.mark.slow
def test_offsets_beyond_32_bits() -> None:
    """Tokens 2**26 elements apart: the offset of token 33 exceeds 2**31 (memory is not touched)."""
    inputs = make_inputs(_case("far", H=1, N=66, is_causal=True), BF16)
    memory = torch.empty(66 * 2**26, dtype=BF16)
    far = memory.as_strided(inputs.k.shape, (0, 0, 2**26, 1))
    far.copy_(inputs.k)
    results = compute(replace(inputs, k=far, v=far, q=far), "triton")
    near = replace(inputs, k=inputs.k, v=inputs.k, q=inputs.k)
    check_accuracy(near, results)


def _call(**changes):
    return replace(make_inputs(_case("supports", N=8), F32).call(), **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({n: torch.zeros(1, 1, 8, 16, dtype=torch.float64) for n in "qkv"}, "float64"),
        ({n: torch.zeros(1, 1, 8, 257) for n in "qk"}, "q has 257 channels"),
        ({"v": torch.zeros(1, 1, 8, 257)}, "v has 257 channels"),
        (
            {"key_range": KeyRange(Staircase(0, 1, 2**30, -(2**31)), Staircase(offset=8))},
            "beyond 32 bits",
        ),
    ],
    ids=["float64", "d257", "dv257", "key-range"],
)
def test_refusals(changes: dict, reason: str) -> None:
    call = _call(**changes)
    assert [text for text in backend.supports(call) if reason in text]
    with pytest.raises(NotImplementedError, match=reason):
        dispatch.resolve("attention", call, "triton")


def test_refuses_cpu_tensors_when_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "INTERPRETED", False)
    assert [text for text in backend.supports(_call()) if "needs a GPU" in text]
