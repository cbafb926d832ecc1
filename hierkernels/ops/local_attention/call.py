"""One local attention call in canonical form."""

from __future__ import annotations

from dataclasses import dataclass

from hierkernels.ops.attention.call import AttentionCall


@dataclass(slots=True)
class LocalCall:
    """The arguments of one call, checked.

    attention: the same call as attention over a key range, its bias by slots. It lacks the zero
        look-back only.
    """

    attention: AttentionCall
    width: int  # w, queries of a bucket
    look_backward: int
    look_forward: int
    is_causal: bool
    exact_window: bool
    zero_lookback: bool

    @property
    def before(self) -> int:
        """Positions that a bucket looks back."""
        return self.look_backward * self.width
