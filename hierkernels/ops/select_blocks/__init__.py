"""The choice of key blocks for sparse attention."""

from hierkernels.ops.select_blocks.api import select_blocks

__all__ = ["select_blocks"]
