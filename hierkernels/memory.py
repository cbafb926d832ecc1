"""Large results on the CPU in as little new memory as possible, and that on huge pages.

Memory that comes fresh from the system is mapped page by page when it is first written, which takes
longer than the writing. On huge pages it does not; the kernels ask for them for what they write,
and this is for results of PyTorch's own operations, by their argument `out`.
"""

from __future__ import annotations

from typing import Any

import torch

from hierkernels.eager import is_unwatched
from hierkernels.native import native

LARGE = 2**22  # bytes; below, the allocator has memory that is mapped already


def on_huge_pages(t: torch.Tensor) -> torch.Tensor:
    """t, new and unwritten, on huge pages if it is large, dense and the system has them."""
    bytes_ = t.untyped_storage().nbytes() if t.is_cpu and is_unwatched((t,)) else 0
    if bytes_ >= LARGE and native() is not None:
        native().advise_huge_pages(t.untyped_storage().data_ptr(), bytes_)
    return t


def large_empty(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """like.new_empty(shape) on huge pages."""
    return on_huge_pages(like.new_empty(shape))


def large_empty_like(t: torch.Tensor) -> torch.Tensor:
    """torch.empty_like on huge pages."""
    return on_huge_pages(torch.empty_like(t))


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.view_as(x), x.view_as(x)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[torch.Tensor], output: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, first: torch.Tensor | None, second: torch.Tensor | None
    ) -> torch.Tensor | None:
        if first is None or second is None:
            return second if first is None else first
        return first + second if torch.is_grad_enabled() else first.add_(second)


def twice(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x for two readers; the gradient of the second is added to that of the first, in place.

    The gradient that the first reader's backward gives must be a new tensor of its own.
    """
    return (x, x) if torch.compiler.is_compiling() else _Twice.apply(x)
