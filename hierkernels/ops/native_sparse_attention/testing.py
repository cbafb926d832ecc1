"""Inputs from a named case of native sparse attention, and errors against the float64 oracle.

The rule is that of hierkernels/testing.py. A choice of blocks that two precisions make differently
is no error, hk.select_blocks has its own rule for it; so the oracle takes over the blocks that the
judged backend chooses.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch

from hierkernels import testing
from hierkernels.ops.attention.spec import Case as AttentionCase
from hierkernels.ops.compressed_attention import compressed_attention
from hierkernels.ops.native_sparse_attention import api, branches
from hierkernels.ops.native_sparse_attention.call import NsaCall
from hierkernels.ops.native_sparse_attention.spec import NsaCase
from hierkernels.ops.selected_attention import testing as selected_testing
from hierkernels.testing import Results, Standard


@dataclass(frozen=True)
class Inputs:
    """The tensors of one case; the values depend on the case's name and the seed alone."""

    case: NsaCase
    q: torch.Tensor  # (B, Hq, Nq, D)
    k: torch.Tensor  # (B, Hkv, Nk, D)
    v: torch.Tensor  # (B, Hkv, Nk, Dv)
    k_cmp: torch.Tensor  # (B, Hkv, M + W, D)
    v_cmp: torch.Tensor  # (B, Hkv, M + W, Dv)
    gates: torch.Tensor  # (B, Hq, Nq, 3)
    q_cmp: torch.Tensor | None  # as q
    k_window: torch.Tensor | None  # as k
    v_window: torch.Tensor | None  # as v
    dout: torch.Tensor  # (B, Hq, Nq, Dv), the gradient that backward starts from
    indices: torch.Tensor | None = None  # the chosen blocks, where they are fixed

    @property
    def dtype(self) -> torch.dtype:
        return self.q.dtype

    def arguments(self) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        """The case as hk.native_sparse_attention takes it."""
        case = self.case
        options = {
            "preset": case.preset, "block_size": case.S, "num_selected": case.n,
            "window_size": case.w, "stride": case.d, "first_end": case.first_end,
            "compression_window": case.l, "q_cmp": self.q_cmp, "k_window": self.k_window,
            "v_window": self.v_window, "num_memory": case.M,
            "use_diff_topk": case.use_diff_topk, "shared": case.shared,
            "is_causal": case.is_causal,
        }  # fmt: skip
        return (self.q, self.k, self.v, self.k_cmp, self.v_cmp, self.gates), options

    def call(self) -> NsaCall:
        """The case in canonical form."""
        tensors, options = self.arguments()
        return api.make_call(*tensors, **options)

    def run(self, backend: str | None) -> torch.Tensor:
        """out of a backend; of the unfused composition if the blocks are fixed."""
        call = self.call()
        if self.indices is None:
            return api.run(call, backend)
        parts = [t.run(backend)[0] for t in self.branches().values()]
        return torch.einsum("bhns,bhnsd->bhnd", call.gates, torch.stack(parts, dim=-2))

    def choose(self, backend: str | None) -> torch.Tensor:
        """The blocks that a backend chooses."""
        with torch.no_grad():
            call = self.call()
            lse = compressed_attention(
                call.q_cmp, call.k_cmp, call.v_cmp, stride=call.stride, first_end=call.first_end,
                num_memory=call.num_memory, strict=call.definition.strict,
                is_causal=call.is_causal, query_offset=call.first_position, return_lse=True,
                backend=backend,
            )[1]  # fmt: skip
            return branches.select(call, lse, backend)[0]

    def branches(self) -> dict[str, Any]:
        """Each branch with its share of dout, as the inputs of its own operator's tests."""
        assert self.indices is not None
        call = self.call()
        douts = [(self.dout * gate).to(self.dtype) for gate in call.gates.unsqueeze(-2).unbind(-1)]

        def attention(
            case: AttentionCase, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: Any
        ) -> testing.Inputs:
            return testing.Inputs(case, q, k, v, None, None, None, dout, None, 0)

        selected = selected_testing.Inputs(
            self.case.selected(), call.q, call.k, call.v, self.indices, None, douts[1], None
        )
        return {
            "compressed": attention(
                self.case.compressed(), call.q_cmp, call.k_cmp, call.v_cmp, douts[0]
            ),
            "selected": selected,
            "window": attention(self.case.window(), call.q, call.k_window, call.v_window, douts[2]),
        }

    def differentiable(self) -> dict[str, torch.Tensor]:
        """The inputs that have a gradient, by the name of it."""
        names = ("q", "k", "v", "k_cmp", "v_cmp", "gates", "q_cmp", "k_window", "v_window")
        tensors = {f"d{name}": getattr(self, name) for name in names}
        return {name: t for name, t in tensors.items() if t is not None}

    def _map(self, change: Any) -> Inputs:
        names = (name[1:] for name in self.differentiable())
        return replace(self, **{name: change(getattr(self, name)) for name in names})

    def requires_grad(self) -> Inputs:
        """The same values as fresh leaves that require gradients."""
        return self._map(lambda t: t.detach().requires_grad_())

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another dtype."""
        return replace(self._map(lambda t: t.to(dtype)), dout=self.dout.to(dtype))


def make_inputs(
    case: NsaCase, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> Inputs:
    """Normally distributed tensors for a case, drawn on the CPU, so equal on every device.

    Gates lie in (0, 1), as those of a sigmoid.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()) + seed)
    precise = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, gain: float = 1.0) -> torch.Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=precise)
        return (drawn * gain).to(dtype).to(device)

    queries, keys = (case.B, case.Hq, case.Nq), (case.B, case.Hkv, case.Nk)
    compressed = (case.B, case.Hkv, case.M + case.W)
    gates = torch.rand((*queries, 3), generator=generator, dtype=precise).to(dtype).to(device)
    own = case.own_branches
    return Inputs(
        case,
        normal(*queries, case.D, gain=case.gain),
        normal(*keys, case.D),
        normal(*keys, case.Dv),
        normal(*compressed, case.D),
        normal(*compressed, case.Dv),
        gates,
        normal(*queries, case.D, gain=case.gain) if own else None,
        normal(*keys, case.D) if own else None,
        normal(*keys, case.Dv) if own else None,
        normal(*queries, case.Dv),
    )


