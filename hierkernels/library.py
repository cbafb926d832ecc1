"""The torch.library namespace of all operators, and how one with a gradient is registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("hierkernels", "FRAGMENT")


def register(
    op: str,
    forward: tuple[Callable[..., Any], Callable[..., Any]],
    backward: tuple[Callable[..., Any], Callable[..., Any]],
    setup_context: Callable[..., None],
    differentiate: Callable[..., tuple],
) -> Callable[..., Any]:
    """<op>_forward and <op>_backward, once defined: implementations, fakes and autograd.

    Args:
        op: the name, without the namespace.
        forward, backward: an implementation for CPU and CUDA tensors, and one for fake tensors.
        setup_context, differentiate: autograd of the forward, as torch.library.register_autograd
            takes it. The backward's own raises NotImplementedError.

    Returns:
        The forward with its gradient round the dispatcher, for calls that nothing in PyTorch
        watches (see eager.py); it takes the operator's arguments.
    """

    def differentiate_twice(ctx: Any, *grads: torch.Tensor) -> tuple:
        raise NotImplementedError(
            f"{op}: the kernels have no second derivative; backend='reference' is differentiable "
            "any number of times"
        )

    for name, (real, fake) in ((f"{op}_forward", forward), (f"{op}_backward", backward)):
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, real, key)
        torch.library.register_fake(f"hierkernels::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(
        f"hierkernels::{op}_forward", differentiate, setup_context=setup_context, lib=LIBRARY
    )
    torch.library.register_autograd(f"hierkernels::{op}_backward", differentiate_twice, lib=LIBRARY)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            # A setup_context of its own would make PyTorch inspect the signature at every call.
            output = forward[0](*args)
            setup_context(ctx, args, output)
            return output

        backward = staticmethod(differentiate)

    return Eager.apply
