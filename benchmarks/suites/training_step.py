"""Whole models: one training step, forward and backward, against the packages they come from.

All rows have the same weights and the same bytes. The step's loss and its gradient, all parameters
taken together, are judged by the accuracy rule: the error against our model on the reference
backend in float64 is at most twice that of the reference backend in the row's precision, plus the
rounding of the result. bfloat16 means autocast.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import hierkernels as hk
from benchmarks.suite import BACKEND_ROWS, Candidate, Problem, Suite, Unsupported
from benchmarks.suites.native_sparse_attention import Case as LayerCase
from python_models import MEGABYTE, HierarchicalTransformer, Memformer, NSATransformer, gMLPGPT


@dataclass(frozen=True)
class Model:
    """A model of ours, the package it comes from, and its loss."""

    ours: Callable[..., nn.Module]
    package: str  # its module
    name: str  # of the class in it
    variants: tuple[dict[str, Any], ...]  # further options of the package: the quickest counts
    loss: Callable[[nn.Module, Tensor], Tensor]
    seen: float = 0.5  # share of the batched products that masks leave; triangular ones leave half


def _own_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids, return_loss=True)


def _next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(ids)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def _total_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids, return_loss=True)[0]


def _memformer_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Segments with the memory handed on; each predicts its own tokens, encoder and decoder run."""
    mems, losses = None, []
    for segment in ids.split(model.encoder.max_seq_len, dim=1):
        _, mems, loss = model(segment, segment, mems=mems)
        losses.append(loss)
    return torch.stack(losses).mean()


MODELS = {
    "megabyte": Model(
        MEGABYTE,
        "MEGABYTE_pytorch",
        "MEGABYTE",
        ({"flash_attn": False}, {"flash_attn": True}),
        _own_loss,
    ),
    "gmlp-gpt": Model(gMLPGPT, "g_mlp_gpt", "gMLPGPT", ({},), _next_token_loss),
    "hierarchical": Model(
        # What is ignored is token 0 in both; its quirks are of other lengths and options.
        HierarchicalTransformer,
        "simple_hierarchical_transformer",
        "HierarchicalTransformer",
        ({},),
        _total_loss,
        0.0,  # see HierarchicalCase
    ),
    "nsa": Model(
        NSATransformer,
        "native_sparse_attention_pytorch.transformer",
        "Transformer",
        ({},),
        _own_loss,
    ),
    "memformer": Model(
        # The original's relative positions: without masks the only quirk that matters.
        functools.partial(Memformer, upstream_quirks=True),
        "memformer",
        "Memformer",
        ({},),
        _memformer_loss,
        # Of self attention in the encoder, in the decoder, and cross attention; others are small.
        (1 + 0.5 + 1) / 3,
    ),
}


