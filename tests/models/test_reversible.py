"""Gradients of reversible layers whose parameters are shared, unused or frozen."""

from __future__ import annotations

import torch
from torch import nn

from python_models.reversible import ReversibleSequence


class Layer(nn.Module):
    """A linear layer with a parameter that the result does not depend on."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).tanh()


def test_gradients_of_shared_unused_and_frozen_parameters() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(4, 4).double()
    blocks = [(Layer(shared), Layer(nn.Linear(4, 4).double())) for _ in range(2)]
    blocks += [(Layer(nn.Linear(4, 4).double()), Layer(shared))]
    model = ReversibleSequence(blocks)
    blocks[1][1].linear.weight.requires_grad_(False)
    x = torch.randn(2, 5, 4, dtype=torch.double, requires_grad=True)
    inputs = {"x": x} | {name: p for name, p in model.named_parameters() if p.requires_grad}

    got = torch.autograd.grad(model(x).square().sum(), inputs.values(), allow_unused=True)
    y1 = y2 = x
    for f, g in blocks:
        y1 = y1 + f(y2)
        y2 = y2 + g(y1)
    loss = (y1 + y2).square().sum()
    expected = torch.autograd.grad(loss, inputs.values(), allow_unused=True)

    for name, a, b in zip(inputs, got, expected, strict=True):
        if name.endswith("unused"):
            assert a is b is None
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=name)
