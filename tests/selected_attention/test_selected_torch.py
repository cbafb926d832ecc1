"""hk.selected_attention inside PyTorch's machinery: opcheck, compile, autocast, checkpoint."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import hierkernels as hk
from hierkernels.native import native
from hierkernels.ops.selected_attention.spec import CORRECTNESS
from hierkernels.ops.selected_attention.testing import make_inputs

# Any backend stands behind the operator; the compiled one where it is there.
BACKEND = "reference" if native() is None else "cpu"
OPS = torch.ops.hierkernels
CASES = {case.name: case for case in CORRECTNESS}
# Each optional tensor present and absent, and calls with nothing to compute.
OPCHECK = ("n17", "everything", "weights-named-0", "layout-packed", "q9-k0", "q0-k9", "named-0")


def _leaves(n: int = 9) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(n)
    q, k, v, w = (
        torch.randn(s, generator=g).requires_grad_()
        for s in ((2, 4, n, 16), (2, 2, n, 16), (2, 2, n, 16), (2, 2, n, 2))
    )
    return q, k, v, w, torch.randint(-1, -(-n // 4), (2, 2, n, 2), generator=g)


def _selected(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, w: torch.Tensor, i: torch.Tensor
) -> torch.Tensor:
    return hk.selected_attention(
        q, k, v, i, block_size=4, block_weights=w, include_own_block=True, backend=BACKEND
    )


def _gradients(f: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    out = f(*inputs)
    leaves = [t for t in inputs if t.requires_grad]
    return out, *torch.autograd.grad((out * torch.arange(out.shape[-1])).sum(), leaves)


def _assert_same(
    actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], **tolerance
) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **tolerance)


@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck(name: str) -> None:
    # requires_grad: the autograd formula is checked, through AOT dispatch with dynamic shapes too.
    inputs = make_inputs(CASES[name], torch.float32)
    arguments = inputs.requires_grad().call().arguments()
    torch.library.opcheck(OPS.selected_attention_forward.default, (*arguments, True, BACKEND))
    call = inputs.call()
    out, lse = OPS.selected_attention_forward(*call.arguments(), True, BACKEND)
    arguments = (*call.arguments(), out, lse, inputs.dout, inputs.dlse, call.weights is not None)
    torch.library.opcheck(OPS.selected_attention_backward.default, (*arguments, BACKEND))


def test_only_the_gradients_asked_for() -> None:
    inputs = _leaves()
    for at in range(4):
        chosen = [t if i == at else t.detach() for i, t in enumerate(inputs)]
        (grad,) = torch.autograd.grad(_selected(*chosen).sum(), chosen[at])
        with hk.use_backend("reference"):
            q, k, v, w, i = chosen
            out = hk.selected_attention(
                q, k, v, i, block_size=4, block_weights=w, include_own_block=True
            )
        (expected,) = torch.autograd.grad(out.sum(), chosen[at])
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_kept_without_gradients() -> None:
    inputs = _leaves()
    with torch.no_grad():
        assert _selected(*inputs).grad_fn is None
    with torch.inference_mode():
        assert not _selected(*inputs).requires_grad
    assert not _selected(*(t.detach() for t in inputs)).requires_grad


def test_saved_memory_is_inputs_outputs_and_lse() -> None:
    inputs = make_inputs(CASES["weights"], torch.float32).requires_grad()
    saved: list[int] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        arguments = inputs.call().arguments()
        out, lse = OPS.selected_attention_forward(*arguments, True, BACKEND)
    assert inputs.weights is not None
    tensors = (inputs.q, inputs.k, inputs.v, inputs.indices, inputs.weights, out, lse)
    assert sorted(saved) == sorted(t.numel() for t in tensors)


@pytest.mark.skipif(native() is None, reason="the reference leaves a graph")
def test_second_derivative_says_what_to_do() -> None:
    q, *others = _leaves()
    (dq,) = torch.autograd.grad(_selected(q, *others).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative; backend='reference'"):
        dq.sum().backward()


@pytest.fixture
def fresh_compiler() -> None:
    torch._dynamo.reset()


def _block(*inputs: torch.Tensor) -> torch.Tensor:
    q, k, v, w, i = inputs
    return torch.tanh(_selected(q * 2, k + 1, v, w, i))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic: bool, fresh_compiler: None) -> None:
    compiled = torch.compile(_block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (9, 17, 30) if dynamic else (9,):
        inputs = _leaves(n)
        _assert_same(_gradients(compiled, *inputs), _gradients(_block, *inputs))


def test_compiled_calls_check_the_indices(fresh_compiler: None) -> None:
    compiled = torch.compile(_block, fullgraph=True, backend="aot_eager")
    *inputs, indices = (t.detach() for t in _leaves())
    compiled(*inputs, indices)
    with pytest.raises(ValueError, match=r"block_indices must be at least -1.* = 3, got 7"):
        compiled(*inputs, torch.full_like(indices, 7))


def test_compile_of_the_reference(fresh_compiler: None) -> None:
    def f(*inputs: torch.Tensor) -> torch.Tensor:
        q, k, v, w, i = inputs
        return hk.selected_attention(q, k, v, i, block_size=4, block_weights=w, backend="reference")

    inputs = _leaves()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    _assert_same(_gradients(compiled, *inputs), _gradients(f, *inputs))


@pytest.mark.parametrize("backend", [BACKEND, "reference"], ids=["kernels", "reference"])
def test_autocast(backend: str) -> None:
    def f(*inputs: torch.Tensor) -> torch.Tensor:
        q, k, v, w, i = inputs
        return hk.selected_attention(q, k, v, i, block_size=4, block_weights=w, backend=backend)

    *leaves, i = _leaves()
    with torch.autocast("cpu", torch.bfloat16):
        out = f(*leaves, i)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.float().square().sum(), leaves)
    assert all(grad.dtype == torch.float32 for grad in grads)
    expected = f(*(t.bfloat16() for t in leaves[:3]), leaves[3], i)
    expected_grads = torch.autograd.grad(expected.float().square().sum(), leaves)
    _assert_same((out, *grads), (expected, *expected_grads), rtol=0, atol=0)


def test_non_reentrant_checkpoint() -> None:
    inputs = _leaves()
    actual = _gradients(lambda *args: checkpoint(_block, *args, use_reentrant=False), *inputs)
    _assert_same(actual, _gradients(_block, *inputs), rtol=0, atol=0)


def test_output_keeps_the_order_of_heads_and_tokens() -> None:
    # A model that splits heads by view merges them again without a copy.
    q = torch.randn(2, 9, 4 * 16).view(2, 9, 4, 16).transpose(1, 2)
    none = torch.zeros(2, 4, 9, 1, dtype=torch.int64)
    out = hk.selected_attention(q, q, q, none, block_size=4, backend=BACKEND)
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()
