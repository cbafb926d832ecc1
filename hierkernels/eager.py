"""Whether a call is plain eager work on CPU tensors, which PyTorch's dispatcher would only pass on.

The dispatcher and the autograd wrapper of a Python operator take longer than a small kernel. A
call that nothing in PyTorch watches may go to its backend directly.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

_C = torch._C


def _plain_keys() -> tuple[torch._C.DispatchKeySet, ...]:
    """The dispatch keys of an ordinary CPU tensor, and of one made in inference mode."""
    keys = [_C._dispatch_keys(torch.empty(0))]
    with torch.inference_mode():
        keys.append(_C._dispatch_keys(torch.empty(0)))
    return tuple(keys)


_PLAIN = _plain_keys()


def is_unwatched(tensors: Iterable[torch.Tensor | None]) -> bool:
    """No compiler, tracer, profiler, mode, transform or subclass would see an operator on these.

    The dispatch keys tell a plain CPU tensor from subclasses, fake, batched, lazily negated, sparse
    and all other special ones.
    """
    if torch.compiler.is_compiling():  # first: a compiler that traces this goes no further
        return False
    if (
        _C._len_torch_dispatch_stack()
        or _C._len_torch_function_stack()
        or _C._functorch.maybe_current_level() is not None
        or _C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    ):
        return False
    for t in tensors:  # a loop: twice as fast as all() of a generator
        if t is not None and _C._dispatch_keys(t) not in _PLAIN:
            return False
    return True
