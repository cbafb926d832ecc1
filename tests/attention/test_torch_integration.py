"""hk.attention inside PyTorch's machinery: compile, export, autocast, checkpoint, opcheck."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import hierkernels as hk
from hierkernels.native import native
from hierkernels.ops.attention.spec import CORRECTNESS
from hierkernels.testing import make_inputs

# Any backend stands behind the operator; the compiled one where it is there.
BACKEND = "reference" if native() is None else "cpu"
OPS = torch.ops.hierkernels
CASES = {case.name: case for case in CORRECTNESS}


def _qkv(n: int = 9, nk: int | None = None, **options) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(n)
    shapes = (2, 4, n, 16), (2, 2, nk or n, 16), (2, 2, nk or n, 16)
    q, k, v = (torch.randn(s, generator=g, **options).requires_grad_() for s in shapes)
    return q, k, v


def _gradients(f: Callable[..., torch.Tensor], *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
    out = f(*leaves)
    return out, *torch.autograd.grad((out * torch.arange(out.shape[-1])).sum(), leaves)


def _assert_same(
    actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], **tolerance
) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **tolerance)


# -------------------------------------------------------------------------------------------------
# The operators themselves

# Each optional tensor present and absent, a packed layout, and a call with nothing to compute.
OPCHECK = (
    "causal-n9", "everything", "bias-hk", "mask-short", "padding-short", "dropout-short",
    "lse-grad-short", "layout-packed-short", "causal-n0", "full-q33-k0",
)  # fmt: skip


@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck_forward(name: str) -> None:
    # requires_grad: the autograd formula is checked, through AOT dispatch with dynamic shapes too.
    inputs = make_inputs(CASES[name], torch.float32).requires_grad()
    torch.library.opcheck(OPS.attention_forward.default, (*inputs.call().arguments(), BACKEND))


@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck_backward(name: str) -> None:
    inputs = make_inputs(CASES[name], torch.float32)
    out, lse = OPS.attention_forward(*inputs.call().arguments(), BACKEND)
    arguments = (
        *inputs.call().arguments(),
        out,
        lse,
        inputs.dout,
        inputs.dlse,
        inputs.bias is not None,
    )
    torch.library.opcheck(OPS.attention_backward.default, (*arguments, BACKEND))


def test_operator_called_directly_is_differentiable() -> None:
    inputs = make_inputs(CASES["bias-hk"], torch.float64).requires_grad()
    out, lse = OPS.attention_forward(*inputs.call().arguments(), BACKEND)
    expected_out, expected_lse = inputs.run("reference")
    leaves = list(inputs.differentiable().values())
    dout = inputs.dout
    _assert_same(
        (out, lse, *torch.autograd.grad([out, lse], leaves, [dout, lse.detach()])),
        (
            expected_out,
            expected_lse,
            *torch.autograd.grad([expected_out, expected_lse], leaves, [dout, lse.detach()]),
        ),
    )


def test_masks_and_seeds_have_no_gradient() -> None:
    inputs = make_inputs(CASES["everything"], torch.float32).requires_grad()
    out, lse = OPS.attention_forward(*inputs.call().arguments(), BACKEND)
    assert out.requires_grad and lse.requires_grad
    next_functions = [f for f, _ in out.grad_fn.next_functions if f is not None]
    assert len(next_functions) == 4  # q, k, v, bias


def test_only_the_gradients_asked_for() -> None:
    q, k, v = _qkv()
    for leaf in (q, k, v):
        others = [t if t is leaf else t.detach() for t in (q, k, v)]
        (grad,) = torch.autograd.grad(hk.attention(*others).sum(), leaf)
        (expected,) = torch.autograd.grad(hk.attention(*others, backend="reference").sum(), leaf)
        torch.testing.assert_close(grad, expected)


def test_no_graph_without_gradients() -> None:
    q, k, v = _qkv()
    with torch.no_grad():
        assert hk.attention(q, k, v).grad_fn is None
    with torch.inference_mode():
        assert not hk.attention(q, k, v).requires_grad
    assert not hk.attention(q.detach(), k.detach(), v.detach()).requires_grad


def test_one_of_two_outputs_in_the_loss() -> None:
    for index in (0, 1):
        grads = []
        for backend in (BACKEND, "reference"):
            q, k, v = _qkv()
            outputs = hk.attention(q, k, v, return_lse=True, backend=backend)
            grads.append(
                torch.autograd.grad(outputs[index].sum(), (q, k, v), materialize_grads=True)
            )
        _assert_same(*grads)


def test_second_derivative_says_what_to_do() -> None:
    q, k, v = _qkv()
    (dq,) = torch.autograd.grad(hk.attention(q, k, v, backend=BACKEND).sum(), q, create_graph=True)
    if BACKEND == "reference":
        dq.sum().backward()  # plain PyTorch operations
        return
    with pytest.raises(NotImplementedError, match="no second derivative; backend='reference'"):
        dq.sum().backward()


def test_saved_tensors_that_were_overwritten_are_noticed() -> None:
    q, k, v = _qkv()
    for overwrite in (0, 1):
        x = q * 1
        out = hk.attention(x, k, v)
        with torch.no_grad():
            (x, out)[overwrite].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_saved_memory_is_inputs_outputs_and_lse() -> None:
    # No score matrix: O(N) beyond q, k, v and out.
    q, k, v = _qkv(256)
    saved: list[int] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out, lse = OPS.attention_forward(
            q,
            k,
            v,
            None,
            None,
            None,
            None,
            [0, 1, 0, 0, 0, 0, 1, 1, 1, 0],
            1.0,
            0.0,
            0.0,
            0,
            0,
            BACKEND,
        )
    assert sorted(saved) == sorted(t.numel() for t in (q, k, v, out, lse))


def test_expanded_inputs_get_summed_gradients() -> None:
    grads = []
    for backend in (BACKEND, "reference"):
        g = torch.Generator().manual_seed(0)
        q, kv, bias = (
            torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()
            for shape in ((1, 1, 9, 16), (1, 1, 9, 16), (9, 1))
        )
        wide_q, wide_kv = q.expand(3, 4, 9, 16), kv.expand(3, 2, 9, 16)
        out = hk.attention(
            wide_q,
            wide_kv,
            wide_kv,
            attn_bias=bias.expand(4, 9, 9),
            is_causal=True,
            backend=backend,
        )
        grads.append((out, *torch.autograd.grad(out.square().sum(), (q, kv, bias))))
    _assert_same(*grads)


def test_output_keeps_the_order_of_heads_and_tokens() -> None:
    # A model that splits heads by view merges them again without a copy.
    x = torch.randn(2, 9, 4 * 16)
    q = x.view(2, 9, 4, 16).transpose(1, 2)
    for backend in (BACKEND, None):
        out = hk.attention(q, q, q, backend=backend)
        assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()
    q = torch.randn(2, 4, 9, 16)
    assert hk.attention(q, q, q, backend=BACKEND).is_contiguous()


# -------------------------------------------------------------------------------------------------
# torch.compile and torch.export


@pytest.fixture
def fresh_compiler() -> None:
    torch._dynamo.reset()


class _Graphs:
    """A compiler backend that runs the graph as it is and counts the operators in each one."""

    def __init__(self) -> None:
        self.operators: list[int] = []

    def __call__(self, module: torch.fx.GraphModule, example: list) -> Callable:
        calls = [str(node.target) for node in module.graph.nodes]
        self.operators.append(sum("attention_forward" in call for call in calls))
        return module


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return hk.attention(q, k, v, is_causal=True)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compile_with_inductor(fresh_compiler: None) -> None:
    def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.tanh(_causal(q * 2, k + 1, v)).relu()

    leaves = _qkv()
    compiled = torch.compile(block, fullgraph=True)
    _assert_same(_gradients(compiled, *leaves), _gradients(block, *leaves))


# Every argument once; seeds that are drawn, given as int, and given as tensor.
_G = torch.Generator().manual_seed(0)
COMPILED: dict[str, dict] = {
    "bias-window-lse": {
        "attn_bias": torch.randn(4, 9, 9, generator=_G),
        "window_size": (3, 1),
        "softcap": 2.0,
    },
    "masks-dropout": {
        "attn_mask": torch.rand(9, 9, generator=_G) > 0.3,
        "key_padding_mask": torch.rand(2, 9, generator=_G) > 0.3,
        "dropout_p": 0.3,
        "dropout_seed": 5,
        "scale": 0.2,
    },
    "seed-tensor": {"dropout_p": 0.3, "dropout_seed": torch.tensor(5)},
}


@pytest.mark.parametrize("backend", [BACKEND, "reference"], ids=["kernels", "reference"])
@pytest.mark.parametrize("name", COMPILED)
def test_compile_with_every_option(name: str, backend: str, fresh_compiler: None) -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, lse = hk.attention(q, k, v, **COMPILED[name], return_lse=True, backend=backend)
        return out + lse.masked_fill(lse == -torch.inf, 0)[..., None]

    leaves = _qkv()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    _assert_same(_gradients(compiled, *leaves), _gradients(f, *leaves))


def test_compile_draws_a_new_dropout_mask_each_call(fresh_compiler: None) -> None:
    compiled = torch.compile(
        lambda q, k, v: hk.attention(q, k, v, dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    leaves = _qkv()
    assert not torch.equal(compiled(*leaves), compiled(*leaves))


def test_compile_with_dynamic_lengths_compiles_once(fresh_compiler: None) -> None:
    graphs = _Graphs()
    compiled = torch.compile(_causal, fullgraph=True, dynamic=True, backend=graphs)
    for n, nk in ((9, 12), (17, 33), (40, 41)):
        leaves = _qkv(n, nk)
        _assert_same(_gradients(compiled, *leaves), _gradients(_causal, *leaves))
    assert graphs.operators == [1]


def test_compile_with_dynamic_lengths_through_aot(fresh_compiler: None) -> None:
    compiled = torch.compile(_causal, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, nk in ((9, 12), (17, 33)):
        leaves = _qkv(n, nk)
        _assert_same(_gradients(compiled, *leaves), _gradients(_causal, *leaves))


def test_compile_with_numbers_that_change(fresh_compiler: None) -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, left: int):
        return hk.attention(q, k, v, scale=scale, window_size=(left, 0))

    leaves = _qkv()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for scale, left in ((0.25, 3), (0.5, 4), (0.75, 5)):
        torch.testing.assert_close(compiled(*leaves, scale, left), f(*leaves, scale, left))


def test_compile_follows_use_backend(fresh_compiler: None) -> None:
    # Around the compiled function: it is compiled anew. The reference leaves no operator.
    graphs = _Graphs()
    compiled = torch.compile(_causal, fullgraph=True, backend=graphs)
    leaves = _qkv()
    expected = _gradients(_causal, *leaves)
    _assert_same(_gradients(compiled, *leaves), expected)
    with hk.use_backend("reference"):
        _assert_same(_gradients(compiled, *leaves), expected)
    _assert_same(_gradients(compiled, *leaves), expected)
    assert graphs.operators == [1, 0]


def test_compile_with_use_backend_inside(fresh_compiler: None) -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with hk.use_backend("reference"):
            first = _causal(q, k, v)
        return first + _causal(q, k, v)

    graphs = _Graphs()
    leaves = _qkv()
    compiled = torch.compile(f, fullgraph=True, backend=graphs)
    _assert_same(_gradients(compiled, *leaves), _gradients(f, *leaves))
    assert graphs.operators == [1]


def test_compile_refuses_a_forced_backend_that_cannot(fresh_compiler: None) -> None:
    compiled = torch.compile(
        lambda q, k, v: hk.attention(q, k, v, backend="cuda"), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(NotImplementedError, match="backend 'cuda' does not support this call"):
        compiled(*(t.detach() for t in _qkv()))


class _Layer(torch.nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return _causal(q, k, v)


@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
def test_export_with_a_dynamic_length(strict: bool, fresh_compiler: None) -> None:
    n, nk = torch.export.Dim("n", max=512), torch.export.Dim("nk", max=512)
    program = torch.export.export(
        _Layer(),
        tuple(t.detach() for t in _qkv(9, 12)),
        dynamic_shapes={"q": {2: n}, "k": {2: nk}, "v": {2: nk}},
        strict=strict,
    )
    assert any("attention_forward" in str(node.target) for node in program.graph.nodes)
    for lengths in ((9, 12), (31, 40), (50, 7)):
        q, k, v = (t.detach() for t in _qkv(*lengths))
        torch.testing.assert_close(program.module()(q, k, v), _causal(q, k, v))


# -------------------------------------------------------------------------------------------------
# Autocast, checkpoint, vmap


@pytest.mark.parametrize("backend", [BACKEND, "reference"], ids=["kernels", "reference"])
def test_autocast(backend: str) -> None:
    def f(*leaves: torch.Tensor) -> torch.Tensor:
        return hk.attention(*leaves[:3], attn_bias=leaves[3], is_causal=True, backend=backend)

    leaves = (*_qkv(), torch.randn(4, 1, 9, requires_grad=True))
    with torch.autocast("cpu", torch.bfloat16):
        out = f(*leaves)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.float().square().sum(), leaves)
    assert all(grad.dtype == torch.float32 for grad in grads)
    by_hand = [t.bfloat16() for t in leaves[:3]]
    expected = f(*by_hand, leaves[3])
    expected_grads = torch.autograd.grad(expected.float().square().sum(), leaves)
    _assert_same((out, *grads), (expected, *expected_grads), rtol=0, atol=0)


def test_autocast_makes_mixed_inputs_agree_and_leaves_float64_alone() -> None:
    q, k, v = (t.detach() for t in _qkv())
    with torch.autocast("cpu", torch.bfloat16):
        assert hk.attention(q.bfloat16(), k, v.half()).dtype == torch.bfloat16
        assert hk.attention(q.double(), k.double(), v.double()).dtype == torch.float64
    with torch.autocast("cpu", enabled=False):
        assert hk.attention(q, k, v).dtype == torch.float32


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_non_reentrant_checkpoint(dropout_p: float) -> None:
    # The seed that is drawn in the forward pass is drawn again when that is repeated.
    def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return hk.attention(q.sin(), k.sin(), v.sin(), is_causal=True, dropout_p=dropout_p)

    leaves = _qkv()
    torch.manual_seed(3)
    expected = _gradients(block, *leaves)
    torch.manual_seed(3)
    actual = _gradients(lambda *args: checkpoint(block, *args, use_reentrant=False), *leaves)
    _assert_same(actual, expected, rtol=0, atol=0)


def test_vmap_maps_over_the_operator() -> None:
    q, k, v = (torch.randn(3, 2, 2, 7, 8) for _ in range(3))
    expected = torch.stack([_causal(*one) for one in zip(q, k, v, strict=True)])
    torch.testing.assert_close(torch.vmap(_causal)(q, k, v), expected)
