"""What must hold of selected attention whatever its values, on every backend of this machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hierkernels as hk
from hierkernels.native import native
from hierkernels.ops.selected_attention import cpu, reference
from hierkernels.ops.selected_attention.call import SelectedCall
from hierkernels.ops.selected_attention.patterns import PATTERNS
from hierkernels.ops.selected_attention.spec import CORRECTNESS, Case, dtype_name
from hierkernels.ops.selected_attention.testing import (
    Inputs,
    check_accuracy,
    make_inputs,
    make_standard,
)
from hierkernels.testing import compute, poisoned_memory, threads

CORE = native()
BACKENDS = ("reference",) if CORE is None else ("cpu", "reference")
# Those with a kernel of their own.
LEVELS = ("generic", "avx2", "avx512", "avx512bf16")
ISAS: list[str] = [] if CORE is None else [isa for isa in CORE.cpu_isas() if isa in LEVELS]
CASES = {case.name: case for case in CORRECTNESS}
needs_core = pytest.mark.skipif(CORE is None, reason="the compiled core is missing")

# Of each code path one.
FEW = (
    "n65", "g3-per-head-own", "b5-g16-any", "any-own-g4", "weights-twice", "lse-grad", "everything",
)  # fmt: skip


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.numel() == 0 or torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


@needs_core
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("name", ["n130", "any", "any-own-g4", "b5-g16-any", "q7-k200"])
def test_the_future_leaves_no_trace(
    name: str, dtype: torch.dtype, isa: str, set_isa: Callable[[str], None]
) -> None:
    # NaN in the keys and values from some token on: earlier outputs are bit-identical, even of
    # queries for which future blocks are named.
    set_isa(isa)
    inputs = make_inputs(CASES[name], dtype)
    out, lse = inputs.run("cpu")
    Nq, Nk = inputs.case.Nq, inputs.case.Nk
    for token in (Nk - 1, Nk - 3, Nk // 2 + 5):
        k, v = inputs.k.clone(), inputs.v.clone()
        k[:, :, token:] = v[:, :, token:] = math.nan
        later_out, later_lse = replace(inputs, k=k, v=v).run("cpu")
        before = max(0, token - (Nk - Nq))  # queries that sit before the token
        assert _same_bits(later_out[:, :, :before], out[:, :, :before])
        assert _same_bits(later_lse[:, :, :before], lse[:, :, :before])
        if name in ("n130", "any-own-g4"):  # these see their own token
            assert later_lse[:, :, before:].isnan().all()


@needs_core
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_results_are_bitwise_repeatable(
    dtype: torch.dtype, isa: str, set_isa: Callable[[str], None]
) -> None:
    # dk and dv are sums over queries that several threads share; "same": all visit one block.
    set_isa(isa)
    for name in (*FEW, "same-own-g4"):
        inputs = make_inputs(CASES[name], dtype)
        with threads(4):
            first = compute(inputs, "cpu")
            for _ in range(3):
                for result, value in compute(inputs, "cpu").items():
                    assert _same_bits(value, first[result]), f"{name}: {result}"


@needs_core
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_any_number_of_threads(n: int) -> None:
    # The ranges of queries that share a head's keys depend on it: 1, 2, 3 and 4 of them.
    case = replace(CASES["same-own-g4"], name="threads", Nq=300, Nk=310, D=16, Dv=16)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(case, dtype)
        with threads(n), poisoned_memory():
            results = compute(inputs, "cpu")
        check_accuracy(inputs, results)


@needs_core
@pytest.mark.parametrize("name", FEW)
def test_backward_follows_another_backends_forward(name: str) -> None:
    inputs = make_inputs(CASES[name], torch.float64)
    call, standard = inputs.call(), make_standard(inputs)
    wanted = inputs.weights is not None
    for first, second in ((reference, cpu), (cpu, reference)):
        out, lse = first.forward(call)
        *grads, dweights = second.backward(call, out, lse, inputs.dout, inputs.dlse, wanted)
        results = dict(zip(("dq", "dk", "dv"), grads, strict=True)) | {"out": out, "lse": lse}
        if dweights is not None:
            results["dweights"] = dweights
        standard.check(results)


@needs_core
@pytest.mark.parametrize("per_head", [False, True], ids=["shared", "per-head"])
@pytest.mark.parametrize("own", [False, True], ids=["named", "own"])
def test_gradcheck(own: bool, per_head: bool) -> None:
    g = torch.Generator().manual_seed(1)
    shapes = (2, 4, 7, 5), (2, 2, 9, 5), (2, 2, 9, 3), (2, 4 if per_head else 2, 7, 4)
    tensors = [
        torch.randn(s, generator=g, dtype=torch.float64).requires_grad_()
        for s in shapes  # numerically: q, k, v, weights against out and lse
    ]
    indices = torch.randint(-1, 3, shapes[3], generator=g)  # duplicates, none, the future

    def f(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, weights = tensors
        out, lse = hk.selected_attention(
            q, k, v, indices, block_size=4, block_weights=weights, include_own_block=own,
            return_lse=True, backend="cpu",
        )  # fmt: skip
        return out, lse.clamp(min=-100)  # -inf for rows that see nothing: no difference quotient

    assert torch.autograd.gradcheck(f, tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_those_who_see_it(backend: str) -> None:
    inputs = make_inputs(CASES["n130"], torch.float32)
    seen = reference.visible(inputs.call())[0, 0]  # (Nq, Nk)
    out, lse = inputs.run(backend)
    for key in (0, 40, 129):
        k = inputs.k.clone()
        k[0, 0, key, 3] = math.nan
        bad_out, bad_lse = replace(inputs, k=k).run(backend)
        assert torch.equal(bad_lse[0, 0].isnan(), seen[:, key])
        assert torch.equal(bad_out[0, 0].isnan().all(-1), seen[:, key])
        if backend == "cpu":
            assert _same_bits(bad_out[0, 0][~seen[:, key]], out[0, 0][~seen[:, key]])
            assert _same_bits(bad_out[1], out[1]) and _same_bits(bad_lse[1], lse[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_choices_in_any_form(backend: str) -> None:
    # Order, place of the -1s, 32 bits, strides: only the sum's order may differ.
    inputs = make_inputs(CASES["weights-holes"], torch.float64)
    expected = compute(inputs, backend)
    indices, weights = inputs.indices, inputs.weights
    assert weights is not None
    order = torch.tensor([2, 0, 3, 1])
    swapped = indices.transpose(1, 2).contiguous().transpose(1, 2)
    forms = {
        "order": (indices[..., order], weights[..., order]),
        "int32": (indices.int(), weights),
        "strides": (swapped, weights.mT.contiguous().mT),
        "every-second": (indices.repeat_interleave(2, -1)[..., ::2], weights),
        "float32": (indices, weights.float().double()),
    }
    for form, (i, w) in forms.items():
        results = compute(replace(inputs, indices=i, weights=w), backend)
        if form == "order":
            results["dweights"] = results["dweights"][..., order.argsort()]
        tolerance = 1e-6 if form == "float32" else 1e-12
        for name, value in results.items():
            torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_choice_for_all_queries_by_expansion(backend: str) -> None:
    inputs = make_inputs(CASES["same"], torch.float64)
    one = inputs.indices[:1, :1, :1].expand_as(inputs.indices)
    for name, value in compute(replace(inputs, indices=one), backend).items():
        torch.testing.assert_close(value, compute(inputs, backend)[name])


@needs_core
def test_weights_of_another_dtype() -> None:
    case = CASES["weights"]
    for q_dtype, dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
        inputs = make_inputs(case, q_dtype)
        assert inputs.weights is not None
        inputs = replace(inputs, weights=inputs.weights.to(dtype))
        results = compute(inputs, "cpu")
        assert results["dweights"].dtype == dtype
        check_accuracy(inputs, results)


@needs_core
def test_unchecked_indices_out_of_range_in_the_backward() -> None:
    inputs = make_inputs(CASES["weights"], torch.float64).requires_grad()
    wild = inputs.indices.clone()
    wild[..., 1] = torch.tensor([2**40, -(2**40), 5, -2])[torch.arange(70) % 4]
    tame = wild.where((wild >= 0) & (wild < 5), -1)
    (q, k, v, _), options = inputs.arguments()
    leaves = list(inputs.differentiable().values())
    grads = [
        torch.autograd.grad(
            hk.selected_attention(q, k, v, i, check_indices=False, backend="cpu", **options),
            leaves,
            inputs.dout,
        )
        for i in (wild, tame)
    ]
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@needs_core
def test_equal_keys_share_the_weight() -> None:
    q, k = torch.full((1, 2, 40, 16), 1e4), torch.full((1, 1, 40, 16), 1e4)
    v = torch.randn(1, 1, 40, 16)
    indices = torch.tensor([0, 2]).expand(1, 1, 40, 2)
    out, lse = hk.selected_attention(
        q, k, v, indices, block_size=8, scale=1.0, return_lse=True, backend="cpu"
    )
    expected = torch.cat((v[:, :, :8], v[:, :, 16:24]), 2).mean(2)
    torch.testing.assert_close(out[:, :, -1], expected.expand(1, 2, 16))
    torch.testing.assert_close(lse, torch.full_like(lse, 1.6e9))


@needs_core
@pytest.mark.slow  # reserves 12 GiB of addresses (it touches little of them)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_offsets_beyond_32_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each tensor's second sequence starts 2**31 + 64 elements after the first.
    far = 2**31 + 64
    memory = torch.empty(far + 2**22, dtype=dtype)
    used = 0

    def place(t: torch.Tensor) -> torch.Tensor:
        nonlocal used
        view = memory.as_strided(t.shape, (far, *t[0].contiguous().stride()), used)
        used += t[0].numel() + 64
        assert used < 2**22
        return view.copy_(t)

    def place_empty(t: torch.Tensor) -> torch.Tensor:
        return place(torch.full(t.shape, math.nan, dtype=dtype))

    near = make_inputs(CASES["n130"], dtype)
    inputs = replace(near, q=place(near.q), k=place(near.k), v=place(near.v), dout=place(near.dout))
    call = inputs.call()
    monkeypatch.setattr(
        SelectedCall,
        "new_outputs",
        lambda self: (place_empty(near.dout), torch.full(near.dout.shape[:3], math.nan)),
    )
    monkeypatch.setattr(
        SelectedCall,
        "new_gradients",
        lambda self: tuple(map(place_empty, (near.q, near.k, near.v))),
    )
    with threads():
        out, lse = cpu.forward(call)
        assert out.stride(0) == far
        dq, dk, dv, _ = cpu.backward(call, out, lse, inputs.dout, None, False)
    monkeypatch.undo()
    check_accuracy(near, {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv})


@needs_core
def test_refuses_what_it_cannot_do() -> None:
    wide = torch.zeros(1, 1, 2, cpu.MAX_DIM + 1)
    none = torch.zeros(1, 1, 2, 1, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match=f"head channels above {cpu.MAX_DIM}"):
        hk.selected_attention(wide, wide, wide, none, block_size=4, backend="cpu")
    q, huge = torch.zeros(1, 1, 2, 8), torch.zeros(8).expand(1, 1, 2**31, 8)  # no memory
    with pytest.raises(NotImplementedError, match=f"{2**31} keys, at most {cpu.MAX_LENGTH}"):
        hk.selected_attention(q, huge, huge, none, block_size=4, backend="cpu")


# -------------------------------------------------------------------------------------------------
# Any problem at all


@st.composite
def _problems(draw: st.DrawFn) -> Case:
    group, kv_heads = draw(st.integers(1, 5)), draw(st.integers(1, 2))
    dim, keys = draw(st.integers(1, 70)), draw(st.integers(1, 90))
    size = draw(st.integers(1, 40))
    return Case(
        name=f"drawn-{draw(st.integers(0, 999))}",
        B=draw(st.integers(1, 2)),
        Hq=group * kv_heads,
        Hkv=kv_heads,
        Nq=draw(st.integers(1, 70)),
        Nk=keys,
        D=dim,
        Dv=draw(st.sampled_from([dim, dim + 3, 16])),
        S=size,
        n=draw(st.integers(0, 6)),
        pattern=draw(st.sampled_from([p for p in PATTERNS if p != "all"])),
        per_head=draw(st.booleans()),
        weights=draw(st.booleans()),
        own=draw(st.booleans()),
        is_causal=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.5, -0.25])),
        lse_grad=draw(st.booleans()),
        layout=draw(st.sampled_from(["bhnd", "bnhd", "unaligned", "broadcast"])),
    )


@needs_core
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_name)
@settings(
    derandomize=True,
    max_examples=40,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(case=_problems())
def test_any_problem(dtype: torch.dtype, case: Case) -> None:
    inputs: Inputs = make_inputs(case, dtype)
    with threads(), poisoned_memory():
        results = compute(inputs, "cpu")
    check_accuracy(inputs, results)
