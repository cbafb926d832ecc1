"""The compiled CPU kernels against the float64 reference, on each instruction set there is."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hierkernels as hk
from hierkernels import KeyRange, Staircase
from hierkernels.native import native, native_error
from hierkernels.ops.attention import cpu, reference
from hierkernels.ops.attention.call import AttentionCall
from hierkernels.ops.attention.spec import ALL_DTYPES, CORRECTNESS, Case, dtype_name
from hierkernels.testing import (
    Errors,
    Inputs,
    Results,
    Standard,
    case_ids,
    check_accuracy,
    compute,
    error,
    level_ids,
    make_inputs,
    make_standard,
    poisoned_memory,
    threads,
)

CORE = native()
if CORE is None:
    pytest.skip(f"the compiled core is missing: {native_error()}", allow_module_level=True)
ISAS: list[str] = CORE.cpu_isas()
CASES = {case.name: case for case in CORRECTNESS}

# All cases run on the best instruction set. The others are the same source at another vector width
# (and AMX another source, for bfloat16), so there a case of each kind is enough: tile edges, tails
# of the vectors (odd channels and lengths), packing, each score modifier, each kind of range.
OTHER_LEVELS = (
    "causal-n0", "causal-n1", "causal-n9", "causal-n65", "causal-n193", "full-n17",
    "short-29x4x9", "short-7x3x33", "causal-q7-k200", "causal-q65-k64", "full-q33-k0", "d1", "d8",
    "d40", "d96", "d256", "d100-n130", "d8-dv1", "d192-dv128", "g3-hkv2", "g3-short", "g8-decode",
    "window-100-30", "window-0-5", "bucketed-w16", "compressed-g4", "bias-bhqk", "bias-hk",
    "bias-hqk-g3", "bias-short", "mask-bhqk", "mask-leading-tile", "mask-rows", "padding-empty",
    "padding-short", "dropout", "dropout-g2", "dropout-short", "softcap-bias", "lse-grad",
    "lse-grad-short", "scale-negative", "logits-x100", "everything", "layout-packed",
    "layout-unaligned", "layout-broadcast-short",
)  # fmt: skip
# Of each code path one, for the tests that ask another question than accuracy.
FEW = (
    "causal-n193", "short-29x4x9", "g3-hkv2", "g3-short", "window-q200-k50", "compressed-g4",
    "bias-hqk", "bias-bh", "bias-short", "padding-causal", "dropout", "softcap", "lse-grad",
    "everything",
)  # fmt: skip


@functools.cache
def _standard(name: str, dtype: torch.dtype) -> tuple[Inputs, Standard]:
    inputs = make_inputs(CASES[name], dtype)
    return inputs, make_standard(inputs)


def _kernels(inputs: Inputs) -> Results:
    """Results of the cpu backend in memory that held NaN before."""
    with threads(), poisoned_memory():
        assert torch.empty(1).isnan().all(), "the memory is not poisoned"
        return compute(inputs, "cpu")


_BEST = [
    pytest.param(case.name, dtype, id=f"attention-{ISAS[-1]}-{name}")
    for name, case, dtype in case_ids(CORRECTNESS, ALL_DTYPES)
]
_LEVELS = [
    pytest.param(*values, id=name)
    for name, *values in level_ids("attention", ISAS, ALL_DTYPES, lambda dtype: OTHER_LEVELS)
]


@pytest.mark.parametrize("name, dtype", _BEST)
def test_accuracy(name: str, dtype: torch.dtype, set_isa: Callable[[str], None]) -> None:
    set_isa(ISAS[-1])
    inputs, standard = _standard(name, dtype)
    check_accuracy(inputs, _kernels(inputs), standard)


@pytest.mark.parametrize("isa, name, dtype", _LEVELS)
def test_accuracy_on_other_levels(
    isa: str, name: str, dtype: torch.dtype, set_isa: Callable[[str], None]
) -> None:
    set_isa(isa)
    inputs, standard = _standard(name, dtype)
    check_accuracy(inputs, _kernels(inputs), standard)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_bias_gradient_of_nothing_is_zero(
    dtype: torch.dtype, isa: str, set_isa: Callable[[str], None]
) -> None:
    set_isa(isa)
    for B, N, K in ((0, 64, 64), (2, 0, 64), (2, 64, 0)):
        for shape in ((1, 2, N, K), (1, 1, N, K), (1, 2, 1, K), (1, 2, N, 1), (1, 1, 1, 1)):
            q, k = torch.randn(B, 2, N, 64, dtype=dtype), torch.randn(B, 2, K, 64, dtype=dtype)
            bias = torch.randn(shape, dtype=dtype, requires_grad=True)
            with poisoned_memory():
                out = hk.attention(q, k, k, attn_bias=bias, backend="cpu")
                (grad,) = torch.autograd.grad(out, bias, torch.ones_like(out))
            assert (grad == 0).all(), f"{B} x {N} queries, {K} keys, bias {shape}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_results_are_bitwise_repeatable(
    dtype: torch.dtype, isa: str, set_isa: Callable[[str], None]
) -> None:
    # Sums over queries, groups and the broadcast dimensions of a bias are where threads could meet.
    set_isa(isa)
    for name in FEW:
        inputs = make_inputs(CASES[name], dtype)
        with threads(4):
            first = compute(inputs, "cpu")
            for _ in range(4):
                for result, value in compute(inputs, "cpu").items():
                    same = torch.equal(
                        value.view(torch.uint8) if value.numel() else value,
                        first[result].view(torch.uint8) if value.numel() else first[result],
                    )
                    assert same, f"{name}: {result}"


@functools.cache
def _standard_of_saved(name: str, dtype: torch.dtype) -> Standard:
    """The standard, with eager's backward formula on an exact lse and out as the yardstick.

    Where one backend does both passes, the rounding of its scores cancels against that of its lse.
    What any two backends share is out and lse alone, so eager must do without that, too.
    """
    inputs, standard = _standard(name, dtype)
    expected, call = standard.expected, inputs.call()
    out, lse = expected["out"].to(dtype), expected["lse"].to(call.lse_dtype)
    eager = compute(inputs, "reference")
    grads = reference.backward(
        call, out, lse, inputs.dout, inputs.dlse, bias_grad=call.bias is not None
    )
    allowed = dict(standard.allowed)
    for result, grad in zip(("dq", "dk", "dv", "dbias"), grads, strict=True):
        if grad is None:
            continue
        own, saved = error(eager[result], expected[result]), error(grad, expected[result])
        allowed[result] = Errors(
            allowed[result].largest + 2 * max(0.0, saved.largest - own.largest),
            allowed[result].rms + 2 * max(0.0, saved.rms - own.rms),
        )
    return replace(standard, allowed=allowed)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("first, second", [("reference", "cpu"), ("cpu", "reference")])
def test_backward_follows_another_backends_forward(
    first: str, second: str, dtype: torch.dtype, name: str
) -> None:
    inputs, standard = _standard(name, dtype)[0], _standard_of_saved(name, dtype)
    call = inputs.call()
    with threads():
        out, lse = torch.ops.hierkernels.attention_forward(*call.arguments(), first)
        dq, dk, dv, dbias = torch.ops.hierkernels.attention_backward(
            *call.arguments(), out, lse, inputs.dout, inputs.dlse, call.bias is not None, second
        )
    results = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    if call.bias is not None:
        results["dbias"] = dbias
    check_accuracy(inputs, results, standard)


GRADCHECK = {
    "causal": {"is_causal": True},
    "window-softcap": {"window_size": (3, 1), "softcap": 2.0},
    "dropout": {"is_causal": True, "dropout_p": 0.3, "dropout_seed": 5},
    "mask": {"attn_mask": torch.arange(63).reshape(7, 9) % 4 != 0},
}


@pytest.mark.parametrize("bias_shape", [(4, 7, 9), (1, 9), (2, 4, 1, 1)], ids=str)
@pytest.mark.parametrize("name", GRADCHECK)
def test_gradcheck(name: str, bias_shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(1)
    shapes = (2, 4, 7, 5), (2, 2, 9, 5), (2, 2, 9, 3), bias_shape
    tensors = [
        torch.randn(s, generator=g, dtype=torch.float64).requires_grad_()
        for s in shapes  # numerically: q, k, v, bias against out and lse
    ]

    def f(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return hk.attention(
            q, k, v, attn_bias=bias, return_lse=True, backend="cpu", **GRADCHECK[name]
        )

    assert torch.autograd.gradcheck(f, tensors)


# -------------------------------------------------------------------------------------------------
# Values at the edge


def test_bias_may_have_another_dtype() -> None:
    # The gradient of the bias has the dtype of the bias.
    case = CASES["bias-hqk"]
    for q_dtype, bias_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
        inputs = make_inputs(case, q_dtype)
        assert inputs.bias is not None
        inputs = replace(inputs, bias=inputs.bias.to(bias_dtype))
        results = _kernels(inputs)
        assert results["dbias"].dtype == bias_dtype
        check_accuracy(inputs, results)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_bias_and_masks_of_any_strides(
    dtype: torch.dtype, isa: str, set_isa: Callable[[str], None]
) -> None:
    # Transposed (last stride not 1), expanded (stride 0) and every second element.
    set_isa(isa)
    case = replace(CASES["mask-bhqk"], name="strided", bias="hqk", padding="right")
    inputs = make_inputs(case, dtype)
    assert inputs.bias is not None and inputs.mask is not None and inputs.padding is not None
    strided = replace(
        inputs,
        bias=inputs.bias.mT.contiguous().mT,
        mask=inputs.mask.repeat_interleave(2, -1)[..., ::2],
        padding=inputs.padding[:1].expand(case.B, -1),
    )
    check_accuracy(strided, _kernels(strided))
    expanded = replace(
        inputs, bias=inputs.bias[:, :1, :, :1].expand_as(inputs.bias), mask=inputs.mask.mT
    )
    check_accuracy(expanded, _kernels(expanded))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=dtype_name)
def test_bias_of_minus_infinity_hides_keys(
    dtype: torch.dtype, isa: str, set_isa: Callable[[str], None]
) -> None:
    # Common in user code. Whole rows of it too, and a whole leading tile.
    set_isa(isa)
    case = replace(CASES["mask-leading-tile"], name="bias-minus-infinity", mask="", bias="qk")
    inputs = make_inputs(case, dtype)
    assert inputs.bias is not None
    bias = inputs.bias.clone()
    bias[..., :128] = -math.inf
    bias[:, :, 5] = -math.inf
    inputs = replace(inputs, bias=bias)
    results = _kernels(inputs)
    assert results["lse"][:, :, 5].eq(-math.inf).all()
    check_accuracy(inputs, results)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("batch, n", [(1, 70), (11, 9)], ids=["long", "short"])
def test_nan_and_infinity_propagate(
    batch: int, n: int, dtype: torch.dtype, isa: str, set_isa: Callable[[str], None]
) -> None:
    set_isa(isa)
    row, key = n // 2, n // 2 + 1
    g = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(batch, 2, n, 16, generator=g).to(dtype) for _ in range(3))
    k[..., 3] = k[..., 3].abs() + 1  # an infinite query scores +inf: -inf would hide the key
    clean, clean_lse = hk.attention(q, k, v, is_causal=True, return_lse=True, backend="cpu")
    sees_key = torch.arange(n) >= key

    for bad in (math.nan, math.inf):
        poisoned = q.clone()
        poisoned[0, 1, row, 3] = bad
        out, lse = hk.attention(poisoned, k, v, is_causal=True, return_lse=True, backend="cpu")
        assert out[0, 1, row].isnan().all() and not lse[0, 1, row].isfinite()
        out[0, 1, row], lse[0, 1, row] = clean[0, 1, row], clean_lse[0, 1, row]
        assert torch.equal(out, clean) and torch.equal(lse, clean_lse)  # that row alone

    poisoned = k.clone()
    poisoned[0, 1, key, 3] = math.nan
    out, lse = hk.attention(q, poisoned, v, is_causal=True, return_lse=True, backend="cpu")
    assert torch.equal(lse[0, 1].isnan(), sees_key)
    assert torch.equal(out[0, 1].isnan().all(-1), sees_key)
    assert torch.equal(out[0, 1][~sees_key], clean[0, 1][~sees_key])
    assert torch.equal(out[0, 0], clean[0, 0])

    poisoned = v.clone()
    poisoned[0, 1, key, 3] = math.inf
    out, lse = hk.attention(q, k, poisoned, is_causal=True, return_lse=True, backend="cpu")
    assert torch.equal(lse, clean_lse)
    assert not out[0, 1, sees_key, 3].isfinite().any()
    assert torch.equal(out[0, 1, :, :3], clean[0, 1, :, :3])


def test_infinite_gradient_propagates() -> None:
    inputs = make_inputs(CASES["causal-n65"], torch.float32)
    dout = inputs.dout.clone()
    dout[0, 0, 40, 7] = math.nan
    results = _kernels(replace(inputs, dout=dout))
    assert results["dq"][0, 0, 40].isnan().all() and results["dv"][0, 0, :41, 7].isnan().all()
    assert results["dk"][0, 0, :41].isnan().all()
    assert all(results[name][1].isfinite().all() for name in ("dq", "dk", "dv"))


def test_scores_that_are_all_equal_and_huge() -> None:
    # exp(score) overflows by far; only differences may enter it.
    q, k = torch.full((1, 1, 40, 16), 1e4), torch.full((1, 1, 40, 16), 1e4)
    v = torch.randn(1, 1, 40, 16)
    out, lse = hk.attention(q, k, v, scale=1.0, return_lse=True, backend="cpu")
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out))
    torch.testing.assert_close(lse, torch.full_like(lse, 1.6e9))


def test_scalar_and_strided_gradients_of_the_outputs() -> None:
    # sum() hands down gradients of stride 0, a transposed use one whose last stride is not 1.
    inputs = make_inputs(CASES["lse-grad"], torch.float64).requires_grad()
    for loss in (
        lambda out, lse: out.sum() + lse.sum(),
        lambda out, lse: (out.mT.contiguous() ** 2).sum(),
        lambda out, lse: lse.exp().sum(),
    ):
        grads = [
            torch.autograd.grad(
                loss(*inputs.run(backend)), (inputs.q, inputs.k, inputs.v), materialize_grads=True
            )
            for backend in ("cpu", "reference")
        ]
        for ours, expected in zip(*grads, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.slow  # reserves 12 GiB of addresses (it touches little of them)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_offsets_beyond_32_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each tensor's second sequence starts 2**31 + 64 elements after the first.
    far = 2**31 + 64
    memory = torch.empty(far + 2**22, dtype=dtype)
    flags = torch.ones(1).to(torch.bool).new_empty(far + 2**22)
    used = 0

    def place(t: torch.Tensor) -> torch.Tensor:
        nonlocal used
        storage = flags if t.dtype == torch.bool else memory
        inner = t[0].contiguous().stride()
        view = storage.as_strided(t.shape, (far, *inner), used)
        used += t[0].numel() + 64
        assert used < 2**22
        return view.copy_(t)

    def place_empty(t: torch.Tensor) -> torch.Tensor:
        return place(torch.full(t.shape, math.nan, dtype=dtype))

    case = Case(
        "far", 2, 4, 2, 70, 90, 64, 64, is_causal=True, bias="bhqk", mask="bqk", padding="right"
    )
    near = make_inputs(case, dtype)
    assert near.bias is not None and near.mask is not None and near.padding is not None
    inputs = replace(
        near,
        q=place(near.q), k=place(near.k), v=place(near.v), dout=place(near.dout),
        bias=place(near.bias), mask=place(near.mask), padding=place(near.padding),
    )  # fmt: skip
    call = inputs.call()
    monkeypatch.setattr(
        AttentionCall,
        "new_outputs",
        lambda self: (place_empty(near.dout), torch.full(near.dout.shape[:3], math.nan)),
    )
    monkeypatch.setattr(
        AttentionCall,
        "new_gradients",
        lambda self: tuple(map(place_empty, (near.q, near.k, near.v))),
    )
    with threads():
        out, lse = cpu.forward(call)
        assert out.stride(0) == far
        dq, dk, dv, dbias = cpu.backward(call, out, lse, inputs.dout, None, bias_grad=True)
    monkeypatch.undo()
    results = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv, "dbias": dbias}
    check_accuracy(near, results)


# -------------------------------------------------------------------------------------------------
# Any problem at all

_bounds = st.builds(
    Staircase,
    shift=st.integers(-30, 30),
    step=st.integers(1, 12),
    rise=st.integers(0, 6),
    offset=st.integers(-60, 60),
    floor=st.integers(-2, 20),
)
_dims = st.sampled_from(["", "bhqk", "hqk", "hk", "k", "q", "qk", "b", "1"])


@st.composite
def _problems(draw: st.DrawFn) -> Case:
    group, kv_heads = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    dim = draw(st.integers(1, 72))
    return Case(
        name=f"drawn-{draw(st.integers(0, 999))}",
        B=draw(st.integers(1, 4)),
        Hq=group * kv_heads,
        Hkv=kv_heads,
        Nq=draw(st.integers(1, 80)),
        Nk=draw(st.integers(1, 80)),
        D=dim,
        Dv=draw(st.sampled_from([dim, dim + 3, 16])),
        key_range=KeyRange(draw(_bounds), draw(_bounds)),
        bias=draw(_dims),
        mask=draw(_dims),
        padding=draw(st.sampled_from(["", "right", "left", "random", "empty"])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.25])),
        softcap=draw(st.sampled_from([None, None, 3.0])),
        scale=draw(st.sampled_from([None, 0.5, -0.25])),
        lse_grad=draw(st.booleans()),
        layout=draw(st.sampled_from(["bhnd", "bnhd", "unaligned", "broadcast"])),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_name)
@settings(
    derandomize=True,
    max_examples=60,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(case=_problems())
def test_any_problem(dtype: torch.dtype, case: Case) -> None:
    inputs = make_inputs(case, dtype)
    check_accuracy(inputs, _kernels(inputs))


def test_refuses_what_it_cannot_do() -> None:
    wide = torch.zeros(1, 1, 2, cpu.MAX_DIM + 1)
    with pytest.raises(NotImplementedError, match=f"head channels above {cpu.MAX_DIM}"):
        hk.attention(wide, wide, wide, backend="cpu")
    short, huge = torch.zeros(1, 1, 2, 8), torch.zeros(8).expand(1, 1, 2**31, 8)  # no memory
    for q, kv, what in ((huge, short, "queries"), (short, huge, "keys")):
        with pytest.raises(NotImplementedError, match=f"{2**31} {what}, at most {cpu.MAX_LENGTH}"):
            hk.attention(q, kv, kv, backend="cpu")
    limit = huge[:, :, : cpu.MAX_LENGTH]
    assert hk.explain("attention", short, limit, limit).backend == "cpu"
    call = make_inputs(CASES["causal-n9"], torch.float32).call()
    assert cpu.supports(call) == [] and reference.supports(call) == []
