"""hk.explain: which backend an operator would use, and why the others refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hierkernels import dispatch
from hierkernels.ops.attention.api import problem as attention_problem
from hierkernels.ops.causal_sgu.api import problem as causal_sgu_problem
from hierkernels.ops.compressed_attention.api import problem as compressed_attention_problem
from hierkernels.ops.gelu.api import problem as gelu_problem
from hierkernels.ops.layer_norm.api import problem as layer_norm_problem
from hierkernels.ops.local_attention.api import problem as local_attention_problem
from hierkernels.ops.native_sparse_attention.api import problem as native_sparse_attention_problem
from hierkernels.ops.rms_norm.api import problem as rms_norm_problem
from hierkernels.ops.rotary.api import problem as rotary_problem
from hierkernels.ops.select_blocks.api import problem as select_blocks_problem
from hierkernels.ops.selected_attention.api import problem as selected_attention_problem

# For each operator, what makes the canonical form of a call from the call's arguments.
PROBLEMS: dict[str, Callable[..., Any]] = {
    "attention": attention_problem,
    "causal_sgu": causal_sgu_problem,
    "compressed_attention": compressed_attention_problem,
    "gelu": gelu_problem,
    "layer_norm": layer_norm_problem,
    "local_attention": local_attention_problem,
    "native_sparse_attention": native_sparse_attention_problem,
    "rms_norm": rms_norm_problem,
    "rotary": rotary_problem,
    "select_blocks": select_blocks_problem,
    "selected_attention": selected_attention_problem,
}
# Operators that the backends of another one compute, or most of them.
_COMPUTED_BY = {
    "compressed_attention": "attention",
    "layer_norm": "rms_norm",
    "local_attention": "attention",
    "native_sparse_attention": "selected_attention",
}


def explain(op: str, *args: Any, backend: str | None = None, **options: Any) -> dispatch.Choice:
    """The backend that `op`, such as "attention", would use for these arguments, and every refusal.

    Raises ValueError for an unknown op, and whatever the op itself would raise.
    """
    if not isinstance(op, str) or op not in PROBLEMS:
        raise ValueError(f"op must be one of {', '.join(PROBLEMS)}, got {op!r}")
    call = PROBLEMS[op](*args, **options)
    computed_by = _COMPUTED_BY.get(op, op)
    asked = dispatch.requested_backend(backend, dispatch.NO_KERNELS.get(computed_by, ()))
    return dispatch.survey(computed_by, call, asked)
