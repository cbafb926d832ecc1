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
from hierkernels.native import kernels_of, native, native_error
from hierkernels.ops.causal_sgu import cpu, reference
from hierkernels.ops.causal_sgu.call import ACTIVATIONS
from hierkernels.ops.causal_sgu.spec import ALL_DTYPES, CORRECTNESS, Case, dtype_name
from hierkernels.ops.causal_sgu.testing import (
    Inputs,
    check_accuracy,
    compute,
    make_inputs,
    make_standard,
)
from hierkernels.testing import Results, Standard, case_ids, poisoned_memory, threads

CORE = native()
if CORE is None:
    pytest.skip(f"the compiled core is missing: {native_error()}", allow_module_level=True)
ISAS: list[str] = CORE.cpu_isas()
CASES = {case.name: case for case in CORRECTNESS}
F32, BF16 = torch.float32, torch.bfloat16

# Of each code path one, for the tests that ask another question than accuracy.
FEW = ("n321", "columns-1200", "window-n260-w128", "window-wide", "act-gelu-all", "mixed")


@functools.cache
def _standard(name: str, dtype: torch.dtype) -> tuple[Inputs, Standard]:
    inputs = make_inputs(CASES[name], dtype)
    return inputs, make_standard(inputs)


def _kernels(inputs: Inputs, n_threads: int = 2) -> Results:
    """Results of the cpu backend in memory that held NaN before."""
    with threads(n_threads), poisoned_memory():
        assert torch.empty(1).isnan().all(), "the memory is not poisoned"
        return compute(inputs, "cpu")


_IDS = [
    pytest.param(case.name, dtype, isa, id=f"causal_sgu-{isa}-{name}")
    for name, case, dtype in case_ids(CORRECTNESS, ALL_DTYPES)
    for isa in ISAS
    if isa == ISAS[-1] or kernels_of(isa, dtype) != kernels_of(ISAS[-1], dtype)
]


@pytest.mark.parametrize("name, dtype, isa", _IDS)
def test_accuracy(name: str, dtype: torch.dtype, isa: str, set_isa: Callable[[str], None]) -> None:
    set_isa(isa)
    inputs, standard = _standard(name, dtype)
    check_accuracy(inputs, _kernels(inputs), standard)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_name)
def test_results_are_bitwise_repeatable(
    dtype: torch.dtype, isa: str, set_isa: Callable[[str], None]
) -> None:
    set_isa(isa)
    for name in FEW:
        if dtype not in CASES[name].dtypes:
            continue
        inputs = make_inputs(CASES[name], dtype)
        with threads(4):
            first = compute(inputs, "cpu")
            for _ in range(4):
                for result, value in compute(inputs, "cpu").items():
                    assert torch.equal(value, first[result]), f"{name}: {result}"


@pytest.mark.parametrize("n_threads", [1, 3, 5])
@pytest.mark.parametrize("name", FEW)
def test_any_number_of_threads(name: str, n_threads: int) -> None:
    dtype = CASES[name].dtypes[0]
    inputs, standard = _standard(name, dtype)
    check_accuracy(inputs, _kernels(inputs, n_threads), standard)


@pytest.mark.parametrize("first, second", [("reference", "cpu"), ("cpu", "reference")])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_name)
def test_backward_follows_another_backends_forward(
    first: str, second: str, dtype: torch.dtype
) -> None:
    for name in ("n65", "window-n75-w33", "act-silu-all"):
        inputs, standard = _standard(name, dtype)
        call = inputs.call()
        problem = (
            call.residual, call.gate, call.weight, call.bias, call.gate_residual, call.window,
            call.activation,
        )  # fmt: skip
        out, z = torch.ops.hierkernels.causal_sgu_forward(*problem, True, first)
        grads = torch.ops.hierkernels.causal_sgu_backward(
            *problem, z, inputs.dout, [True] * 5, second
        )
        results = dict(zip(inputs.differentiable(), grads, strict=False))
        check_accuracy(inputs, {"out": out, **results}, standard)


@pytest.mark.parametrize("wanted", range(1, 32))
def test_only_the_gradients_that_are_wanted(wanted: int) -> None:
    for name in ("gate-residual", "act-tanh-all"):
        inputs = make_inputs(CASES[name], F32)
        expected = compute(inputs, "cpu")
        fresh = inputs.requires_grad()
        leaves = fresh.differentiable()
        kept = [key for bit, key in enumerate(leaves) if wanted >> bit & 1]
        for key in set(leaves) - set(kept):
            leaves[key].requires_grad_(False)
        grads = torch.autograd.grad(fresh.run("cpu"), [leaves[k] for k in kept], fresh.dout)
        for key, grad in zip(kept, grads, strict=True):
            assert torch.equal(grad, expected[key]), key


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS[1:]])
@pytest.mark.parametrize("n, window", [(9, None), (7, 3)])
def test_gradcheck(n: int, window: int | None, activation: str | None) -> None:
    case = Case(
        "gradcheck", 2, n, 4, 2, S=n + 2, window=window, activation=activation, gate_residual=True
    )
    x = make_inputs(case, torch.float64)
    assert x.gate_residual is not None
    tensors = (x.residual, x.gate, x.weight.nan_to_num(), x.bias, x.gate_residual)

    def f(*leaves: torch.Tensor) -> torch.Tensor:
        *first, gate_residual = leaves
        return hk.causal_sgu(
            *first, gate_residual=gate_residual, window=window, activation=activation, backend="cpu"
        )

    assert torch.autograd.gradcheck(f, [t.detach().requires_grad_() for t in tensors])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_name)
