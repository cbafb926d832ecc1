"""hk.native_sparse_attention with backend="cuda" on the emulation: every branch has a kernel there.

Each branch's kernels have tests of their own; here they meet. The gated sum is PyTorch's.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from hierkernels.ops.native_sparse_attention.spec import CORRECTNESS, NsaCase
from hierkernels.ops.native_sparse_attention.testing import check_accuracy, make_inputs
from hierkernels.testing import poisoned_memory

_BY_NAME = {case.name: case for case in CORRECTNESS}
F32, BF16 = torch.float32, torch.bfloat16
_NAMES = ("n15", "n65", "g3", "decode", "last-five", "own-selection", "channels", "logits-x100")
CASES = (
    *((f"{preset}-{name}", BF16) for preset in ("paper", "seed") for name in _NAMES),
    ("paper-n65", F32), ("seed-n65", F32), ("seed-none-selected", BF16), ("seed-both-ways", BF16),
)  # fmt: skip


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(_BY_NAME[n], d, id=f"native_sparse_attention-cuda-{str(d)[6:]}-{n}")
        for n, d in CASES
    ],
)
def test_accuracy(emulated_cuda: ModuleType, case: NsaCase, dtype: torch.dtype) -> None:
    with poisoned_memory():
        check_accuracy(make_inputs(case, dtype), "cuda")
    assert emulated_cuda.take_counts()["mma"] > 0
