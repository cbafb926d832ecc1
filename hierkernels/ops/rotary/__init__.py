"""Rotary positions."""

from hierkernels.ops.rotary.api import rotary

__all__ = ["rotary"]
