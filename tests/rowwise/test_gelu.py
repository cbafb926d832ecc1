"""hk.gelu: the definition, the compiled kernels against the oracle, bad input."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rowwise_levels import CORE, ISAS, accuracy_params

import hierkernels as hk
from hierkernels.native import native_error
from hierkernels.ops.gelu.call import FORMS
from hierkernels.ops.gelu.spec import ALL_DTYPES, CORRECTNESS, Case
from hierkernels.ops.gelu.testing import check_accuracy, compute, make_inputs
from hierkernels.testing import poisoned_memory, threads

needs_core = pytest.mark.skipif(CORE is None, reason=f"no compiled core: {native_error()}")
F32, F64 = torch.float32, torch.float64
TABLES = Path(__file__).parents[2] / "csrc" / "cpu" / "gelu_tables.py"


@pytest.mark.parametrize("case, dtype, isa", accuracy_params("gelu", CORRECTNESS, ALL_DTYPES))
def test_accuracy(case: Case, dtype: torch.dtype, isa: str, set_isa: Callable[[str], None]) -> None:
    set_isa(isa)
    inputs = make_inputs(case, dtype)
    with threads(2), poisoned_memory():
        results = compute(inputs, "cpu")
    check_accuracy(inputs, results)


def _of_pytorch(x: torch.Tensor, form: str) -> torch.Tensor:
    if form != "gated":
        return F.gelu(x)
    a, b = x.chunk(2, dim=-1)
    return a * F.gelu(b)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_core)])
@pytest.mark.parametrize("form", FORMS)
def test_is_pytorchs(form: str, backend: str) -> None:
    x = (3 * torch.randn(2, 3, 22, dtype=F64)).requires_grad_()
    out = hk.gelu(x, form=form, backend=backend)
    out = torch.cat(out, dim=-1) if form == "halves" else out
    expected = _of_pytorch(x, form)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)
    grad = torch.randn_like(out)
    got, wanted = (torch.autograd.grad(t, x, grad)[0] for t in (out, expected))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_core)])
def test_one_half_alone_has_a_gradient(backend: str) -> None:
    x = torch.randn(3, 8, dtype=F64, requires_grad=True)
    for i in (0, 1):
        half = hk.gelu(x, form="halves", backend=backend)[i]
        (got,) = torch.autograd.grad(half.sum(), x)
        (expected,) = torch.autograd.grad(F.gelu(x).chunk(2, dim=-1)[i].sum(), x)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


@needs_core
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str) -> None:
    x = torch.randn(2, 3, 6, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: hk.gelu(x, form=form, backend="cpu"), x)
    again = torch.autograd.gradgradcheck
    assert again(lambda x: hk.gelu(x, form=form, backend="reference"), x)


@needs_core
@pytest.mark.parametrize("first, second", [("reference", "cpu"), ("cpu", "reference")])
@pytest.mark.parametrize("form", FORMS)
def test_backward_follows_another_backends_forward(form: str, first: str, second: str) -> None:
    inputs, ops = make_inputs(Case("saved", 6, 20, form), F32), torch.ops.hierkernels
    results = ops.gelu_forward(inputs.x, form, first)
    grads = inputs.dout.chunk(2, dim=-1) if form == "halves" else (inputs.dout, results[1])
    dx = ops.gelu_backward(inputs.x, form, *grads, second)
    out = torch.cat(results, dim=-1) if form == "halves" else results[0]
    check_accuracy(inputs, {"out": out, "dx": dx})


@needs_core
def test_nan_and_infinity() -> None:
    x = torch.tensor([[torch.nan, torch.inf, -torch.inf, -40.0, 40.0, 1.0]])
    for backend in ("cpu", "reference"):
        out = hk.gelu(x, backend=backend)[0]
        assert out[0].isnan() and out[1] == torch.inf and out[4] == 40, backend
        assert out[3] == 0 and out[5].isfinite(), backend


def _numbers(source: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d\.\d+e[+-]\d+(?=f)", source)]


def test_tables_are_what_their_generator_writes() -> None:
    expected, found = runpy.run_path(str(TABLES))["source"](), TABLES.with_suffix(".h").read_text()
    digits = r"-?\d\.\d+e[+-]\d+"
    assert re.sub(digits, "", found) == re.sub(digits, "", expected)
    # Mathematical libraries differ in last bits, of numbers near 0 in all.
    torch.testing.assert_close(
        torch.tensor(_numbers(found), dtype=F64),
        torch.tensor(_numbers(expected), dtype=F64),
        rtol=1e-7,
        atol=1e-14,
    )


def _whole_line() -> torch.Tensor:
    """Numbers of both signs: evenly spaced to 12, and of all exponents, subnormal ones too."""
    exponents = torch.arange(-149, 128, dtype=F64)
    powers = (2.0 ** exponents[:, None] * torch.tensor([1.0, 1.4, 1.9], dtype=F64)).flatten()
    positive = torch.cat((torch.linspace(0, 12, 50001, dtype=F64), powers))
    return torch.cat((positive, -positive)).float()


@needs_core
@pytest.mark.parametrize("isa", ISAS)
def test_whole_line(isa: str, set_isa: Callable[[str], None]) -> None:
    """As exact as the definition in float32 all over, on a scale of x, and of 1 for the slope."""
    set_isa(isa)
    x = _whole_line()

    def results(x: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        x = x[None].requires_grad_()
        out = hk.gelu(x, backend=backend)
        (slope,) = torch.autograd.grad(out.sum(), x)
        return out.detach()[0], slope[0]

    exact, eager = results(x.double(), "reference"), results(x, "reference")
    # Products with subnormal numbers are rounded on a scale of their own.
    scales = x.double().abs().clamp(min=2.0**-120), torch.ones_like(exact[1])
    for found, plain, oracle, scale in zip(results(x, "cpu"), eager, exact, scales, strict=True):
        largest, allowed = (((t - oracle) / scale).abs().max() for t in (found, plain))
        assert largest <= 2 * allowed + torch.finfo(F32).eps
        assert torch.equal(found[x > 8], plain[x > 8])


@needs_core
@pytest.mark.parametrize("form", FORMS)
def test_opcheck_and_compile(form: str) -> None:
    x = torch.randn(5, 6, requires_grad=True)
    torch.library.opcheck(torch.ops.hierkernels.gelu_forward, (x, form, "cpu"))
    first = torch.randn(5, 6 if form == "plain" else 3)
    second = torch.randn(5, 3) if form == "halves" else torch.empty(0)
    torch.library.opcheck(
        torch.ops.hierkernels.gelu_backward, (x.detach(), form, first, second, "cpu")
    )

    def f(x: torch.Tensor) -> torch.Tensor:
        out = hk.gelu(x, form=form)
        return torch.cat(out, dim=-1) if form == "halves" else out

    out, expected = torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x)
    assert torch.equal(out, expected)
    got, grad = (torch.autograd.grad(t.square().sum(), x)[0] for t in (out, expected))
    assert torch.equal(got, grad)


X = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"x": 1}, TypeError, "x must be a torch.Tensor, got int"),
        ({"x": X.int()}, TypeError, "x must be float32.*got torch.int32"),
        ({"x": X[0, 0, 0]}, ValueError, "x must have one dimension or more"),
        ({"x": X[..., :3], "form": "halves"}, ValueError, "even number of channels.*got 3"),
        ({"form": "tanh"}, ValueError, "form must be one of plain, halves, gated, got 'tanh'"),
        ({"backend": "cuda"}, NotImplementedError, "no gelu kernel"),
    ],
)
def test_bad_input(changed: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hk.gelu(**({"x": X} | changed))


@needs_core
def test_explain() -> None:
    assert hk.explain("gelu", X, form="gated").backend == "cpu"
