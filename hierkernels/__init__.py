"""Fused kernels for hierarchical, local and sparse sequence models."""

from hierkernels.dispatch import BACKENDS, use_backend
from hierkernels.explain import explain
from hierkernels.key_range import KeyRange, Staircase
from hierkernels.ops.attention import attention
from hierkernels.ops.causal_sgu import causal_sgu
from hierkernels.ops.compressed_attention import compressed_attention
from hierkernels.ops.gelu import gelu
from hierkernels.ops.layer_norm import layer_norm
from hierkernels.ops.local_attention import local_attention
from hierkernels.ops.native_sparse_attention import native_sparse_attention
from hierkernels.ops.rms_norm import rms_norm
from hierkernels.ops.rotary import rotary
from hierkernels.ops.select_blocks import select_blocks
from hierkernels.ops.selected_attention import selected_attention
from hierkernels.version import __version__

__all__ = [
    "BACKENDS",
    "KeyRange",
    "Staircase",
    "__version__",
    "attention",
    "causal_sgu",
    "compressed_attention",
    "explain",
    "gelu",
    "layer_norm",
    "local_attention",
    "native_sparse_attention",
    "rms_norm",
    "rotary",
    "select_blocks",
    "selected_attention",
    "use_backend",
]
