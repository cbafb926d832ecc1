"""The causal spatial gating unit, global and windowed."""

from hierkernels.ops.causal_sgu.api import causal_sgu

__all__ = ["causal_sgu"]
