"""Root-mean-square norm, with token shift."""

from hierkernels.ops.rms_norm.api import rms_norm

__all__ = ["rms_norm"]
