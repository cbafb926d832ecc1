"""hk.local_attention under what PyTorch does to operators: compile, export, autocast and so on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import hierkernels as hk
from hierkernels.native import native
from hierkernels.ops.local_attention.spec import CORRECTNESS
from hierkernels.ops.local_attention.testing import make_inputs

OPS = torch.ops.hierkernels
BACKEND = "reference" if native() is None else "cpu"
CASES = {case.name: case for case in CORRECTNESS}
W = 4
# Every argument once, and those that lead to other code together.
OPTIONS: dict[str, dict] = {
    "exact": {"exact_window": True},
    "both-padding": {
        "is_causal": False,
        "look_backward": 2,
        "look_forward": 2,
        "key_padding_mask": torch.arange(26).view(2, 13) % 5 != 0,
    },
    "bias-dropout": {"attn_bias": True, "dropout_p": 0.3, "dropout_seed": 5, "scale": 0.2},
    "zero": {"zero_lookback": True},
    "zero-bias": {"zero_lookback": True, "attn_bias": True},
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _leaves(n: int = 13) -> tuple[torch.Tensor, ...]:
    """q, k, v and a bias."""
    shapes = (2, 4, n, 8), (2, 2, n, 8), (2, 2, n, 8), (4, W, 2 * W)
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


def _function(name: str, backend: str | None = BACKEND) -> Callable[..., torch.Tensor]:
    options = dict(OPTIONS[name])
    biased = options.pop("attn_bias", False)

    def f(*leaves: torch.Tensor) -> torch.Tensor:
        out, lse = hk.local_attention(
            *leaves[:3], W, attn_bias=leaves[3] if biased else None, return_lse=True,
            backend=backend, **options,
        )  # fmt: skip
        return out + lse.masked_fill(lse == -torch.inf, 0)[..., None]

    return f


def _results(f: Callable[..., torch.Tensor], leaves: tuple[torch.Tensor, ...]) -> tuple:
    out = f(*leaves)
    loss = (out * torch.arange(out.shape[-1])).sum()
    return out, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def _assert_same(actual: tuple, expected: tuple) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("name", ["bias", "bias-own-w1", "everything"])
def test_opcheck(name: str) -> None:
    """The operators with a bias by slots."""
    arguments = make_inputs(CASES[name], torch.float32).requires_grad().call().arguments()
    torch.library.opcheck(OPS.attention_forward.default, (*arguments, BACKEND))
    inputs = make_inputs(CASES[name], torch.float32)
    arguments = inputs.call().arguments()
    out, lse = OPS.attention_forward(*arguments, BACKEND)
    backward = (*arguments, out, lse, inputs.dout, inputs.dlse, True, BACKEND)
    torch.library.opcheck(OPS.attention_backward.default, backward)


@pytest.mark.parametrize("backend", [BACKEND, "reference"], ids=["kernels", "reference"])
@pytest.mark.parametrize("name", OPTIONS)
def test_compile(name: str, backend: str) -> None:
    f, leaves = _function(name, backend), _leaves()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    _assert_same(_results(compiled, leaves), _results(f, leaves))


@pytest.mark.parametrize("name", ["exact", "bias-dropout", "zero", "zero-bias"])
def test_compile_with_dynamic_lengths(name: str) -> None:
    """One graph for lengths below, at and above a bucket and the look-back."""
    graphs = 0

    def count(module: torch.fx.GraphModule, example: list) -> Callable:
        nonlocal graphs
        graphs += 1
        return module

    f = _function(name)
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=count)
    for n in (9, 13, 40, 8):
        leaves = _leaves(n)
        _assert_same(_results(compiled, leaves), _results(f, leaves))
    assert graphs == 1


class _Layer(torch.nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return hk.local_attention(q, k, v, W, zero_lookback=True)


@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
def test_export_with_a_dynamic_length(strict: bool) -> None:
    n = torch.export.Dim("n", min=2 * W, max=512)
    program = torch.export.export(
        _Layer(), tuple(t.detach() for t in _leaves()[:3]),
        dynamic_shapes={name: {2: n} for name in "qkv"}, strict=strict,
    )  # fmt: skip
    for length in (9, 31, 50):
        tensors = [t.detach() for t in _leaves(length)[:3]]
        torch.testing.assert_close(program.module()(*tensors), _Layer()(*tensors))


@pytest.mark.parametrize("name", ["bias-dropout", "zero-bias"])
def test_autocast(name: str) -> None:
    f, leaves = _function(name), tuple(t.detach().float().requires_grad_() for t in _leaves())
    with torch.autocast("cpu", torch.bfloat16):
        out = hk.local_attention(*leaves[:3], W, zero_lookback=True, backend=BACKEND)
        results = _results(f, leaves)
    assert out.dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for t in results[1:])
    by_hand = _results(f, (*(t.bfloat16() for t in leaves[:3]), leaves[3]))
    for a, e in zip(results, by_hand, strict=True):
        assert torch.equal(a, e.to(a.dtype))


def test_checkpoint_draws_the_same_dropout_mask() -> None:
    def block(*leaves: torch.Tensor) -> torch.Tensor:
        return hk.local_attention(leaves[0].sin(), *leaves[1:3], W, dropout_p=0.4)

    leaves = _leaves()[:3]
    torch.manual_seed(3)
    expected = _results(block, leaves)
    torch.manual_seed(3)
    actual = _results(lambda *args: checkpoint(block, *args, use_reentrant=False), leaves)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_second_derivatives_of_the_reference() -> None:
    leaves = tuple(t[:1, :2, :5] if t.ndim == 4 else t[:2] for t in _leaves(5))
    leaves = tuple(t.detach()[..., : 2 * W].requires_grad_() for t in leaves)
    assert torch.autograd.gradgradcheck(_function("zero-bias", "reference"), leaves)
