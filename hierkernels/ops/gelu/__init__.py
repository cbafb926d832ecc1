"""GELU, also of halves apart and as the gate of a half."""

from hierkernels.ops.gelu.api import gelu

__all__ = ["gelu"]
