"""hk.explain: which backend an operator would choose, and why the others refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hierkernels import dispatch
from hierkernels.ops.attention import api as attention
from hierkernels.ops.causal_sgu import api as causal_sgu
from hierkernels.ops.local_attention import api as local_attention


def _attention(q: Any, k: Any, v: Any, **options: Any) -> tuple[str, Any]:
    q, k, v = attention.autocast(q, k, v)
    return "attention", attention.make_call(q, k, v, **options)


def _local_attention(q: Any, k: Any, v: Any, *window: Any, **options: Any) -> tuple[str, Any]:
    """The attention kernels compute it: their reasons are the ones that count."""
    q, k, v = attention.autocast(q, k, v)
    call = local_attention.make_call(q, k, v, *window, **options)
    return "attention", call.attention


def _causal_sgu(*tensors: Any, **options: Any) -> tuple[str, Any]:
    return "causal_sgu", causal_sgu.problem(*tensors, **options)


# What an op's arguments mean to dispatch: the op whose backends compute it, and the problem.
PROBLEMS: dict[str, Callable[..., tuple[str, Any]]] = {
    "attention": _attention,
    "local_attention": _local_attention,
    "causal_sgu": _causal_sgu,
}


def explain(op: str, *arguments: Any, **options: Any) -> dispatch.Choice:
    """The backend that `op` would use for these arguments, and why others refuse.

    Args:
        op: "attention", "local_attention" or "causal_sgu".
        arguments, options: what the op would be called with.

    Raises ValueError for an unknown op, and whatever the op itself would raise.
    """
    if op not in PROBLEMS:
        raise ValueError(f"op must be one of {', '.join(PROBLEMS)}, got {op!r}")
    backend = options.pop("backend", None)
    options.pop("return_lse", None)
    return dispatch.survey(
        *PROBLEMS[op](*arguments, **options), dispatch.requested_backend(backend)
    )
