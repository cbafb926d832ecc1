"""The search behind `python -m hierkernels.tune`: candidates, what of them fits a device, timing.

An operator's aot.py says what is tuned: TUNING, calls of real size, and SPACES, the configurations
to try for each kernel. A task is a kernel and a bucket of shapes, with the call that stands for it.
Candidates are compiled ahead of time first: those that spill, exceed the shared memory or have
their tensor-core instructions serialised are never timed.
"""

from __future__ import annotations

import importlib
import itertools
import math
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch

from hierkernels.triton_common import configs
from hierkernels.triton_common.aot import Report, compile_launch, target_for
from hierkernels.triton_common.configs import Config
from hierkernels.triton_common.launch import Launch, Target

MODULES = tuple(
    f"hierkernels.ops.{op}.aot"
    for op in ("attention", "selected_attention", "select_blocks", "causal_sgu")
)
# Elements of a tile that a thread holds: fewer leave it idle, more do not fit its registers.
_FEWEST, _MOST = 4, 128
_FLUSHED = 256 * 2**20  # bytes, several times the largest L2 cache


@dataclass(frozen=True)
class Space:
    """The values of each field of Config to combine."""

    block_m: tuple[int, ...]
    block_n: tuple[int, ...]
    num_warps: tuple[int, ...] = (4, 8)
    num_stages: tuple[int, ...] = (1, 2, 3, 4)
    loop: tuple[str, ...] = ("always",)
    block_k: tuple[int, ...] = (0,)
    descriptors: tuple[bool, ...] = (False,)

    def candidates(self) -> Iterator[Config]:
        """Every combination whose tile has a sensible number of elements for each thread."""
        every = itertools.product(
            self.block_m, self.block_n, self.num_warps, self.num_stages, self.loop, self.block_k,
            self.descriptors,
        )  # fmt: skip
        for config in itertools.starmap(Config, every):
            elements = config.block_m * config.block_n // (32 * config.num_warps)
            if _FEWEST <= elements <= _MOST:
                yield config


@dataclass(frozen=True)
class Task:
    """A kernel and a bucket of shapes; the call is TUNING[index] of a module."""

    kernel: str
    bucket: str
    module: str
    index: int
    heuristic: Config

    @property
    def case(self) -> Any:
        return importlib.import_module(self.module).TUNING[self.index]

    def __str__(self) -> str:
        return f"{self.kernel}, {self.bucket} (as {self.case.name})"


def _plan(task: Task, config: Config, target: Target, device: str) -> tuple[list[Launch], Launch]:
    """(the launches of the task's call up to that of its kernel, the last of these)."""
    with configs.trying(task.kernel, config):
        launches = importlib.import_module(task.module).plan(task.case, target, device)
    at = next(i for i, launch in enumerate(launches) if launch.name == task.kernel)
    return launches[: at + 1], launches[at]


def tasks(family: str, kernels: list[str] | None, cases: list[str] | None) -> list[Task]:
    """What is tuned for devices of a family: one task for each kernel and bucket."""
    found: dict[tuple[str, str], Task] = {}
    for module in MODULES:
        op = importlib.import_module(module)
        for index, case in enumerate(op.TUNING):
            if cases and case.name not in cases:
                continue
            with configs.watching() as seen:
                launched = {x.name for x in op.plan(case, target_for(case, family), "meta")}
            for kernel, (bucket, heuristic) in seen.items():
                wanted = not kernels or kernel in kernels
                if wanted and kernel in launched & op.SPACES.keys():
                    task = Task(kernel, bucket, module, index, heuristic)
                    found.setdefault((kernel, bucket), task)
    return list(found.values())


def _distance(a: Config, b: Config) -> float:
    """Doublings between two configurations; another loop or way of fetching counts as one."""
    steps = 0.0
    for name in ("block_m", "block_n", "block_k", "num_warps", "num_stages"):
        x, y = getattr(a, name), getattr(b, name)
        steps += abs(math.log2(max(x, 1)) - math.log2(max(y, 1)))
    return steps + (a.loop != b.loop) + (a.descriptors != b.descriptors)


def candidates(task: Task, family: str, limit: int) -> list[Config]:
    """The heuristic's configuration, then those next to it, `limit` at most.

    Each leads to another launch.
    """
    space: Space = importlib.import_module(task.module).SPACES[task.kernel]
    target = target_for(task.case, family)
    names = (
        "BLOCK_M", "BLOCK_N", "BLOCK_C", "BLOCK_K", "LOOP", "num_warps", "num_stages",
        "DESCRIPTORS",
    )  # fmt: skip
    kept: list[Config] = []
    seen: set[tuple[Any, ...]] = set()
    others = sorted(space.candidates(), key=lambda config: _distance(config, task.heuristic))
    for config in (task.heuristic, *others):
        arguments = _plan(task, config, target, "meta")[1].arguments
        key = tuple(arguments.get(name) for name in names)
        if key not in seen:
            seen.add(key)
            kept.append(config)
        if len(kept) == limit:
            break
    return kept


def _compile(task: Task, config: Config, family: str) -> Report:
    """In a worker process: kernels and tensors do not travel, so the plan is made again."""
    op, case = importlib.import_module(task.module), task.case
    launch = _plan(task, config, target_for(case, family), "meta")[1]
    return compile_launch(case, int(family.removeprefix("sm_")), launch, op.spill_limit(case))


def compiled(
    task: Task, tried: list[Config], family: str, jobs: int
) -> Iterator[tuple[Config, Report]]:
    """What each configuration takes of the device; report.problem is empty if it fits."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        n = len(tried)
        yield from zip(tried, pool.map(_compile, [task] * n, tried, [family] * n), strict=True)


def microseconds(task: Task, config: Config, family: str, device: str, repeats: int = 25) -> float:
    """The median time of one launch, the L2 cache flushed before each."""
    launches, launch = _plan(task, config, target_for(task.case, family), device)
    for each in launches:  # what the kernel reads is filled by those before it
        each.run()
    flush = torch.empty(_FLUSHED, dtype=torch.int8, device=device)
    launch.run()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch.run()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times)
