"""One compressed attention call in canonical form."""

from __future__ import annotations

from dataclasses import dataclass

from hierkernels.ops.attention.call import AttentionCall


@dataclass(slots=True)
class CompressedCall:
    """The arguments of one call, checked.

    attention: the same call as attention over a key range.
    """

    attention: AttentionCall
    stride: int  # d, tokens between the ends of neighbouring windows
    first_end: int  # the position at which the first window ends
    num_memory: int  # M, keys before the first window's
    strict: bool
    is_causal: bool
    query_offset: int
