"""The torch.library namespace of all operators, and how one with a gradient is registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from hierkernels.eager import direct_apply, in_functional_transform, is_transformed

LIBRARY = torch.library.Library("hierkernels", "FRAGMENT")


class Operator(NamedTuple):
    """The ways into an operator with a gradient; all take the operator's arguments."""

    forward: Callable[..., Any]  # for calls that PyTorch watches, transforms included
    backward: Callable[..., Any]  # as forward
    eager: Callable[..., Any]  # round the dispatcher, for calls that nothing watches (eager.py)


def _no_forward_mode(op: str) -> NotImplementedError:
    return NotImplementedError(
        f"{op}: the kernels have no forward-mode derivative (torch.func.jvp, jacfwd, hessian, "
        "torch.autograd.forward_ad); backend='reference' has one"
    )


class _Refusing:
    """LIBRARY, for register_autograd: the kernel it makes for op then refuses what it gets wrong.

    It would drop the tangents of dual tensors, which nothing below autograd can see.
    """

    def __init__(self, op: str) -> None:
        self.op = op

    def impl(self, name: str, kernel: Callable[..., Any], *args: Any, **options: Any) -> None:
        def refusing(keyset: Any, *inputs: Any) -> Any:
            level = forward_ad._current_level >= 0
            if level or in_functional_transform():
                tensors = [t for t in inputs if isinstance(t, torch.Tensor)]
                if level and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
                    raise _no_forward_mode(self.op)
                if not level and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
                    raise NotImplementedError(
                        f"{self.op}: torch.compile of torch.func's derivatives does not work with "
                        "the kernels; backend='reference' does, and so does torch.autograd.grad"
                    )
            return kernel(keyset, *inputs)

        LIBRARY.impl(name, refusing, *args, **options)


def register_autograd(
    op: str, name: str, differentiate: Callable[..., tuple], setup_context: Any = None
) -> None:
    """torch.library.register_autograd for the operator `name` of op, and no silent forward mode."""
    torch.library.register_autograd(
        f"hierkernels::{name}",
        differentiate,
        setup_context=setup_context,
        lib=_Refusing(op),  # type: ignore[arg-type]
    )


def compute_one_by_one(name: str) -> None:
    """What torch.func.vmap does with the operator of that name: a call for each of its batch."""
    operator = getattr(torch.ops.hierkernels, name).default

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple:
        if info.batch_size == 0:
            raise NotImplementedError(f"hierkernels::{name}: torch.func.vmap over nothing")

        def call(i: int) -> Any:
            return operator(*(
                a.select(dim, i) if isinstance(a, torch.Tensor) and dim is not None else a
                for a, dim in zip(args, in_dims, strict=True)
            ))  # fmt: skip

        outputs = [call(i) for i in range(info.batch_size)]
        if isinstance(outputs[0], torch.Tensor):
            return torch.stack(outputs), 0
        stacked = [torch.stack(each) for each in zip(*outputs, strict=True)]
        return type(outputs[0])(stacked), type(outputs[0])([0] * len(stacked))

    torch.library.register_vmap(f"hierkernels::{name}", rule, lib=LIBRARY)


def differentiable(
    op: str,
    operator: Callable[..., Any],
    setup_context: Callable[..., None],
    differentiate: Callable[..., tuple],
) -> Callable[..., Any]:
    """An operator of op, for calls that PyTorch watches; autograd as register_autograd takes it.

    What register_autograd makes knows no transforms: torch.func.grad fails, and forward-mode
    differentiation drops tangents without a word. There an autograd.Function takes its place, whose
    own implementation is the operator.
    """

    class Transformed(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            output = operator(*args)
            return tuple(output) if isinstance(output, list) else output

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise _no_forward_mode(op)

    Transformed.setup_context = staticmethod(setup_context)  # type: ignore[assignment]
    Transformed.backward = staticmethod(differentiate)  # type: ignore[assignment]

    def call(*args: Any) -> Any:
        return (Transformed.apply if is_transformed() else operator)(*args)

    return call


def register(
    op: str,
    forward: tuple[Callable[..., Any], Callable[..., Any]],
    backward: tuple[Callable[..., Any], Callable[..., Any]],
    setup_context: Callable[..., None],
    differentiate: Callable[..., tuple],
    *,
    only_first: bool = False,
) -> Operator:
    """<op>_forward and <op>_backward, once defined: implementations, fakes and autograd.

    Args:
        op: the name, without the namespace.
        forward, backward: an implementation for CPU and CUDA tensors, and one for fake tensors.
        setup_context, differentiate: autograd of the forward, as torch.library.register_autograd
            takes it. The backward's own raises NotImplementedError.
        only_first: what `eager` returns is the first output alone; the rest are for the backward.
    """

    def keep_nothing(ctx: Any, inputs: tuple, output: Any) -> None:
        pass

    def differentiate_twice(ctx: Any, *grads: torch.Tensor) -> tuple:
        raise NotImplementedError(
            f"{op}: the kernels have no second derivative; backend='reference' is differentiable "
            "any number of times"
        )

    for name, (real, fake) in ((f"{op}_forward", forward), (f"{op}_backward", backward)):
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, real, key)
        torch.library.register_fake(f"hierkernels::{name}", fake, lib=LIBRARY)
        compute_one_by_one(name)
    register_autograd(op, f"{op}_forward", differentiate, setup_context)
    register_autograd(op, f"{op}_backward", differentiate_twice)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            # A setup_context of its own would make PyTorch inspect the signature at every call.
            output = forward[0](*args)
            setup_context(ctx, args, output)
            return output[0] if only_first else output

        backward = staticmethod(differentiate)

    first = getattr(torch.ops.hierkernels, f"{op}_forward").default
    second = getattr(torch.ops.hierkernels, f"{op}_backward").default
    return Operator(
        differentiable(op, first, setup_context, differentiate),
        differentiable(op, second, keep_nothing, differentiate_twice),
        direct_apply(Eager),
    )
