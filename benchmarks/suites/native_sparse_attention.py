"""The layer: python_models.SparseAttention against the package it follows, and dense attention.

All rows have the same weights and inputs; the dense row is our own layer of dense attention, with
the same heads, whose time native sparse attention has to beat from some length on. The layer is
causal, so that its first tokens alone are a whole problem: the oracle, in float64 on the reference
backend, computes those, and what the rows give there is judged, with the gradients of the input and
of every parameter for a dout that is 0 elsewhere. A result may err twice as much as the reference
backend in float32, relative to its norm, plus a rounding.

The rows must choose the same blocks, so the judged tokens are those of a seed for which no choice
is near a tie.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

import hierkernels as hk
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
from hierkernels.ops.native_sparse_attention.spec import NsaCase
from hierkernels.testing import Errors
from python_models import SparseAttention
from python_models.nsa_attention import DenseAttention

JUDGED = 256  # tokens
INPUT_SEED = 5  # no two scores of blocks that compete are nearer than 9e-5
LAYER = {
    "dim": 512,
    "dim_head": 64,
    "heads": 8,
    "kv_heads": 2,
    "sliding_window_size": 64,
    "compress_block_size": 16,
    "compress_block_sliding_stride": 8,
    "selection_block_size": 16,
    "num_selected_blocks": 4,
    "causal": True,
}


@dataclass(frozen=True)
class Case:
    """The layer on N tokens."""

    N: int
    name: str
    group: str = "layer"
    quick: bool = True
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)

    @property
    def attention(self) -> NsaCase:
        return NsaCase(
            self.name, "seed", 1, 8, 2, self.N, self.N, 64, 64, 16, 8, 16, 4, 64, M=1,
            own_branches=False,
        )  # fmt: skip

    def flops(self, direction: str) -> float:
        """Of the linear layers (backward x 2) and the stages of the attention."""
        dim, inner, kv = 512, 8 * 64, 2 * 64
        each_token = dim * (inner + 2 * kv) + dim * 3 * 8 + inner * dim
        each_window = 2 * 2 * (1024 * 1024 + 1024 * 64)  # keys and values of two heads
        linear = 2.0 * (self.N * each_token + self.attention.W * each_window)
        return self.attention.flops(direction) + (linear if direction == "forward" else 2 * linear)

    def bytes(self, dtype: torch.dtype, direction: str) -> int:
        """Of the attention's stages, the input and the output; backward: their gradients too."""
        tokens = 2 * self.N * 512 * dtype.itemsize
        return self.attention.bytes(dtype, direction) + tokens * (
            1 if direction == "forward" else 2
        )


CASES = (
    Case(4096, "layer-4096"),
    *(Case(n, f"layer-{n}", quick=False) for n in (1024, 2048, 8192, 16384, 32768)),
)


@dataclass(frozen=True)
class LayerInputs:
    """A layer, its input, and where it runs."""

    module: nn.Module
    backend: str | None
    x: Tensor  # (1, N, 512)
    dout: Tensor  # (1, N, 512)

    def differentiable(self) -> dict[str, Tensor]:
        named = {f"d{name}": p for name, p in self.module.named_parameters() if p.requires_grad}
        return {"dx": self.x, **named}

    def requires_grad(self) -> LayerInputs:
        return replace(self, x=self.x.detach().requires_grad_())

    def run(self) -> Tensor:
        with hk.use_backend(self.backend):
            return self.module(self.x)

    def first(self, tokens: int) -> LayerInputs:
        return replace(self, x=self.x[:, :tokens], dout=self.dout[:, :tokens])


@dataclass(frozen=True)
class LayerStandard:
    """Results are judged by their error's norm over their own."""

    expected: dict[str, Tensor]
    allowed: dict[str, float]

    def check(self, results: Mapping[str, Tensor]) -> dict[str, Errors]:
        found, failures = {}, []
        for name, value in results.items():
            error = relative_error(value, self.expected[name])
            if not error <= self.allowed[name]:
                failures.append(f"{name}: error {error:.3g}, allowed {self.allowed[name]:.3g}")
            found[name] = Errors(error, error)
        if failures:
            raise AssertionError("; ".join(failures))
        return found


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of the expected values."""
    difference = (actual.detach().double() - expected).norm()
    return (difference / expected.norm().clamp(min=1e-300)).item()


def results(inputs: LayerInputs) -> dict[str, Tensor]:
    """out and every gradient."""
    inputs = inputs.requires_grad()
    out = inputs.run()
    wanted = inputs.differentiable()
    grads = torch.autograd.grad(out, list(wanted.values()), inputs.dout)
    return {"out": out.detach(), **dict(zip(wanted, grads, strict=True))}


def make_standard(inputs: LayerInputs, build: type[nn.Module]) -> LayerStandard:
    """The first tokens in float64, and the errors of the reference backend in their precision."""
    part = replace(inputs.first(min(JUDGED, inputs.x.shape[1])), backend="reference")
    precise = build_like(inputs.module, build).double()
    expected = results(replace(part, module=precise, x=part.x.double(), dout=part.dout.double()))
    eps = torch.finfo(inputs.x.dtype).eps
    errors = {name: relative_error(t, expected[name]) for name, t in results(part).items()}
    return LayerStandard(expected, {name: 2 * error + eps for name, error in errors.items()})


def build_like(module: nn.Module, build: type[nn.Module]) -> nn.Module:
    """A copy of a layer with the same weights."""
    copy = build(**_options(build)).to(next(module.parameters()).device)
    copy.load_state_dict(module.state_dict())
    return copy


def _options(build: type[nn.Module]) -> dict:
    if build is not DenseAttention:
        return LAYER
    return {name: LAYER[name] for name in ("dim", "dim_head", "heads", "kv_heads", "causal")}


def _shaken(module: nn.Module) -> nn.Module:
    """Weights none of which is 0, the same in every run."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return module


