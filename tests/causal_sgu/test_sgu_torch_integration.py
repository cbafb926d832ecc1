"""hk.causal_sgu inside PyTorch's machinery: opcheck, compile, export, autocast, checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import hierkernels as hk
from hierkernels.native import native
from hierkernels.ops.causal_sgu.spec import CORRECTNESS, Case
from hierkernels.ops.causal_sgu.testing import Inputs, check_accuracy, compute, make_inputs

# Any backend stands behind the operator; the compiled one where it is there.
BACKEND = "reference" if native() is None else "cpu"
OPS = torch.ops.hierkernels
CASES = {case.name: case for case in CORRECTNESS}
F32 = torch.float32


def _problem(inputs: Inputs) -> tuple:
    call = inputs.call()
    return (
        call.residual, call.gate, call.weight.nan_to_num(), call.bias, call.gate_residual,
        call.window, call.activation,
    )  # fmt: skip


def _leaves(n: int = 9, window: int | None = None) -> tuple[torch.Tensor, ...]:
    x = make_inputs(Case("leaves", 2, n, 8, 2, window=window), F32)
    tensors = (x.residual, x.gate, x.weight.nan_to_num(), x.bias)
    return tuple(t.detach().requires_grad_() for t in tensors)


def _gradients(f: Callable[..., torch.Tensor], *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
    out = f(*leaves)
    return out, *torch.autograd.grad((out * torch.arange(out.shape[-1])).sum(), leaves)


def _assert_same(actual: tuple, expected: tuple, **tolerance: float) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **tolerance)


OPCHECK = ("n7", "gate-residual", "window-n17-w16", "act-gelu-all", "layout-halves", "n0", "batch0")


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck_forward(name: str, keep: bool) -> None:
    inputs = make_inputs(CASES[name], F32).requires_grad()
    torch.library.opcheck(OPS.causal_sgu_forward.default, (*_problem(inputs), keep, BACKEND))


@pytest.mark.parametrize("name", OPCHECK[:-2])  # opcheck takes empty gradients for aliases
def test_opcheck_backward(name: str) -> None:
    inputs = make_inputs(CASES[name], F32)
    _, z = OPS.causal_sgu_forward(*_problem(inputs), True, BACKEND)
    for wanted in ([True] * 5, [False, True, False, True, False]):
        arguments = (*_problem(inputs), z, inputs.dout, wanted, BACKEND)
        torch.library.opcheck(OPS.causal_sgu_backward.default, arguments)


@pytest.mark.parametrize("keep", [True, False])
def test_operator_called_directly_is_differentiable(keep: bool) -> None:
    # Without the pre-activation, the backward computes it again.
    inputs = make_inputs(CASES["act-gelu-all"], F32).requires_grad()
    call = inputs.call()
    out, _ = OPS.causal_sgu_forward(
        call.residual, call.gate, call.weight, call.bias, call.gate_residual, call.window,
        call.activation, keep, BACKEND,
    )  # fmt: skip
    leaves = inputs.differentiable()
    grads = torch.autograd.grad(out, list(leaves.values()), inputs.dout)
    check_accuracy(inputs, dict(zip(leaves, grads, strict=True)))


def test_saved_memory_is_inputs_and_preactivation() -> None:
    # No (H, N, N) matrix beside the weight.
    inputs = make_inputs(CASES["gate-residual"], F32).requires_grad()
    saved: list[tuple[int, ...]] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        inputs.run(BACKEND if BACKEND == "cpu" else None)
    activations = tuple(inputs.gate.shape)
    expected = [activations] * 3 + [tuple(inputs.weight.shape), tuple(inputs.bias.shape)]
    assert sorted(saved) == sorted(expected)


def test_nothing_is_kept_without_gradients() -> None:
    leaves = _leaves()
    with torch.no_grad():
        assert hk.causal_sgu(*leaves).grad_fn is None
    with torch.inference_mode():
        assert not hk.causal_sgu(*leaves).requires_grad
    assert not hk.causal_sgu(*(t.detach() for t in leaves)).requires_grad


@pytest.mark.skipif(native() is None, reason="the reference leaves a graph")
def test_second_derivative_says_what_to_do() -> None:
    leaves = _leaves()
    (grad,) = torch.autograd.grad(
        hk.causal_sgu(*leaves, backend="cpu").sum(), leaves[1], create_graph=True
    )
    with pytest.raises(NotImplementedError, match="no second derivative; backend='reference'"):
        grad.sum().backward()


@pytest.fixture
def fresh_compiler() -> None:
    torch._dynamo.reset()


def _block(
    residual: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    window = None if weight.shape[1] == weight.shape[2] else weight.shape[1]
    out = hk.causal_sgu(
        residual * 2, gate + 1, weight, bias, gate_residual=gate, activation="gelu", window=window
    )
    return torch.tanh(out)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(compiler: str, window: int | None, fresh_compiler: None) -> None:
    if compiler == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    leaves = _leaves(window=window)
    compiled = torch.compile(_block, fullgraph=True, backend=compiler)
    _assert_same(_gradients(compiled, *leaves), _gradients(_block, *leaves), rtol=1e-4, atol=1e-4)


def test_compile_with_dynamic_lengths(fresh_compiler: None) -> None:
    graphs: list[int] = []

    def count(module: torch.fx.GraphModule, example: list) -> Callable:
        graphs.append(len(example))
        return module

    weight, bias = _leaves(30)[2:]
    compiled = torch.compile(hk.causal_sgu, fullgraph=True, dynamic=True, backend=count)
    for n in (5, 9, 30):
        residual, gate = _leaves(n)[:2]
        expected = hk.causal_sgu(residual, gate, weight, bias)
        torch.testing.assert_close(compiled(residual, gate, weight, bias), expected)
    assert len(graphs) == 1


def test_export() -> None:
    class Unit(torch.nn.Module):
        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            return hk.causal_sgu(*tensors, activation="silu")

    leaves = tuple(t.detach() for t in _leaves())
    program = torch.export.export(Unit(), leaves)
    assert any("causal_sgu_forward" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*leaves), Unit()(*leaves))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    # Activations are cast; the weight stays float32 and its gradient comes in float32.
    leaves = _leaves(33)
    with torch.autocast("cpu", dtype):
        out, *grads = _gradients(hk.causal_sgu, *leaves)
    assert out.dtype == dtype and all(g.dtype == F32 for g in grads)
    residual, gate, weight, bias = leaves
    expected = _gradients(hk.causal_sgu, residual.to(dtype), gate.to(dtype), weight, bias)
    torch.testing.assert_close(out, expected[0])
    # Float64 is left alone.
    with torch.autocast("cpu", dtype):
        assert hk.causal_sgu(*(t.double() for t in leaves)).dtype == torch.float64


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool) -> None:
    leaves = _leaves()

    def f(*tensors: torch.Tensor) -> torch.Tensor:
        return checkpoint(hk.causal_sgu, *tensors, use_reentrant=reentrant)

    if reentrant:  # which takes backward() alone
        hk.causal_sgu(*leaves).sum().backward()
        expected = [t.grad.clone() for t in leaves]
        for t in leaves:
            t.grad = None
        f(*leaves).sum().backward()
        _assert_same(tuple(t.grad for t in leaves), tuple(expected))
        return
    _assert_same(_gradients(f, *leaves), _gradients(hk.causal_sgu, *leaves))


def test_expanded_inputs_get_summed_gradients() -> None:
    grads = []
    for backend in (BACKEND, "reference"):
        residual, gate, weight, bias = _leaves()
        wide = hk.causal_sgu(
            residual, gate[:1].expand(2, -1, -1), weight[:1].expand(2, -1, -1), bias,
            backend=backend,
        )  # fmt: skip
        grads.append(torch.autograd.grad(wide.square().sum(), (residual, gate, weight, bias)))
    _assert_same(*grads, rtol=1e-4, atol=1e-4)


def test_every_way_to_ask_gives_the_same() -> None:
    x = make_inputs(CASES["act-silu"], F32)
    expected = compute(x, "reference")
    with hk.use_backend("reference"):
        again = compute(x, None)
    for name, value in expected.items():
        assert torch.equal(again[name], value)
    tensors, options = x.arguments()
    choice = hk.explain("causal_sgu", *tensors, **options)
    assert choice.backend == BACKEND and "cuda" in choice.refusals
    with pytest.raises(NotImplementedError, match="needs a GPU"):
        hk.causal_sgu(*tensors, **options, backend="cuda")
