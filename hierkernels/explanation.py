"""hk.explain: which backend an operator would choose, and why the others refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hierkernels import dispatch
from hierkernels.ops.attention import api as attention
from hierkernels.ops.local_attention import api as local_attention


def _attention(q: Any, k: Any, v: Any, **options: Any) -> tuple[str, Any]:
    q, k, v = attention.autocast(q, k, v)
    return "attention", attention.make_call(q, k, v, **options)


def _local_attention(q: Any, k: Any, v: Any, *window: Any, **options: Any) -> tuple[str, Any]:
    """The attention kernels compute it: their reasons are the ones that count."""
    q, k, v = attention.autocast(q, k, v)
    call = local_attention.make_call(q, k, v, *window, **options)
    return "attention", call.attention


# What an op's arguments mean to dispatch: the op whose backends compute it, and the problem.
_PROBLEMS: dict[str, Callable[..., tuple[str, Any]]] = {
    "attention": _attention,
    "local_attention": _local_attention,
}


def explain(op: str, *arguments: Any, **options: Any) -> dispatch.Choice:
    """The backend that `op` would use for these arguments, and why others refuse.

    Args:
        op: "attention" or "local_attention".
        arguments, options: what the op would be called with.

    Raises ValueError for an unknown op, and whatever the op itself would raise.
    """
    if op not in _PROBLEMS:
        raise ValueError(f"op must be one of {', '.join(_PROBLEMS)}, got {op!r}")
    backend = options.pop("backend", None)
    options.pop("return_lse", None)
    return dispatch.survey(
        *_PROBLEMS[op](*arguments, **options), dispatch.requested_backend(backend)
    )
