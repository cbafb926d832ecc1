"""Softmax attention over compressed tokens."""

from hierkernels.ops.compressed_attention.api import compressed_attention

__all__ = ["compressed_attention"]
