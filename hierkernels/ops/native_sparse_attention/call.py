"""One call of native sparse attention in canonical form."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Definition:
    """Where the two definitions of native sparse attention differ.

    scoring: of blocks, see hk.select_blocks.
    strict: a compression window must have ended before the query's position, not at it.
    num_initial, num_local: blocks that are always selected, inside n.
    own_block: the query's own block is attended to beside the n.
    own_in_window: window_size counts the query's own token.
    """

    scoring: str
    strict: bool
    num_initial: int
    num_local: int
    own_block: bool
    own_in_window: bool


PRESETS = {
    "paper": Definition("probability", False, 1, 2, own_block=False, own_in_window=True),
    "seed": Definition("logit", True, 0, 0, own_block=True, own_in_window=False),
}


@dataclass(slots=True)
class NsaCall:
    """The arguments of one call, checked, with every default filled in."""

    q: torch.Tensor  # (B, Hq, Nq, D), of the selected blocks and the window
    k: torch.Tensor  # (B, Hkv, Nk, D)
    v: torch.Tensor  # (B, Hkv, Nk, Dv)
    q_cmp: torch.Tensor  # (B, Hq, Nq, D), of the compressed tokens
    k_cmp: torch.Tensor  # (B, Hkv, M + W, D)
    v_cmp: torch.Tensor  # (B, Hkv, M + W, Dv)
    k_window: torch.Tensor  # (B, Hkv, Nk, D)
    v_window: torch.Tensor  # (B, Hkv, Nk, Dv)
    gates: torch.Tensor  # (B, Hq, Nq, 3), float, of the branches in this order
    definition: Definition
    block_size: int  # S
    num_selected: int  # n
    reach: int  # tokens before its own that a query's window holds
    stride: int  # d
    first_end: int
    compression_window: int  # l
    num_memory: int  # M
    use_diff_topk: bool
    shared: bool
    is_causal: bool
    scale: float | None

    @property
    def first_position(self) -> int:
        """Of the queries: they are the last tokens."""
        return self.k.shape[2] - self.q.shape[2]

    @property
    def compressed_tokens(self) -> torch.Tensor:
        """The compressed keys without the memory tokens, (B, Hkv, W, D)."""
        return self.k_cmp[:, :, self.num_memory :]
