"""Softmax attention within windows of tokens."""

from hierkernels.ops.local_attention.api import local_attention

__all__ = ["local_attention"]
