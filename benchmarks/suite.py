"""What the benchmark of an op is made of. A suite is one file: benchmarks/suites/<name>.py.

It defines SUITE, an instance of Suite, and nothing else has to know it: test_suites.py, compare.py
and report.py find the suites by their files. A suite says which cases there are (from the op's
spec.py), how inputs are made, what results are judged by, and how each row computes a case.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch

from benchmarks import suites

BACKEND_ROWS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


class Unsupported(Exception):
    """The row cannot compute the case; the message says why."""


class Case(Protocol):
    """A named problem of a spec."""

    name: str
    group: str  # heading of the report
    quick: bool  # in the quick set
    dtypes: tuple[torch.dtype, ...]

    def flops(self, direction: str) -> float: ...

    def bytes(self, dtype: torch.dtype, direction: str) -> float: ...


class Inputs(Protocol):
    """The tensors of a case."""

    dout: torch.Tensor  # the gradient that backward starts from

    def differentiable(self) -> dict[str, torch.Tensor]: ...

    def requires_grad(self) -> Inputs: ...


@dataclass(frozen=True)
class Candidate:
    """One way to compute a row: the function, the inputs in the layout it wants, and its name.

    A row may have several candidates (memory layouts, kernels of one library): the quickest counts.
    """

    function: Callable[[Any], torch.Tensor]  # inputs -> out
    inputs: Any
    label: str = ""


class Standard(Protocol):
    """Judges results by name: the largest error of each; AssertionError if one is too large."""

    def check(self, results: Mapping[str, torch.Tensor]) -> Mapping[str, Any]: ...


class Problem(ABC):
    """The inputs of a case and dtype, and what results are judged by."""

    inputs: Any

    @abstractmethod
    def check(self, candidate: Candidate, direction: str) -> dict[str, float]:
        """The largest error of each result. Raises AssertionError if one is too large."""

    @abstractmethod
    def bind(self, candidate: Candidate, direction: str) -> Callable[[], Sequence[torch.Tensor]]:
        """The call that is timed; it returns its outputs."""


@dataclass(frozen=True)
class OpProblem(Problem):
    """A differentiable op: forward without a graph, backward on a graph that is kept.

    The oracle of a large case looks at a part of it only, some tokens or some channels: the check
    runs the row on the full-size problem with dout zero elsewhere. So the results in `dims` (out,
    dq, ...; the value is the dimension of those tokens or channels) are compared at the judged
    places, and the others everywhere.
    """

    inputs: Inputs
    standard: Standard
    dims: Mapping[str, int]
    judged: slice | torch.Tensor = field(default_factory=lambda: slice(None))

    def place(self, dim: int) -> tuple[Any, ...]:
        """The index of what is judged."""
        return (*(slice(None),) * dim, self.judged)

    def cut(self, name: str, t: torch.Tensor) -> torch.Tensor:
        """The part of a result that the standard has."""
        dim = self.dims.get(name)
        return t if dim is None or t.shape[dim] == 1 else t[self.place(dim)]  # size 1: broadcast

    def check(self, candidate: Candidate, direction: str) -> dict[str, float]:
        if direction == "forward":
            with torch.no_grad():
                results = {"out": candidate.function(candidate.inputs)}
        else:
            whole, place = candidate.inputs.dout, self.place(self.dims["out"])
            dout = torch.zeros_like(whole)
            dout[place] = whole[place]
            inputs = replace(candidate.inputs, dout=dout).requires_grad()
            results = differentiate(inputs, candidate.function(inputs))
        parts = {name: self.cut(name, t) for name, t in results.items()}
        return {name: error.largest for name, error in self.standard.check(parts).items()}

    def bind(self, candidate: Candidate, direction: str) -> Callable[[], Sequence[torch.Tensor]]:
        return bind(candidate, direction)


def bind(candidate: Candidate, direction: str) -> Callable[[], Sequence[torch.Tensor]]:
    """The call of a differentiable op that is timed: forward, or backward on a graph of its own."""
    if direction == "forward":

        def forward() -> Sequence[torch.Tensor]:
            with torch.no_grad():
                return (candidate.function(candidate.inputs),)

        return forward
    inputs = candidate.inputs.requires_grad()
    out = candidate.function(inputs)
    wanted = list(inputs.differentiable().values())

    def backward() -> Sequence[torch.Tensor]:
        return torch.autograd.grad(out, wanted, inputs.dout, retain_graph=True)

    return backward


def differentiate(inputs: Inputs, out: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of sum(out dout), by name."""
    wanted = inputs.differentiable()
    grads = torch.autograd.grad(out, list(wanted.values()), inputs.dout)
    return dict(zip(wanted, grads, strict=True))


@dataclass(frozen=True)
class Sweep:
    """Cases that differ in one size: a plot of time and memory against it."""

    name: str
    title: str
    axis: str  # of the plot: "N"
    sizes: Mapping[str, int]  # by the name of the case


@dataclass(frozen=True)
class MemorySweep:
    """Peak memory of a forward and backward against length, each in a fresh process, float32."""

    title: str  # of what
    case: Callable[[int], Case]  # of a length
    rows: tuple[str, ...]
    lengths: tuple[int, ...]
    quick_lengths: tuple[int, ...]
    needs: Callable[[str, int], float]  # row, length -> bytes; a row that needs more is skipped


class Suite(ABC):
    """The benchmark of one op."""

    name: ClassVar[str]  # first part of group and test names
    cases: ClassVar[Sequence[Any]]  # each a Case
    peers: ClassVar[Mapping[str, str]]  # the rows besides the backends, and their names in plots
    yardstick: ClassVar[str]  # the peer in the chart of the roof's shares
    charted: ClassVar[tuple[str, ...]] = ()  # the case groups of that chart; none: all
    directions: ClassVar[tuple[str, ...]] = ("forward", "backward")
    sweeps: ClassVar[Sequence[Sweep]] = ()
    memory: ClassVar[MemorySweep | None] = None

    @abstractmethod
    def inputs(self, case: Any, dtype: torch.dtype, device: str) -> Any:
        """The inputs of a case."""

    @abstractmethod
    def problem(self, case: Any, dtype: torch.dtype, device: str) -> Problem:
        """The inputs of a case with their standard."""

    @abstractmethod
    def candidates(self, row: str, inputs: Any, direction: str) -> Iterator[Candidate]:
        """The ways to compute a row. Raises Unsupported."""

    def quick_dtypes(self, case: Any) -> Sequence[torch.dtype]:
        """The types of a case in the quick set."""
        return case.dtypes if case.quick else ()

    def rows(self, case: Any, device: str, full: bool) -> list[str]:
        """The rows of a case, in the quick or the full set."""
        return [*BACKEND_ROWS[device], *self.peers]

    @abstractmethod
    def shape(self, case: Any) -> list[int]:
        """The sizes of a case; results/README.md says which."""

    def __str__(self) -> str:
        return self.name


def names() -> list[str]:
    """The suites that there are."""
    return sorted(module.name for module in pkgutil.iter_modules(suites.__path__))


@functools.cache
def load(name: str) -> Suite:
    """A suite by its name. Raises ModuleNotFoundError."""
    return importlib.import_module(f"benchmarks.suites.{name}").SUITE
