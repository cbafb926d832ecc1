"""Whether a call is plain eager work, which PyTorch's dispatcher would only pass on.

The dispatcher and the autograd wrapper of a Python operator take longer than a small kernel. A
call that nothing in PyTorch watches may go to its backend directly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import forward_ad

try:
    from torch._C import (
        DispatchKeySet,
        _dispatch_keys,
        _get_tracing_state,
        _len_torch_dispatch_stack,
        _len_torch_function_stack,
    )
    from torch._C._functorch import maybe_current_level
    from torch.autograd import _profiler_enabled

    _CAN_TELL = True
except ImportError:  # names that a PyTorch version may drop: then every call goes the long way
    _CAN_TELL = False


def _plain_keys(device: str) -> tuple[DispatchKeySet, ...]:
    """The dispatch keys of an ordinary tensor of a device, and of one made in inference mode."""
    if not _CAN_TELL:
        return ()
    with torch.inference_mode(False):
        keys = [_dispatch_keys(torch.empty(0, device=device))]
    with torch.inference_mode():
        keys.append(_dispatch_keys(torch.empty(0, device=device)))
    return tuple(keys)


_PLAIN = {"cpu": _plain_keys("cpu")}  # those of GPUs when the first such tensor comes


def _is_plain(t: torch.Tensor) -> bool:
    """Nothing but an ordinary tensor of a CPU or a CUDA device."""
    if not t.is_cuda:
        return _dispatch_keys(t) in _PLAIN["cpu"]
    if "cuda" not in _PLAIN:
        if not torch.cuda.is_initialized():
            return False  # fake
        _PLAIN["cuda"] = _plain_keys("cuda")
    return _dispatch_keys(t) in _PLAIN["cuda"]


def are_plain(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Tensors with memory of their own, and no mode that makes others of them.

    A profiler may watch, so this is for kernels that are no operator of PyTorch's.
    """
    if not _CAN_TELL or _len_torch_dispatch_stack() or maybe_current_level() is not None:
        return False
    return all([t is None or _is_plain(t) for t in tensors])


def is_unwatched(tensors: Iterable[torch.Tensor | None]) -> bool:
    """No compiler, tracer, profiler, mode, transform or subclass would see an operator on these.

    The dispatch keys tell a plain tensor from subclasses, fake, batched, lazily negated, sparse and
    all other special ones.
    """
    if (
        not _CAN_TELL
        or torch.compiler.is_compiling()  # early: a compiler that traces this goes no further
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or maybe_current_level() is not None
        or forward_ad._current_level >= 0
        or _get_tracing_state() is not None
        or _profiler_enabled()
    ):
        return False
    # A list, not a generator: half the time. So is asking for keys here instead of by _is_plain.
    keys = _PLAIN["cpu"]
    return all([t is None or _dispatch_keys(t) in keys or _is_plain(t) for t in tensors])


def direct_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """function.apply for calls that are unwatched: it does not look for transforms first."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def in_functional_transform() -> bool:
    """A transform of torch.func is active: grad, vmap, jvp and what is made of them."""
    return _CAN_TELL and maybe_current_level() is not None


def is_transformed() -> bool:
    """So is one, or a level of forward-mode differentiation; a compiler's are its own affair."""
    return not torch.compiler.is_compiling() and (
        forward_ad._current_level >= 0 or in_functional_transform()
    )
