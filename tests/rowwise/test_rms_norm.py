"""hk.rms_norm: the definition, the compiled kernels against the oracle, bad input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from rowwise_levels import CORE, accuracy_params

import hierkernels as hk
from hierkernels.native import native_error
from hierkernels.ops.rms_norm.call import NormCall
from hierkernels.ops.rms_norm.spec import ALL_DTYPES, CORRECTNESS, Case
from hierkernels.ops.rms_norm.testing import check_accuracy, compute, make_inputs
from hierkernels.testing import poisoned_memory, threads

needs_core = pytest.mark.skipif(CORE is None, reason=f"no compiled core: {native_error()}")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


@pytest.mark.parametrize("case, dtype, isa", accuracy_params("rms_norm", CORRECTNESS, ALL_DTYPES))
def test_accuracy(case: Case, dtype: torch.dtype, isa: str, set_isa: Callable[[str], None]) -> None:
    set_isa(isa)
    inputs = make_inputs(case, dtype)
    with threads(2), poisoned_memory():
        results = compute(inputs, "cpu")
    check_accuracy(inputs, results)


def _formula(x: torch.Tensor, weight: torch.Tensor, eps: float, shift: int) -> torch.Tensor:
    """As the packages write it, with the norm's length and padding."""
    if shift:
        kept, delayed = x.chunk(2, dim=-1)
        by = min(shift, x.shape[1])
        x = torch.cat((kept, F.pad(delayed, (0, 0, by, -by))), dim=-1)
    rms = x.norm(dim=-1, keepdim=True) * x.shape[-1] ** -0.5
    return x / rms.clamp(min=eps) * weight


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_core)])
@pytest.mark.parametrize("shift", [0, 1, 3, 9])
@pytest.mark.parametrize("eps", [1e-8, 0.8], ids=["tiny", "floor"])
def test_is_the_formula(eps: float, shift: int, backend: str) -> None:
    generator = torch.Generator().manual_seed(shift)
    x, grad = torch.randn(2, 3, 6, 11, generator=generator, dtype=F64).unbind()
    weight = torch.randn(11, generator=generator, dtype=F64).requires_grad_()
    x.requires_grad_()
    out = hk.rms_norm(x, weight, eps=eps, shift=shift, backend=backend)
    expected = _formula(x, weight, eps, shift)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    got = torch.autograd.grad(out, (x, weight), grad)
    torch.testing.assert_close(
        got, torch.autograd.grad(expected, (x, weight), grad), rtol=0, atol=1e-12
    )


@needs_core
@pytest.mark.parametrize("added", [False, True], ids=["floor", "added"])
@pytest.mark.parametrize("shift", [0, 2])
def test_gradcheck(shift: int, added: bool) -> None:
    x = torch.randn(2, 4, 5, dtype=F64, requires_grad=True)
    weight = torch.randn(5, dtype=F64, requires_grad=True)

    def f(x: torch.Tensor, weight: torch.Tensor, backend: str = "cpu") -> torch.Tensor:
        return hk.rms_norm(x, weight, eps=0.1, eps_is_added=added, shift=shift, backend=backend)

    assert torch.autograd.gradcheck(f, (x, weight))
    again = torch.autograd.gradgradcheck
    assert again(lambda *leaves: f(*leaves, "reference"), (x, weight))


@needs_core
@pytest.mark.parametrize("bias", [False, True], ids=["rms", "layer"])
def test_bits_do_not_depend_on_threads(bias: bool) -> None:
    inputs = make_inputs(Case("many", 40, 9, 128, shift=1, bias=bias, added=bias), F32)
    found = []
    for n in (1, 2, 3, 5):
        with threads(n):
            found.append(compute(inputs, "cpu"))
    assert all(torch.equal(found[0][k], other[k]) for other in found for k in found[0])


@needs_core
@pytest.mark.parametrize("first, second", [("reference", "cpu"), ("cpu", "reference")])
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("bias", [False, True], ids=["rms", "layer"])
def test_backward_follows_another_backends_forward(
    first: str, second: str, shift: int, bias: bool
) -> None:
    case = Case("saved", 2, 6, 20, shift=shift, eps=0.5, zeros=True, added=bias, bias=bias)
    inputs = make_inputs(case, F32)
    call, ops = inputs.call(), torch.ops.hierkernels
    problem = (call.x, *params(call), call.eps, call.eps_is_added, call.shift, call.dtype)
    out, *saved = ops.rms_norm_forward(*problem, first)
    names = list(inputs.differentiable())
    every = ops.rms_norm_backward(*problem, *saved, inputs.dout, [True] * len(names), second)
    check_accuracy(inputs, {"out": out, **dict(zip(names, every, strict=True))})
    for i, grad in enumerate(every):
        wanted = [j == i for j in range(len(names))]
        (one,) = ops.rms_norm_backward(*problem, *saved, inputs.dout, wanted, second)
        assert torch.equal(one, grad)


