"""Stacks of layers: plain residual ones, and reversible ones that keep no activations.

A reversible block maps two streams to two, ``y1 = x1 + f(x2)`` and ``y2 = x2 + g(y1)``, and can be
undone, ``x2 = y2 - g(y1)`` and ``x1 = y1 - f(x2)`` (Gomez et al., "The Reversible Residual Network:
Backpropagation Without Storing Activations", 2017). So the backward pass begins with the streams at
the end and recomputes each block's activations when their turn comes: memory does not grow with the
number of blocks.

Shapes: B batch, N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call


def surviving(layers: Sequence[nn.Module], dropout: float) -> list[nn.Module]:
    """Leaves out each layer with this probability; if all would go, the first one stays."""
    dropped = (torch.rand(len(layers)) < dropout).tolist()
    return [layer for layer, drop in zip(layers, dropped, strict=True) if not drop] or list(
        layers[:1]
    )


class SequentialSequence(nn.Module):
    """``x = x + layer(x)`` for each layer, which itself adds its argument residual.

    ``(B, N, C) -> (B, N, C)``.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        # Lists of one: a layer of a reversible stack has two parts, and this keeps the keys alike.
        self.layers = nn.ModuleList(nn.ModuleList([layer]) for layer in layers)

    def forward(self, x: Tensor, dropout: float = 0.0) -> Tensor:
        """Each layer is left out with probability ``dropout`` while training."""
        layers: Sequence[nn.Module] = self.layers
        if self.training and dropout > 0:
            layers = surviving(layers, dropout)
        for (layer,) in layers:
            x = layer(x, residual=x)
        return x


class Part(nn.Module):
    """One of the two functions of a reversible block."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class ReversibleBlock(nn.Module):
    """``y1 = x1 + f(x2)``, then ``y2 = x2 + g(y1)``; streams ``(B, N, C)``."""

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f = Part(f)
        self.g = Part(g)

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        y1 = x1 + self.f(x2)
        return y1, x2 + self.g(y1)


class ReversibleSequence(nn.Module):
    """Both streams begin as x and are added in the end: ``(B, N, C) -> (B, N, C)``.

    Args:
        blocks: pairs (f, g).
        is_random: whether f or g draw random numbers, which the backward pass must draw again.
    """

    def __init__(
        self, blocks: Sequence[tuple[nn.Module, nn.Module]], *, is_random: bool = False
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ReversibleBlock(f, g) for f, g in blocks)
        self.is_random = is_random

    def forward(self, x: Tensor, dropout: float = 0.0) -> Tensor:
        """Each block is left out with probability ``dropout`` while training."""
        blocks: Sequence[nn.Module] = self.blocks
        if self.training and dropout > 0:
            blocks = surviving(blocks, dropout)
        # A dictionary, because blocks may share a parameter.
        parameters = {id(p): p for block in blocks for p in block.parameters() if p.requires_grad}
        return _Reversible.apply(
            x, list(blocks), self.is_random and self.training, *parameters.values()
        )


class _RandomState:
    """The generators of the CPU and of a tensor's device, to be put back for a recomputation."""

    def __init__(self, x: Tensor) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = (x.device, torch.cuda.get_rng_state(x.device)) if x.is_cuda else None

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda[1], self.cuda[0])


class _Reversible(torch.autograd.Function):
    """Runs blocks and saves only the streams at the end.

    The parameters are inputs so that their gradients are results: hooks, frozen parameters and
    ``torch.autograd.grad`` work as for any other operation.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, blocks: list[ReversibleBlock], is_random: bool, *parameters: Tensor
    ) -> Tensor:
        kind = x.device.type
        ctx.autocast = {
            "device_type": kind,
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
        }
        ctx.blocks, ctx.parameters = blocks, parameters
        ctx.random = []
        y1 = y2 = x
        for block in blocks:
            if is_random:
                ctx.random.append(_RandomState(x))
            y1 = y1 + block.f(y2)
            if is_random:
                ctx.random.append(_RandomState(x))
            y2 = y2 + block.g(y1)
        ctx.save_for_backward(y1, y2)
        return y1 + y2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        y1, y2 = ctx.saved_tensors
        dy1 = dy2 = dy
        # Before all activations: a gradient that stays where a block's activations go leaves holes
        # between them, and the resident set grows with depth although nothing else is kept.
        gradients = {id(p): torch.empty_like(p) for p in ctx.parameters}
        known: set[int] = set()
        after = _RandomState(y1) if ctx.random else None

        def recompute(part: Part, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
            """What the part gave for x, and the gradient of x; adds those of its parameters."""
            if ctx.random:
                ctx.random.pop().restore()
            # Copies of the parameters that share their memory: hooks on the parameters themselves
            # must run once, when the gradient is complete.
            own = {name: p for name, p in part.named_parameters() if id(p) in gradients}
            copies = {name: p.detach().requires_grad_() for name, p in own.items()}
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                x = x.detach().requires_grad_()
                y = functional_call(part, copies, (x,))
            dx, *rest = torch.autograd.grad(
                y, (x, *copies.values()), dy.to(y.dtype), allow_unused=True
            )
            for p, gradient in zip(own.values(), rest, strict=True):
                if gradient is None:
                    continue
                if id(p) in known:
                    gradients[id(p)] += gradient
                else:
                    gradients[id(p)].copy_(gradient)
                    known.add(id(p))
            return y.detach(), dx

        for block in reversed(ctx.blocks):
            g, dx = recompute(block.g, y1, dy2)
            y2, dy1 = y2 - g, dy1 + dx
            f, dx = recompute(block.f, y2, dy1)
            y1, dy2 = y1 - f, dy2 + dx
        if after is not None:
            after.restore()
        complete = (gradients[id(p)] if id(p) in known else None for p in ctx.parameters)
        return dy1 + dy2, None, None, *complete
