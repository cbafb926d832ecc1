"""The zero look-back: positions before the sequence count as zero keys with zero values.

Such a key has the score 0 (plus the bias of its slot) and adds nothing to the weighted sum. So it
enlarges the softmax's denominator alone, and can join after the kernel. With `extra` the
log-sum-exp of a query's zero keys:

    out' = out * exp(lse) / (exp(lse) + exp(extra)),    lse' = log(exp(lse) + exp(extra))

Only the first look_backward buckets have zero keys. Plain differentiable PyTorch operations; the
log-sum-exp of attention is differentiable on every backend.
"""

from __future__ import annotations

import torch

from hierkernels.ops.local_attention.call import LocalCall


def _extra(call: LocalCall, dtype: torch.dtype) -> torch.Tensor:
    """The log-sum-exp of the zero keys: (H|1, n) for the first n queries, n = min(before, N)."""
    n, w, bias = call.attention.q.shape[2], call.width, call.attention.bias
    if bias is None:
        i = torch.arange(n, device=call.attention.q.device)[: call.before]
        first = i if call.exact_window else i // w * w
        return (call.before - first).to(dtype).log()[None]
    # By bucket: its zero keys are the first slots, for an exact window without those out of reach.
    buckets = []
    for c in range(call.look_backward):
        row = bias[0, :, :, : call.before - c * w].to(dtype)
        hidden = row == float("-inf")
        if call.exact_window:
            slot = torch.arange(row.shape[2], device=row.device)
            hidden = hidden | (slot < torch.arange(w, device=row.device)[:, None])
        buckets.append(torch.logsumexp(row.masked_fill(hidden, float("-inf")), -1))
    return torch.cat(buckets, dim=1)[:, :n]


def merge_zero_keys(
    call: LocalCall, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of the real keys -> of the real and the zero keys.

    Splits, not slices: the gradient of a split is one concatenation.
    """
    N = out.shape[2]
    n = torch.sym_min(call.before, N)
    extra = _extra(call, lse.dtype)
    real, lse_rest = lse.split_with_sizes((n, N - n), dim=2)
    first, out_rest = out.split_with_sizes((n, N - n), dim=2)
    # Where both are -inf the query still sees nothing: differences of 0 instead of NaN.
    seen = (real > float("-inf")) | (extra > float("-inf"))
    real, extra = real.masked_fill(~seen, 0.0), extra.masked_fill(~seen, 0.0)
    first = (first * torch.sigmoid(real - extra)[..., None]).to(out.dtype)
    real = torch.logaddexp(real, extra).masked_fill(~seen, float("-inf"))
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        out[:, :, :n], lse[:, :, :n] = first, real  # the kernel's own, which nobody else has seen
        return out, lse
    return torch.cat((first, out_rest), dim=2), torch.cat((real, lse_rest), dim=2)
