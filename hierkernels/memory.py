"""New memory for large results on the CPU.

Memory that comes fresh from the system is mapped page by page when it is first written, which takes
longer than the writing. On huge pages it does not; the kernels ask for them for what they write,
and this is for results of PyTorch's own operations, by their argument `out`.
"""

from __future__ import annotations

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


def large_empty_like(t: torch.Tensor) -> torch.Tensor:
    """torch.empty_like on huge pages."""
    return on_huge_pages(torch.empty_like(t))
