"""Compressed, selected and window attention of one query, added up by gates."""

from hierkernels.ops.native_sparse_attention.api import native_sparse_attention

__all__ = ["native_sparse_attention"]
