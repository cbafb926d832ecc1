"""Inputs of compressed attention's named cases; errors are judged by hierkernels/testing.py."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from hierkernels import testing
from hierkernels.ops.attention.call import AttentionCall
from hierkernels.ops.attention.spec import Case
from hierkernels.ops.compressed_attention import api
from hierkernels.ops.compressed_attention.call import CompressedCall
from hierkernels.ops.compressed_attention.spec import CompressedCase


@dataclass(frozen=True)
class CompressedInputs(testing.Inputs):
    """The tensors of one case."""

    case: CompressedCase

    def compressed_call(self) -> CompressedCall:
        """The case as compressed attention's own reference receives it."""
        case = self.case
        return api.make_call(
            self.q, self.k, self.v, stride=case.stride, first_end=case.first_end,
            num_memory=case.num_memory, strict=case.strict, is_causal=case.is_causal,
            query_offset=case.query_offset, scale=case.scale,
        )  # fmt: skip

    def as_attention(self) -> testing.Inputs:
        """The same problem as attention over a key range, which can be thinned."""
        case = replace(self.case, key_range=self.case.visible_range)
        options = {f.name: getattr(case, f.name) for f in fields(Case)}
        tensors = {f.name: getattr(self, f.name) for f in fields(testing.Inputs)}
        return testing.Inputs(**tensors | {"case": Case(**options)})

    def call(self) -> AttentionCall:
        return self.compressed_call().attention

    def run(self, backend: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        return api.run(self.compressed_call(), backend)


make_standard = testing.make_standard


def make_inputs(
    case: CompressedCase, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> CompressedInputs:
    """Normally distributed tensors for a case, drawn on the CPU, so equal on every device."""
    drawn = testing.make_inputs(case, dtype, device, seed)
    return CompressedInputs(**{field.name: getattr(drawn, field.name) for field in fields(drawn)})
