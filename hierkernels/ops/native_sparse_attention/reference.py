"""Native sparse attention in eager PyTorch: the definition, and the oracle of every test.

The branches are the references of their operators. Differentiable any number of times.
"""

from __future__ import annotations

import torch

from hierkernels.ops.native_sparse_attention.branches import branches
from hierkernels.ops.native_sparse_attention.call import NsaCall


def native_sparse_attention(call: NsaCall) -> torch.Tensor:
    """out (B, Hq, Nq, Dv)."""
    parts = torch.stack(branches(call, "reference"), dim=-2)
    return torch.einsum("bhns,bhnsd->bhnd", call.gates.to(parts.dtype), parts)
