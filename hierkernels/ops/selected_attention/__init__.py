"""Attention over selected blocks of keys, as native sparse attention needs it."""

from hierkernels.ops.selected_attention.api import selected_attention

__all__ = ["selected_attention"]