def compute(inputs: Inputs, backend: str | None, gradients: bool = True) -> Results:
    """out of a backend, and the gradients of sum(out dout), detached."""
    if not gradients:
        with torch.no_grad():
            return {"out": inputs.run(backend)}
    inputs = inputs.requires_grad()
    out = inputs.run(backend)
    wanted = inputs.differentiable()
    grads = torch.autograd.grad(
        out, list(wanted.values()), inputs.dout.to(out.dtype), allow_unused=True
    )
    found = {
        name: torch.zeros_like(t) if grad is None else grad
        for (name, t), grad in zip(wanted.items(), grads, strict=True)
    }
    return {"out": out.detach(), **found}


def oracle(inputs: Inputs, gradients: bool = True) -> Results:
    """The references of the branches in float64, on the values that the inputs have."""
    return compute(inputs.to(torch.float64), "reference", gradients)


# For each branch, whose gradients its dq, dk and dv belong to.
_OWNERS = {
    "compressed": {"dq": "dq_cmp", "dk": "dk_cmp", "dv": "dv_cmp"},
    "selected": {"dq": "dq", "dk": "dk", "dv": "dv"},
    "window": {"dq": "dq", "dk": "dk_window", "dv": "dv_window"},
}


@torch.no_grad()
def term_sizes(inputs: Inputs, gradients: bool, power: int) -> dict[str, torch.Tensor]:
    """As hierkernels/testing.py: the terms of a sum over branches are those of all of them."""
    precise = inputs.to(torch.float64)
    call = precise.call()
    out_terms, dgates = [], []
    sums: dict[str, Any] = {}
    for gate, (name, part) in zip(
        call.gates.abs().unbind(-1), precise.branches().items(), strict=True
    ):
        module: Any = selected_testing if name == "selected" else testing
        with torch.enable_grad():
            expected = module.oracle(part, gradients)
        sizes = module.term_sizes(part, expected, power)
        out_terms.append((gate[..., None] * sizes["out"]) ** power)
        out_terms.append((gate[..., None] * expected["out"]).abs() ** power)
        if not gradients:
            continue
        # A gate's gradient is the sum of dout times the branch's output, which is itself rounded.
        terms = (inputs.dout.double().abs() * (sizes["out"] + expected["out"].abs())) ** power
        dgates.append(terms.sum(-1))
        for result, owner in _OWNERS[name].items():
            if owner not in precise.differentiable():
                owner = "d" + owner[1:].split("_")[0]
            sums[owner] = sums.get(owner, 0) + sizes[result] ** power
    sums["out"] = torch.stack(out_terms).sum(0)
    if gradients:
        sums["dgates"] = torch.stack(dgates, dim=-1)
    return {name: t ** (1 / power) for name, t in sums.items()}


def make_standard(inputs: Inputs, backend: str | None, gradients: bool = True) -> Standard:
    """What the results of a backend are judged by, given the blocks it chooses."""
    fixed = replace(inputs, indices=inputs.choose(backend))
    return testing.judge(
        fixed,
        gradients,
        oracle,
        compute,
        lambda expected, power: term_sizes(fixed, gradients, power),
        {},
    )


def check_accuracy(inputs: Inputs, backend: str | None, gradients: bool = True) -> None:
    """AssertionError if a result of the backend breaks the rule."""
    results = compute(inputs, backend, gradients)
    make_standard(inputs, backend, gradients).check(results)
