"""torch.func and forward-mode differentiation: the right result or a clear error, never silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import hierkernels as hk

Function = Callable[..., torch.Tensor]


class _Op(NamedTuple):
    function: Function  # of x and backend
    x: torch.Tensor


def _ops() -> dict[str, _Op]:
    random = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    q, k, v = tensor(3, 1, 4, 6, 8).unbind()
    k, v, k_cmp, v_cmp = k[:, :2], v[:, :2], tensor(1, 2, 3, 8), tensor(1, 2, 3, 8)
    x, weight, bias, gates = tensor(2, 6, 8), tensor(2, 6, 6), tensor(2, 6), tensor(1, 4, 6, 3)
    table, blocks = tensor(6, 4), torch.tensor([0, 2]).expand(1, 2, 6, 2)
    nsa = {
        "preset": "seed", "block_size": 2, "num_selected": 1, "window_size": 2, "stride": 2,
        "first_end": 1, "compression_window": 2,
    }  # fmt: skip
    choice = {"num_selected": 1, "block_size": 2, "stride": 2, "first_end": 1, "scoring": "logit"}

    def probabilities(x: torch.Tensor, **kw: str) -> torch.Tensor:
        return hk.select_blocks(x, k_cmp, **choice, return_probabilities=True, **kw)[1]

    return {
        "attention": _Op(lambda x, **kw: hk.attention(x, k, v, is_causal=True, **kw), q),
        "attention-bias": _Op(lambda x, **kw: hk.attention(q, k, v, attn_bias=x, **kw), tensor(6)),
        "local_attention": _Op(
            lambda x, **kw: hk.local_attention(q, x, v, 2, zero_lookback=True, **kw), k
        ),
        "compressed_attention": _Op(
            lambda x, **kw: hk.compressed_attention(
                q, k_cmp, x, stride=2, first_end=1, return_lse=True, **kw
            )[0],
            v_cmp,
        ),
        "selected_attention": _Op(
            lambda x, **kw: hk.selected_attention(x, k, v, blocks, block_size=2, **kw), q
        ),
        "select_blocks": _Op(probabilities, q),
        "native_sparse_attention": _Op(
            lambda x, **kw: hk.native_sparse_attention(x, k, v, k_cmp, v_cmp, gates, **nsa, **kw), q
        ),
        "native_sparse_attention-gates": _Op(
            lambda x, **kw: hk.native_sparse_attention(q, k, v, k_cmp, v_cmp, x, **nsa, **kw), gates
        ),
        "causal_sgu": _Op(
            lambda x, **kw: hk.causal_sgu(x + 1, x, weight, bias, activation="gelu", **kw), x
        ),
        "causal_sgu-weight": _Op(lambda w, **kw: hk.causal_sgu(x, x, w, bias, **kw), weight),
        "rms_norm": _Op(lambda x, **kw: hk.rms_norm(x, weight[0, 0, [0] * 8], shift=1, **kw), x),
        "layer_norm": _Op(
            lambda x, **kw: hk.layer_norm(x, weight[0, 0, [0] * 8], bias[0, [1] * 8], **kw), x
        ),
        "gelu": _Op(lambda x, **kw: hk.gelu(x, **kw), x),
        "gelu-halves": _Op(lambda x, **kw: hk.gelu(x, form="halves", **kw)[1], x),
        "rotary": _Op(lambda x, **kw: hk.rotary(x, table, table, **kw), q),
    }


OPS = _ops()
# No kernel of these lies between x and the result, or its gradient is the same kernel.
FORWARD_MODE = ("native_sparse_attention-gates",)
SECOND_DERIVATIVES = ("native_sparse_attention-gates", "rotary")


def _reference(op: _Op) -> Function:
    return lambda x: op.function(x, backend="reference")


def _loss(function: Function) -> Function:
    return lambda x: function(x).square().sum()


@pytest.mark.parametrize("name", OPS)
def test_vmap(name: str) -> None:
    op = OPS[name]
    x = torch.stack((op.x, op.x.flip(0) + 1, -op.x), dim=1)
    found = vmap(op.function, in_dims=1)(x)
    torch.testing.assert_close(found, torch.stack([op.function(each) for each in x.unbind(1)]))


@pytest.mark.parametrize("name", OPS)
def test_gradients_and_jacobians(name: str) -> None:
    op = OPS[name]
    expected = grad(_loss(_reference(op)))
    torch.testing.assert_close(grad(_loss(op.function))(op.x), expected(op.x))
    # Gradients for each sample, and the batch of gradients of a Jacobian.
    x = torch.stack((op.x, op.x + 1))
    torch.testing.assert_close(vmap(grad(_loss(op.function)))(x), torch.stack([*map(expected, x)]))
    torch.testing.assert_close(jacrev(op.function)(op.x), jacrev(_reference(op))(op.x))


def _tangent(function: Function, x: torch.Tensor) -> torch.Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def _refuse_forward_mode(function: Function, x: torch.Tensor) -> None:
    message = r"the kernels have no forward-mode derivative .*backend='reference' has one"
    for transform in (
        lambda: jvp(function, (x,), (torch.ones_like(x),)),
        lambda: jacfwd(function)(x),
        lambda: hessian(_loss(function))(x),
        lambda: _tangent(function, x),
        lambda: _tangent(function, x.clone().requires_grad_()),
        torch.no_grad()(lambda: _tangent(function, x)),
    ):
        with pytest.raises(NotImplementedError, match=message):
            transform()


@pytest.mark.parametrize("name", OPS)
def test_forward_mode(name: str) -> None:
    op = OPS[name]
    if name in FORWARD_MODE:
        torch.testing.assert_close(_tangent(op.function, op.x), _tangent(_reference(op), op.x))
    else:
        _refuse_forward_mode(op.function, op.x)


def test_forward_mode_of_a_compiled_function_is_refused() -> None:
    op = OPS["attention"]
    compiled = torch.compile(op.function, backend="aot_eager", fullgraph=True)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        _tangent(compiled, op.x)
    compiled = torch.compile(lambda x: jvp(op.function, (x,), (x,)), backend="aot_eager")
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        compiled(op.x)


@pytest.mark.parametrize("name", OPS)
def test_forward_mode_of_the_reference(name: str) -> None:
    op = OPS[name]
    tangent = _tangent(_reference(op), op.x)
    assert tangent is not None
    expected = (jacrev(_reference(op))(op.x).flatten(-op.x.ndim)).sum(-1)
    torch.testing.assert_close(tangent, expected)


@pytest.mark.parametrize("name", OPS)
def test_second_derivatives(name: str) -> None:
    op = OPS[name]

    def twice(function: Function) -> torch.Tensor:
        return grad(_loss(grad(_loss(function))))(op.x)

    def twice_by_autograd(function: Function) -> torch.Tensor:
        x = op.x.clone().requires_grad_()
        (first,) = torch.autograd.grad(_loss(function)(x), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    expected = twice(_reference(op))
    torch.testing.assert_close(twice_by_autograd(_reference(op)), expected)
    for compute in (twice, twice_by_autograd):
        if name in SECOND_DERIVATIVES:
            torch.testing.assert_close(compute(op.function), expected)
            continue
        with pytest.raises(NotImplementedError, match="no second derivative; backend='reference'"):
            compute(op.function)


def test_a_compiled_gradient_of_torch_func_is_refused() -> None:
    op = OPS["attention"]
    compiled = torch.compile(grad(_loss(op.function)), backend="aot_eager", fullgraph=True)
    with pytest.raises(
        torch._dynamo.exc.Unsupported,
        match=r"torch\.compile of torch.func's derivatives does not work",
    ):
        compiled(op.x)


def test_vmap_over_nothing_is_refused() -> None:
    op = OPS["attention"]
    with pytest.raises(NotImplementedError, match=r"torch\.func\.vmap over nothing"):
        vmap(op.function)(op.x[None][:0])