@dataclass(frozen=True)
class LayerProblem(OpProblem):
    """The dense row computes something else, and has a standard of its own."""

    dense: LayerStandard | None = None

    def check(self, candidate: Candidate, direction: str) -> dict[str, float]:
        if candidate.label != "dense":
            return super().check(candidate, direction)
        assert self.dense is not None
        return replace(self, standard=self.dense).check(replace(candidate, label=""), direction)


class NativeSparseAttentionSuite(Suite):
    """SparseAttention(512, 64, 8, kv 2, window 64, l 16, d 8, S 16, n 4) against length."""

    name = "native_sparse_attention"
    peers: ClassVar = {
        "dense": "our layer of dense attention",
        "package": "native-sparse-attention-pytorch",
    }
    yardstick = "package"
    cases = CASES
    sweeps = (
        Sweep(
            "time",
            "Layer of 512 channels, 8 heads, 2 key/value heads",
            "N",
            {c.name: c.N for c in sorted(CASES, key=lambda c: c.N)},
        ),
    )
    memory = MemorySweep(
        "Layer of 512 channels, 8 heads, 2 key/value heads",
        lambda n: Case(n, f"memory-n{n}"),
        ("cpu", "dense", "package"),
        (1024, 2048, 4096, 8192, 16384, 32768),
        (),
        # The package gathers the keys of every query and holds all compressed scores.
        lambda row, n: n * (0.7e6 + 6 * 8 * 4 * n / 8) if row == "package" else 0,
    )

    def rows(self, case: Case, device: str, full: bool) -> list[str]:
        # The package's backward takes half a minute at 4096 tokens, minutes at 16384.
        limit = 8192 if full else 0
        peers = [row for row in self.peers if row != "package" or limit >= case.N]
        return [*BACKEND_ROWS[device], *peers]

    def shape(self, case: Case) -> list[int]:
        return [1, case.N, 512]

    def inputs(self, case: Case, dtype: torch.dtype, device: str) -> LayerInputs:
        torch.manual_seed(0)
        module = _shaken(SparseAttention(**LAYER)).to(device)
        generator = torch.Generator().manual_seed(INPUT_SEED)
        x, dout = torch.randn(2, 1, case.N, 512, generator=generator, dtype=dtype).to(device)
        return LayerInputs(module, None, x, dout)

    def problem(self, case: Case, dtype: torch.dtype, device: str) -> LayerProblem:
        inputs = self.inputs(case, dtype, device)
        dense = replace(inputs, module=_dense(device))
        return LayerProblem(
            inputs,
            make_standard(inputs, SparseAttention),
            {"out": 1, "dx": 1},
            slice(0, JUDGED),
            make_standard(dense, DenseAttention),
        )

    def candidates(self, row: str, inputs: LayerInputs, direction: str) -> Iterator[Candidate]:
        label = ""
        if row in dispatch.BACKENDS:
            inputs = replace(inputs, backend=row)
        elif row == "dense":
            device = inputs.x.device.type
            inputs = replace(inputs, module=_dense(device), backend=BACKEND_ROWS[device][-1])
            label = "dense"
        else:
            try:
                from native_sparse_attention_pytorch import SparseAttention as Package
            except ImportError as error:
                raise Unsupported(f"install requirements-peers.txt: {error}") from error
            inputs = replace(inputs, module=build_like(inputs.module, Package))
        yield Candidate(lambda i: i.run(), inputs, label)


def _dense(device: str) -> nn.Module:
    torch.manual_seed(0)
    return _shaken(DenseAttention(**_options(DenseAttention))).to(device)


SUITE = NativeSparseAttentionSuite()