@dataclass(frozen=True)
class Case:
    """A model of one size and the bytes it reads."""

    name: str
    model: str
    length: int  # bytes of a sequence
    options: tuple[tuple[str, Any], ...]  # of the constructor of both
    batch: int = 1
    group: str = "step"
    quick: bool = True
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    sparse: tuple[tuple[str, int], ...] = ()  # sparse_attn_kwargs among the options
    # Bytes that results are judged on, at the start of the sequence; None: all. A choice of blocks
    # near a tie is made differently by two correct rows, and a long sequence has such choices.
    judged: int | None = None

    def arguments(self) -> dict[str, Any]:
        """Of the constructor of both."""
        sparse = {"sparse_attn_kwargs": dict(self.sparse)} if self.sparse else {}
        return dict(self.options) | sparse

    def build(self) -> nn.Module:
        """Our model; its weights depend on the case alone, and none is 0."""
        torch.manual_seed(0)
        model = MODELS[self.model].ours(**self.arguments())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        return model

    def ids(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(256, (self.batch, self.length), generator=generator)

    def flops(self, direction: str) -> float:
        """Of the products of a step; see Oracle."""
        return _oracle(self).flops

    def bytes(self, dtype: torch.dtype, direction: str) -> int:
        """Every parameter read in forward and backward, its gradient written."""
        return 3 * sum(p.nbytes for p in self.build().parameters())


@dataclass(frozen=True)
class Oracle:
    """A step of our model on the reference backend in float64, on the CPU."""

    loss: float
    gradient: Tensor  # of all parameters, flat
    flops: float  # of the products; batched ones count as far as masks leave them


@functools.lru_cache(maxsize=1)
def _oracle(case: Case) -> Oracle:
    inputs = Inputs(case, torch.float64, "cpu", {}, case.ids()).judged()
    with FlopCounterMode(display=False) as counter:
        loss, grads = Step(inputs, case.build().double(), "reference").run()
    counts = counter.get_flop_counts()["Global"]
    seen = MODELS[case.model].seen
    flops = sum(n * seen if op == torch.ops.aten.bmm else n for op, n in counts.items())
    return Oracle(loss.item(), _flat(grads), float(flops))


MEGABYTE_OPTIONS = (
    ("num_tokens", 257), ("pad_id", 256), ("dim", (256, 128)), ("depth", (2, 1)),
    ("max_seq_len", (1024, 8)), ("dim_head", 64), ("heads", 4), ("rel_pos", True),
)  # fmt: skip
GMLP_OPTIONS = (
    ("num_tokens", 256), ("dim", 256), ("depth", 2), ("seq_len", 2048), ("heads", 4),
)  # fmt: skip

MEMFORMER_OPTIONS = (
    ("dim", 256), ("num_memory_slots", 32), ("mem_update_attn_heads", 4),
    *((f"{side}_{name}", value) for side in ("enc", "dec") for name, value in (
        ("num_tokens", 256), ("max_seq_len", 1024), ("depth", 2), ("heads", 4),
    )),
)  # fmt: skip

NSA_OPTIONS = (
    ("num_tokens", 256), ("dim", 512), ("depth", 1), ("dim_head", 64), ("heads", 8),
    ("kv_heads", 2), ("use_sparse_attn", True),
)  # fmt: skip
NSA_SPARSE = (
    ("sliding_window_size", 64), ("compress_block_size", 16), ("compress_block_sliding_stride", 8),
    ("selection_block_size", 16), ("num_selected_blocks", 4),
)  # fmt: skip


class NsaCase(Case):
    """Its products are those of its spec: the reference computes what the masks then hide."""

    def flops(self, direction: str) -> float:
        layer = LayerCase(self.length, self.name)
        attention = layer.flops("forward") + layer.flops("backward")
        others = self.length * (2 * 512 * 2048 + 512 * 256)  # feed-forward, logits
        return attention + 3 * 2.0 * others


HIERARCHICAL_OPTIONS = (
    ("num_tokens", 256), ("dim", 256), ("depth", 2), ("seq_len", 4096), ("hierarchies", (1, 4)),
)  # fmt: skip


class HierarchicalCase(Case):
    """Its attention is counted by what windows leave: the reference computes all scores."""

    def flops(self, direction: str) -> float:
        attention = 0.0
        for h in self.build().hierarchies:
            length = (self.length - 1) // h.factor  # of each of the classes
            window = length if h.window is None else h.window
            pairs = sum(min(i, window) + 1 for i in range(length))
            attention += 4.0 * h.classes * h.heads * h.dim_head * pairs
        others = super().flops(direction) * (self.length - 1) / (self.judged - 1)
        return others + 3 * dict(self.options)["depth"] * attention


CASES = (
    Case("megabyte-8192", "megabyte", 8192, MEGABYTE_OPTIONS),
    # One byte more is only predicted.
    HierarchicalCase(
        "hierarchical-4096-w512",
        "hierarchical",
        4097,
        (*HIERARCHICAL_OPTIONS, ("window_sizes", (512, 256))),
        quick=False,  # as Memformer's: the oracle takes half a minute
        judged=1025,  # all scores in float64 would take ten gigabytes
    ),
    HierarchicalCase(
        "hierarchical-4096-w128",
        "hierarchical",
        4097,
        (*HIERARCHICAL_OPTIONS, ("window_sizes", (128, 64))),
        quick=False,
        judged=1025,
    ),
    HierarchicalCase(
        "hierarchical-4096-full",
        "hierarchical",
        4097,
        HIERARCHICAL_OPTIONS,
        quick=False,
        judged=1025,
    ),
    Case("gmlp-gpt-2048", "gmlp-gpt", 2048, GMLP_OPTIONS),
    Case(
        "gmlp-gpt-2048-w128",
        "gmlp-gpt",
        2048,
        (*GMLP_OPTIONS, ("window", 128)),
        quick=False,
    ),
    # A step of the package takes a minute and 17 GB: not in the quick set.
    *(
        NsaCase(
            "nsa-4096",
            "nsa",
            4096,
            NSA_OPTIONS,
            sparse=NSA_SPARSE,
            quick=False,
            judged=judged,
            dtypes=(dtype,),
        )
        # In bfloat16 nearly every sequence has ties between blocks that compete: it is judged as
        # far as a query selects all blocks before its own, four of 16 tokens.
        for dtype, judged in ((torch.float32, 256), (torch.bfloat16, 80))
    ),
    Case("memformer-1024", "memformer", 1024, MEMFORMER_OPTIONS, quick=False),
    Case("memformer-4x1024", "memformer", 4096, MEMFORMER_OPTIONS, quick=False),
)


@dataclass(frozen=True)
class Inputs:
    """What every row of a case shares."""

    case: Case
    dtype: torch.dtype
    device: str
    state: dict[str, Tensor]
    ids: Tensor

    def judged(self) -> Inputs:
        """The bytes that results are judged on."""
        return replace(self, ids=self.ids[:, : self.case.judged])


@dataclass(frozen=True)
class Step:
    """A model with its weights, and the way it is run."""

    inputs: Inputs
    module: nn.Module
    backend: str | None

    def context(self) -> AbstractContextManager[Any]:
        if self.inputs.dtype == torch.bfloat16:
            return torch.autocast(self.inputs.device, torch.bfloat16)
        return nullcontext()

    def run(self) -> tuple[Tensor, list[Tensor]]:
        """The loss and the gradient of every parameter; None counts as 0."""
        parameters = list(self.module.parameters())
        with hk.use_backend(self.backend):
            with self.context():
                loss = MODELS[self.inputs.case.model].loss(self.module, self.inputs.ids)
            loss.backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        self.module.zero_grad(set_to_none=True)
        return loss.detach(), grads


@dataclass(frozen=True)
class StepProblem(Problem):
    """Judges a step by the loss and by the whole gradient's error over its length."""

    inputs: Inputs
    oracle: Oracle
    allowed: dict[str, float]

    @staticmethod
    def make(inputs: Inputs) -> StepProblem:
        problem = StepProblem(inputs, _oracle(inputs.case), {})
        inputs = inputs.judged()
        eager = Step(inputs, inputs.case.build().to(inputs.device), "reference").run()
        # The loss is a mean over tokens: each rounded in the dtype, the sum and itself in float32.
        eps, accumulator = (torch.finfo(t).eps for t in (inputs.dtype, torch.float32))
        loss = abs(problem.oracle.loss)
        rounding = {
            "loss": (eps * inputs.ids.numel() ** -0.5 + 2 * accumulator) * loss,
            "gradient": eps,
        }
        problem.allowed.update(
            {name: 2 * error + rounding[name] for name, error in problem.errors(*eager).items()}
        )
        return problem

    def errors(self, loss: Tensor, grads: Sequence[Tensor]) -> dict[str, float]:
        """Of the loss; of the gradient as a whole, over its length."""
        gradient = self.oracle.gradient
        return {
            "loss": abs(loss.item() - self.oracle.loss),
            "gradient": ((_flat(grads) - gradient).norm() / gradient.norm()).item(),
        }

    def check(self, candidate: Candidate, direction: str) -> dict[str, float]:
        step = candidate.inputs
        errors = self.errors(*replace(step, inputs=step.inputs.judged()).run())
        failures = [
            f"{name}: error {error:.3g}, allowed {self.allowed[name]:.3g}"
            for name, error in errors.items()
            if not error <= self.allowed[name]
        ]
        if failures:
            raise AssertionError("; ".join(failures))
        return errors

    def bind(self, candidate: Candidate, direction: str) -> Callable[[], Sequence[Tensor]]:
        def step() -> Sequence[Tensor]:
            loss, grads = candidate.inputs.run()
            return (loss, *grads)

        return step


def _flat(grads: Sequence[Tensor]) -> Tensor:
    return torch.cat([g.flatten().double().cpu() for g in grads])


class TrainingStepSuite(Suite):
    """Each model against the package it comes from, with the same weights."""

    name = "training_step"
    peers: ClassVar = {"eager": "the same model, reference backend", "package": "original package"}
    yardstick = "package"
    cases = CASES
    directions = ("step",)

    def rows(self, case: Case, device: str, full: bool) -> list[str]:
        # An eager step takes a second; with (N, N) masks and scores of many heads, half a minute.
        with_eager = full and case.model not in ("hierarchical", "nsa")
        peers = [row for row in self.peers if with_eager or row != "eager"]
        return [*BACKEND_ROWS[device], *peers]

    def shape(self, case: Case) -> list[int]:
        return [case.batch, case.length]

    def inputs(self, case: Case, dtype: torch.dtype, device: str) -> Inputs:
        return Inputs(case, dtype, device, case.build().state_dict(), case.ids().to(device))

    def problem(self, case: Case, dtype: torch.dtype, device: str) -> StepProblem:
        return StepProblem.make(self.inputs(case, dtype, device))

    def candidates(self, row: str, inputs: Inputs, direction: str) -> Iterator[Candidate]:
        model = MODELS[inputs.case.model]
        if row == "package":
            try:
                build = getattr(importlib.import_module(model.package), model.name)
            except ImportError as error:
                raise Unsupported(f"install requirements-peers.txt: {error}") from error
            for variant in model.variants:
                label = ", ".join(f"{name}={value}" for name, value in variant.items())
                yield self._candidate(functools.partial(build, **variant), inputs, None, label)
        else:
            backend = "reference" if row == "eager" else row
            yield self._candidate(model.ours, inputs, backend, "")

    def _candidate(
        self, build: Callable[..., nn.Module], inputs: Inputs, backend: str | None, label: str
    ) -> Candidate:
        module = build(**inputs.case.arguments())
        module.load_state_dict(inputs.state)
        step = Step(inputs, module.to(inputs.device), backend)
        return Candidate(lambda step: step.run()[0], step, label)


SUITE = TrainingStepSuite()