@pytest.mark.parametrize("window", [None, 20])
def test_what_weighs_the_future_is_never_read(
    window: int | None, dtype: torch.dtype, isa: str, set_isa: Callable[[str], None]
) -> None:
    # NaN there (make_inputs), and in what lies beyond the tokens.
    set_isa(isa)
    x = make_inputs(Case("future", 2, 41, 40, 2, S=60, window=window), dtype)
    hidden = make_standard(x).unseen["dweight"]
    weight = x.weight.masked_fill(hidden, math.nan)
    bias = x.bias if window else x.bias.clone().index_fill_(1, torch.arange(41, 60), math.nan)
    results = _kernels(replace(x, weight=weight, bias=bias))
    assert all(t.isfinite().all() for t in results.values())
    assert not results["dweight"][hidden].any()
    finite = replace(x, weight=x.weight.masked_fill(hidden, 1e30))
    for name, value in _kernels(finite).items():
        assert torch.equal(value, results[name]), name


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS[1:]])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=dtype_name)
def test_activations_over_their_whole_range(
    dtype: torch.dtype, activation: str | None, isa: str, set_isa: Callable[[str], None]
) -> None:
    # Without a weight, the pre-activation is gate_residual.
    set_isa(isa)
    values = torch.cat((torch.linspace(-12, 12, 479), torch.tensor([0.0, -100.0, 100.0, 1e-6])))
    z = values.to(dtype).reshape(1, 7, 69).requires_grad_()
    ones, zeros = torch.ones_like(z), torch.zeros_like(z)
    weight, bias = torch.zeros(1, 7, 7, dtype=dtype), torch.zeros(1, 7, dtype=dtype)

    def run(backend: str, to: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        given = [t.detach().to(to) for t in (ones, zeros, weight, bias)]
        leaf = z.detach().to(to).requires_grad_()
        out = hk.causal_sgu(*given, gate_residual=leaf, activation=activation, backend=backend)
        return out.detach(), torch.autograd.grad(out.sum(), leaf)[0]

    for actual, eager, exact in zip(
        run("cpu", dtype), run("reference", dtype), run("reference", torch.float64), strict=True
    ):
        error = (actual.double() - exact).abs()
        eps = torch.finfo(dtype).eps
        allowed = 2 * (eager.double() - exact).abs() + 2 * eps * exact.abs().clamp(1e-2)
        if dtype == torch.float64:  # eager is the oracle: its rounding counts
            allowed = allowed + 8 * eps * (1 + values.double().reshape(z.shape).abs())
        elif dtype == F32:  # of 1 + erf, whose terms are 1
            allowed = allowed + eps * (1 + values.double().reshape(z.shape).abs())
        assert (error <= allowed).all(), (error - allowed).max()


def test_relu_passes_nan_on() -> None:
    x = make_inputs(Case("nan", 1, 5, 16, 1, activation="relu"), F32)
    gate = x.gate.clone()
    gate[0, 2, 3] = math.nan
    out = compute(replace(x, gate=gate), "cpu", False)["out"]
    assert out[0, 2:, 3].isnan().all() and out[..., 4:].isfinite().all()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_name)
def test_strided_parameters_and_gradients(dtype: torch.dtype) -> None:
    # A slice of a larger weight, a transposed one, and gradients of stride 0 and not next.
    x = make_inputs(Case("strided", 2, 21, 12, 2), dtype)
    big = torch.full((2, 30, 40), math.nan).to(dtype)
    big[:, 3:24, 5:26] = x.weight
    for weight in (big[:, 3:24, 5:26], x.weight.mT.contiguous().mT):
        given = replace(x, weight=weight)
        check_accuracy(given, _kernels(given))
    for dout in (x.dout.mT.contiguous().mT, x.dout[:, :1, :1].expand_as(x.dout)):
        given = replace(x, dout=dout)
        check_accuracy(given, _kernels(given))


def test_large_results() -> None:
    # Beyond 4 MiB they are written past the caches: to rows that are whole cache lines, or not.
    for channels, offset in ((256, 0), (260, 0), (256, 3)):
        case = Case("large", 2, 2500, channels, 2, window=100, gate_residual=True, dtypes=(F32,))
        for dtype in (F32, BF16):
            x = make_inputs(case, dtype)
            if offset:
                x = replace(x, gate=torch.nn.functional.pad(x.gate, (offset, 0))[..., offset:])
            check_accuracy(x, _kernels(x))


@st.composite
def _problems(draw: st.DrawFn) -> Case:
    heads, n = draw(st.integers(1, 4)), draw(st.integers(0, 150))
    return Case(
        name=f"drawn-{draw(st.integers(0, 999))}",
        B=draw(st.integers(1, 4)),
        N=n,
        C=heads * draw(st.integers(1, 70)),
        H=heads,
        S=n + draw(st.integers(0, 9)),
        window=draw(st.sampled_from([None, 1, 2, 7, 16, 31, 32, 33, 64, 100])),
        gate_residual=draw(st.booleans()),
        activation=draw(st.sampled_from([None, *ACTIVATIONS[1:]])),
        mixed=draw(st.booleans()),
        layout=draw(st.sampled_from(["bnc", "halves", "cbn", "unaligned", "broadcast"])),
    )


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float64], ids=dtype_name)
@settings(
    derandomize=True,
    max_examples=40,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(case=_problems())
def test_any_problem(dtype: torch.dtype, case: Case) -> None:
    inputs = make_inputs(case, dtype)
    check_accuracy(inputs, _kernels(inputs))


def test_refuses_nothing() -> None:
    call = make_inputs(CASES["n7"], F32).call()
    assert cpu.supports(call) == [] and reference.supports(call) == []
