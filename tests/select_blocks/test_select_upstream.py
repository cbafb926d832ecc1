"""Scoring by logits against the selection of the package native-sparse-attention-pytorch.

The package computes its indices inside SparseAttention.forward. Its own code runs here; what it
hands to topk, and what comes out, is taken down.
"""

from __future__ import annotations

import pytest
import torch

import hierkernels as hk
from hierkernels.native import native

upstream = pytest.importorskip(
    "native_sparse_attention_pytorch.native_sparse_attention",
    reason="native-sparse-attention-pytorch==0.2.3 is the oracle and not installed",
)
BACKENDS = ["reference"] if native() is None else ["cpu", "reference"]
HEADS, KV_HEADS, DIM_HEAD = 4, 2, 8


class _Recorder:
    """Keeps q, the compressed keys and the selection of one forward of the package."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.q = self.keys = self.importance = self.values = self.indices = None
        attend, topk = upstream.attend, torch.Tensor.topk

        def recorded_attend(q: torch.Tensor, k: torch.Tensor, *args, **options):
            if options.get("return_sim"):
                self.q, self.keys = q, k
            return attend(q, k, *args, **options)

        def recorded_topk(t: torch.Tensor, *args, **options):
            self.importance = t
            self.values, self.indices = topk(t, *args, **options)
            return self.values, self.indices

        monkeypatch.setattr(upstream, "attend", recorded_attend)
        monkeypatch.setattr(torch.Tensor, "topk", recorded_topk)


def _run(
    monkeypatch: pytest.MonkeyPatch, n: int, stride: int, block: int, selected: int, share: bool
) -> _Recorder:
    torch.manual_seed(n)
    module = upstream.SparseAttention(
        dim=32, dim_head=DIM_HEAD, heads=HEADS, kv_heads=KV_HEADS, sliding_window_size=2,
        compress_block_size=2 * stride, compress_block_sliding_stride=stride,
        selection_block_size=block, num_selected_blocks=selected, causal=True,
        num_compressed_mem_kv=1, query_heads_share_selected_kv=share,
    )  # fmt: skip
    recorder = _Recorder(monkeypatch)
    module(torch.randn(2, n, 32) * 3)
    return recorder


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("share", [True, False], ids=["shared", "each-head"])
@pytest.mark.parametrize(
    "n, stride, block, selected",
    [(64, 4, 8, 2), (61, 4, 8, 3), (70, 5, 5, 4), (33, 2, 8, 9), (20, 4, 16, 2), (9, 4, 8, 2)],
)
def test_parity(
    n: int, stride: int, block: int, selected: int, share: bool, backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    theirs = _run(monkeypatch, n, stride, block, selected, share)
    assert theirs.indices is not None, "the package selected nothing"
    q, k = theirs.q.detach().requires_grad_(), theirs.keys[:, :, 1:].detach().requires_grad_()
    indices, p = hk.select_blocks(
        q, k, num_selected=selected, block_size=block, stride=stride, first_end=stride - 1,
        scoring="logit", strict=True, shared=share, return_probabilities=True, backend=backend,
    )  # fmt: skip
    kept = theirs.values > 1e-10
    expected = torch.where(kept, theirs.indices, 10**6).sort(-1).values
    expected = expected.masked_fill(expected == 10**6, -1)
    found = indices[..., : expected.shape[-1]]
    assert torch.equal(found.long(), expected)
    assert (indices[..., expected.shape[-1] :] == -1).all()
    weights = theirs.importance.gather(3, expected.clamp(min=0)).masked_fill(expected < 0, 0.0)
    torch.testing.assert_close(p[..., : expected.shape[-1]], weights, rtol=1e-5, atol=1e-7)

    # The gradient through the probabilities, as use_diff_topk needs it.
    seed = torch.randn_like(weights)
    dq, dk = torch.autograd.grad(p[..., : expected.shape[-1]], (q, k), seed)
    wanted = torch.autograd.grad(weights, (theirs.q, theirs.keys), seed)
    torch.testing.assert_close(dq, wanted[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(dk, wanted[1][:, :, 1:], rtol=1e-4, atol=1e-6)
