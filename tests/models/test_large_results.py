"""Linear layers, splits and shared inputs on huge pages give what PyTorch's own operations give."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hierkernels.memory import LARGE, large_empty, large_empty_like, twice
from hierkernels.testing import poisoned_memory
from python_models.large_results import LargeLinear, split_channels


def _double(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("shape", [(5, 3), (2, 7, 3), (2, 0, 3), (3,), (2, 3, 4, 3)])
def test_linear(shape: tuple[int, ...]) -> None:
    ours, theirs = LargeLinear(3, 4).double(), nn.Linear(3, 4, bias=False).double()
    theirs.load_state_dict(ours.state_dict())
    x = _double(*shape)
    grad = torch.randn(*shape[:-1], 4, dtype=torch.float64)
    results = []
    for layer in (ours, theirs):
        with poisoned_memory():
            out = layer(x)
            results.append((out, *torch.autograd.grad(out, (x, layer.weight), grad)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_linear_of_views_and_without_gradients() -> None:
    layer = LargeLinear(6, 4).double()
    x = _double(6, 5, 2).mT.transpose(0, 2)  # (5, 2, 6), no dimension contiguous
    expected = x @ layer.weight.T
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    frozen = layer(x.detach())
    (grad,) = torch.autograd.grad(frozen.sum(), layer.weight)  # an expanded gradient
    torch.testing.assert_close(
        grad, torch.autograd.grad(expected.sum(), layer.weight, retain_graph=True)[0]
    )
    layer.requires_grad_(False)
    (grad,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), x)[0])


def test_linear_twice_differentiable_and_under_autocast() -> None:
    layer = LargeLinear(3, 2).double()
    assert torch.autograd.gradgradcheck(
        lambda x, w: torch.func.functional_call(layer, {"weight": w}, x),
        (_double(4, 3), layer.weight),
    )
    single = LargeLinear(3, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert single(torch.randn(4, 3)).dtype == torch.bfloat16


def test_split() -> None:
    x = _double(2, 5, 9)
    parts, expected = split_channels(x, (4, 2, 3)), x.split((4, 2, 3), dim=-1)
    assert all(torch.equal(a, b) for a, b in zip(parts, expected, strict=True))
    used = parts[0].sum() + (parts[2] ** 2).sum()  # one part has no gradient
    with poisoned_memory():
        (grad,) = torch.autograd.grad(used, x)
    wanted = torch.autograd.grad(expected[0].sum() + (expected[2] ** 2).sum(), x)[0]
    assert torch.equal(grad, wanted)
    assert torch.autograd.gradgradcheck(lambda x: split_channels(x**2, (4, 5)), (x,))


def test_twice() -> None:
    x = _double(3, 4)

    def function(x: torch.Tensor) -> torch.Tensor:
        first, second = twice(x)
        return (first**3).sum() + (second**2).sum()

    (grad,) = torch.autograd.grad(function(x), x)
    torch.testing.assert_close(grad, 3 * x**2 + 2 * x)
    assert torch.autograd.gradgradcheck(function, (x,))
    for reader in range(2):
        (grad,) = torch.autograd.grad((twice(x)[reader] ** 2).sum(), x)
        torch.testing.assert_close(grad, 2 * x)


def test_large_memory() -> None:
    """It keeps the layout, and can be written and read."""
    like = torch.zeros(4, LARGE // 64, 8).transpose(0, 1)
    new = large_empty_like(like)
    assert (new.shape, new.stride(), new.dtype) == (like.shape, like.stride(), like.dtype)
    assert torch.equal(torch.add(like, 1, out=new), like + 1)
    assert large_empty(like, (3, 0)).shape == (3, 0)
