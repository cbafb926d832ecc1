"""hk.causal_sgu against masked einsum, torch.compile of it, and the formulation of g-mlp-gpt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange

from benchmarks.suite import (
    BACKEND_ROWS,
    Candidate,
    MemorySweep,
    OpProblem,
    Suite,
    Sweep,
    Unsupported,
)
from hierkernels import dispatch
from hierkernels.ops.causal_sgu import reference, testing
from hierkernels.ops.causal_sgu.spec import SPEED, Case
from hierkernels.ops.causal_sgu.testing import Inputs

# torch.compile takes longer than all else: the quick set has it once.
COMPILED_IN_QUICK = ("global-4x2048x1024",)

CHECK_PRODUCTS = 2**31  # a case with more is checked on some channels of each head
CHECK_START, CHECK_STEP = 7, 61  # prime, so that the channels fall on every place of a tile
CHANNELS = dict.fromkeys(("out", "dresidual", "dgate", "dgate_residual"), 2)


def _memory_case(n: int) -> Case:
    return Case(f"memory-n{n}", 1, n, 64)


class CausalSguSuite(Suite):
    """The global unit, which grows with the square of N, and the windowed one, which does not."""

    name = "causal_sgu"
    peers: ClassVar = {
        "eager": "eager reference (masked einsum)",
        "compiled": "torch.compile",
        "original": "g-mlp-gpt's formulation",
    }
    yardstick = "eager"
    cases = SPEED
    sweeps = (
        Sweep(
            "time",
            "Causal SGU, (4, N, 1024), 4 heads",
            "N",
            {c.name: c.N for c in SPEED if c.group == "global"},
        ),
        Sweep(
            "windowed-time",
            "Causal SGU, (1, N, 1024), 4 heads, w = 128",
            "N",
            {c.name: c.N for c in SPEED if c.group == "windowed"},
        ),
    )
    memory = MemorySweep(
        "(1, N, 64), one head",
        _memory_case,
        rows=("cpu", "eager"),
        lengths=(1024, 2048, 4096, 8192),
        quick_lengths=(),
        needs=lambda row, n: 6 * n * n * 4 if row == "eager" else 2 * n * n * 4,
    )

    def rows(self, case: Case, device: str, full: bool) -> list[str]:
        peers = list(self.peers)
        if not case.window:  # the same formulation as eager's
            peers.remove("original")
        if not full and case.name not in COMPILED_IN_QUICK:
            peers.remove("compiled")
        if not full and case.window:  # takes about as long as the original
            peers.remove("eager")
        return [*BACKEND_ROWS[device], *peers]

    def shape(self, case: Case) -> list[int]:
        return [case.B, case.N, case.C, case.H, case.window or 0]

    def inputs(self, case: Case, dtype: torch.dtype, device: str) -> Inputs:
        return testing.make_inputs(case, dtype, device)

    def problem(self, case: Case, dtype: torch.dtype, device: str) -> OpProblem:
        inputs = self.inputs(case, dtype, device)
        if case.B * case.C * case.visible < CHECK_PRODUCTS:
            return OpProblem(inputs, testing.make_standard(inputs), CHANNELS)
        every = torch.arange(case.C, device=device).view(case.H, -1)
        judged = every[:, CHECK_START::CHECK_STEP].flatten()
        return OpProblem(inputs, testing.make_standard(_some(inputs, judged)), CHANNELS, judged)

    def candidates(self, row: str, inputs: Inputs, direction: str) -> Iterator[Candidate]:
        if row in dispatch.BACKENDS:
            yield _backend(row, inputs)
            return
        # The inputs' weights of the future are NaN: formulations that multiply by 0 need numbers.
        inputs = replace(inputs, weight=inputs.weight.nan_to_num())
        if row == "eager":
            yield Candidate(_eager, inputs)
        elif row == "compiled":
            yield Candidate(torch.compile(_eager, dynamic=False, fullgraph=True), inputs)
        elif row == "original":
            yield _original(inputs)
        else:
            raise ValueError(f"unknown row {row!r}")


def _some(inputs: Inputs, channels: torch.Tensor) -> Inputs:
    """The problem of some channels, as many of each head; the others do not touch them."""
    residual, gate, dout = (t[..., channels] for t in (inputs.residual, inputs.gate, inputs.dout))
    more = inputs.gate_residual
    return replace(
        inputs,
        case=replace(inputs.case, C=len(channels)),
        residual=residual,
        gate=gate,
        gate_residual=None if more is None else more[..., channels],
        dout=dout,
    )


def _backend(name: str, inputs: Inputs) -> Candidate:
    try:
        dispatch.resolve("causal_sgu", inputs.call(), name)
    except NotImplementedError as error:
        raise Unsupported(str(error)) from error
    return Candidate(lambda i: i.run(name), inputs)


def _eager(inputs: Inputs) -> torch.Tensor:
    return reference.causal_sgu(inputs.call())


def _original(inputs: Inputs) -> Candidate:
    """The windowed unit by copies of the gate: every bucket after the one before it."""
    case = inputs.case
    w = case.window
    if not w:
        raise Unsupported("only the windowed unit has another formulation")
    mask = torch.ones(w, 2 * w, device=inputs.gate.device).tril(w)

    def mix(i: Inputs) -> torch.Tensor:
        gate = F.pad(i.gate, (0, 0, 0, -case.N % w))
        gate = rearrange(gate, "b (w n) d -> b w n d", n=w)
        gate = F.pad(gate, (0, 0, 0, 0, 1, 0))
        gate = torch.cat((gate[:, :-1], gate[:, 1:]), dim=2)
        gate = rearrange(gate, "b w n (h d) -> b w h n d", h=case.H)
        weight = (i.weight * mask).to(gate.dtype)
        gate = torch.einsum("bwhnd,hmn->bwhmd", gate, weight)
        gate = gate + rearrange(i.bias.to(gate.dtype), "h n -> h n ()")
        gate = rearrange(gate, "b w h n d -> b (w n) (h d)")[:, : case.N]
        if i.gate_residual is not None:
            gate = gate + i.gate_residual
        return reference.activate(case.activation or "none", gate) * i.residual

    return Candidate(mix, inputs)


SUITE = CausalSguSuite()
