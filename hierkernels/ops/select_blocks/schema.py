"""Registers torch.ops.hierkernels.select_blocks and its fake; indices have no gradient."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from hierkernels import dispatch
from hierkernels.eager import is_unwatched
from hierkernels.library import LIBRARY, compute_one_by_one
from hierkernels.ops.select_blocks.call import SelectCall

LIBRARY.define(
    "select_blocks(Tensor q, Tensor k_cmp, Tensor? lse, SymInt num_selected, SymInt block_size, "
    "SymInt stride, SymInt first_end, SymInt window_size, bool strict, bool is_causal, "
    "SymInt num_initial, SymInt num_local, bool exclude_own_block, SymInt query_offset, "
    "SymInt num_keys, bool shared, float scale, str backend) -> Tensor"
)


def _backend(call: SelectCall, asked: str) -> ModuleType:
    return dispatch.module_for("select_blocks", call, asked)


def _forward(*args: Any) -> torch.Tensor:
    call = SelectCall(*args[:-1])
    return _backend(call, args[-1]).forward(call)


def _fake_forward(*args: Any) -> torch.Tensor:
    return SelectCall(*args[:-1]).new_indices()


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("select_blocks", _forward, _key)
torch.library.register_fake("hierkernels::select_blocks", _fake_forward, lib=LIBRARY)
compute_one_by_one("select_blocks")


def select_blocks(call: SelectCall, backend: str) -> torch.Tensor:
    """indices: the operator, or its implementation where nobody sees the difference.

    Raises NotImplementedError if `backend` is given and refuses.
    """
    if is_unwatched((call.q, call.k_cmp, call.lse)):
        return _backend(call, backend).forward(call)
    return torch.ops.hierkernels.select_blocks.default(*call.arguments(), backend)
