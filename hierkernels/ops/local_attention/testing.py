"""Inputs of local attention's named cases; errors are judged by hierkernels/testing.py."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from hierkernels import testing
from hierkernels.ops.attention.call import AttentionCall
from hierkernels.ops.local_attention import api
from hierkernels.ops.local_attention.call import LocalCall
from hierkernels.ops.local_attention.spec import LocalCase


@dataclass(frozen=True)
class LocalInputs(testing.Inputs):
    """The tensors of one case; bias is (1, Hq, w, slots)."""

    case: LocalCase

    def local_call(self) -> LocalCall:
        """The case as local attention's own reference receives it."""
        case = self.case
        return api.make_call(
            self.q, self.k, self.v, case.width, is_causal=case.is_causal,
            look_backward=case.look_backward, look_forward=case.look_forward,
            exact_window=case.exact_window, zero_lookback=case.zero_lookback,
            key_padding_mask=self.padding, attn_bias=None if self.bias is None else self.bias[0],
            dropout_p=case.dropout_p, dropout_seed=self.dropout_seed, scale=case.scale,
        )  # fmt: skip

    def call(self) -> AttentionCall:
        return self.local_call().attention

    def run(self, backend: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        return api.run(self.local_call(), backend)


def make_inputs(
    case: LocalCase, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> LocalInputs:
    """Normally distributed tensors for a case, drawn on the CPU, so equal on every device."""
    drawn = testing.make_inputs(case, dtype, device, seed)
    return LocalInputs(**{field.name: getattr(drawn, field.name) for field in fields(drawn)})


def make_standard(inputs: LocalInputs, gradients: bool = True) -> testing.Standard:
    """The oracle and the allowed errors. With a zero look-back every slot may have a gradient."""
    standard = testing.make_standard(inputs, gradients)
    if inputs.case.zero_lookback:
        standard.unseen.pop("dbias", None)
    return standard