def params(call: NormCall) -> tuple:
    """As the operator takes them."""
    return call.weight, call.bias


@needs_core
def test_nan_and_infinity_stay_in_their_rows() -> None:
    x = torch.ones(2, 3, 8)
    x[0, 1, 0], x[1, 1, 7] = torch.nan, torch.inf
    for backend in ("cpu", "reference"):
        out = hk.rms_norm(x, torch.ones(8), shift=1, backend=backend)
        bad = ~out.isfinite().all(-1)
        assert bad.tolist() == [[False, True, False], [False, False, True]], backend


@needs_core
def test_opcheck_and_compile() -> None:
    x, weight = torch.randn(2, 5, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    problem = (x, weight, None, 1e-8, False, 1, BF16)
    torch.library.opcheck(torch.ops.hierkernels.rms_norm_forward, (*problem, "cpu"))
    inverse, dout = torch.rand(2, 5), torch.randn(2, 5, 6).bfloat16()
    detached = (x.detach(), weight.detach(), *problem[2:])
    backward = torch.ops.hierkernels.rms_norm_backward
    torch.library.opcheck(
        backward, (*detached, inverse, torch.empty(0), dout, [True, False], "cpu")
    )
    compiled = torch.compile(hk.rms_norm, fullgraph=True, backend="aot_eager")
    out, expected = compiled(x, weight, shift=1), hk.rms_norm(x, weight, shift=1)
    assert torch.equal(out, expected)
    got = torch.autograd.grad(out.sum(), (x, weight))
    assert all(map(torch.equal, got, torch.autograd.grad(expected.sum(), (x, weight))))


X, W = torch.zeros(2, 3, 4), torch.zeros(4)


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"x": 1}, TypeError, "x must be a torch.Tensor, got int"),
        ({"weight": None}, TypeError, "weight must be a torch.Tensor, got NoneType"),
        ({"x": X.int()}, TypeError, "x must be float32.*got torch.int32"),
        ({"x": X[0, 0]}, ValueError, r"x must have 2 dimensions or more.*\(4,\)"),
        ({"x": X[..., :0], "weight": W[:0]}, ValueError, "at least one channel"),
        ({"weight": W[:3]}, ValueError, r"weight must have one element a channel.*\(3,\)"),
        ({"weight": W.bfloat16()}, TypeError, "weight must be torch.float32 where x is"),
        ({"weight": W.to("meta")}, ValueError, r"weight must be on the device of x \(cpu\)"),
        ({"eps": "1"}, TypeError, "eps must be a number, got str"),
        ({"eps": 0.0}, ValueError, "eps must be above 0 and finite, got 0.0"),
        ({"eps": float("nan")}, ValueError, "eps must be above 0 and finite, got nan"),
        ({"eps_is_added": 1}, TypeError, "eps_is_added must be True or False, got 1"),
        ({"shift": 1.0}, TypeError, "shift must be an int, got float"),
        ({"shift": -1}, ValueError, "shift must be at least 0 and at most "),
        ({"dtype": F64}, TypeError, "dtype must be one of torch.float32.*got torch.float64"),
        ({"x": X.bfloat16(), "dtype": F16}, TypeError, "dtype must be one of torch.bfloat16"),
        ({"backend": "mkl"}, ValueError, "backend must be one of"),
        ({"backend": "cuda"}, NotImplementedError, "no rms_norm kernel"),
    ],
)
def test_bad_input(changed: dict, error: type[Exception], message: str) -> None:
    arguments = {"x": X, "weight": W} | changed
    with pytest.raises(error, match=message):
        hk.rms_norm(**arguments)


def test_cuda_forced_for_all_operators_leaves_the_choice_free() -> None:
    with hk.use_backend("cuda"):
        assert torch.equal(hk.rms_norm(X + 1, W + 1), hk.rms_norm(X + 1, W + 1, backend=None))
        with pytest.raises(NotImplementedError, match="no rms_norm kernel"):
            hk.rms_norm(X, W, backend="cuda")


def test_explain_names_the_refusals() -> None:
    choice = hk.explain("rms_norm", X, W, shift=1)
    assert choice.backend == ("cpu" if CORE else "reference")
    assert "no rms_norm kernel" in choice.refusals["cuda"][0]
