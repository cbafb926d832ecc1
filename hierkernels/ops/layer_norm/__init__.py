"""Layer norm, with token shift."""

from hierkernels.ops.layer_norm.api import layer_norm

__all__ = ["layer_norm"]
