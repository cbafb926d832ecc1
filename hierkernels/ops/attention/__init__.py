"""Scaled dot-product attention over key ranges."""

from hierkernels.ops.attention.api import attention

__all__ = ["attention"]
