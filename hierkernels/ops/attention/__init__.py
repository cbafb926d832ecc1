"""Scaled dot-product attention over key ranges."""

from hierkernels.ops.attention.api import attention, explain

__all__ = ["attention", "explain"]
