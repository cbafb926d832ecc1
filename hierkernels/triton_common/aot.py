"""Compiles planned launches for GPUs that are not there and reports what they use.

An operator's aot.py names its cases and plans them from tensors without memory, so what is compiled
is what a user's call would launch: the same tiles, specialised on the same strides. A kernel fails
if it spills more than the operator allows, exceeds the shared or tensor memory, has its tensor-core
instructions serialised, or multiplies 16-bit tiles without tensor cores.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any, Protocol

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from hierkernels.triton_common.device import MULTIPROCESSORS, SHARED_MEMORY, device_family
from hierkernels.triton_common.launch import OPTIONS, Launch, Target
from hierkernels.triton_common.resources import (
    BOUNDED,
    accesses,
    products_of_32_bits,
    programs_that_fit,
    tensor_share,
)

ARCHITECTURES = (80, 90, 100)
OTHERS = (86, 89, 120)  # which take the row of sm_86
_TENSOR_MEMORY = 512  # columns


class AnyCase(Protocol):
    """What is read of an operator's cases."""

    @property
    def name(self) -> str: ...
    @property
    def channels(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def quick(self) -> bool: ...  # part of the set for continuous integration


@dataclass(frozen=True)
class Report:
    """What one compiled kernel uses; `problem` is empty if that is within the limits."""

    case: str
    channels: int
    arch: int
    kernel: str
    tile: str
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    programs: int  # that a multiprocessor holds at once
    products: str
    tensor_share: float | None  # resources.tensor_share
    narrow: int  # loads and stores of less than 4 bytes
    seconds: float
    problem: str

    def __str__(self) -> str:
        share = "    " if self.tensor_share is None else f"{self.tensor_share:4.0%}"
        narrow = f" {self.narrow} narrow" if self.narrow else ""
        return (
            f"sm_{self.arch:<4d}{self.case:14s}D{self.channels:<4d}{self.kernel:15s}{self.tile:22s}"
            f"{self.registers:4d} registers {self.spill_stores:4d}/{self.spill_loads:<4d} B spill "
            f"{self.shared / 1024:6.1f} KiB {self.programs:2d} a SM  {self.products:14s}{share}"
            f"{self.seconds:5.1f} s  {self.problem or 'ok'}{narrow}"
        )


def family_of(arch: int) -> str:
    """The family of configurations of an architecture: 89 -> sm_86."""
    return device_family(divmod(arch, 10))


def target_for(case: AnyCase, family: str) -> Target:
    """What a case is planned for on devices of a family."""
    precision = "ieee" if case.dtype == "float32" else "tf32"
    return Target(family, precision, multiprocessors=MULTIPROCESSORS[family])


def new_tensor(device: str, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """An argument of a case: without memory on "meta", else random, or True."""
    if device == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    if dtype.is_floating_point:
        return torch.randn(shape, device=device).to(dtype)
    return torch.ones(shape, dtype=dtype, device=device)


def _describe(launch: Launch) -> tuple[dict, dict, dict]:
    """(signature, constants, attributes) of ASTSource, specialised as the launcher would."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    types = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    types |= {torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64"}

    def leaf(path: tuple[int, ...], value: Any, special: bool) -> Any:
        if isinstance(value, tuple):
            return tuple(leaf((*path, i), x, special) for i, x in enumerate(value))
        if value is None or (special and isinstance(value, int) and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return f"*{types[value.dtype]}"
        if isinstance(value, float):
            return "fp32"
        if special and value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        path = (parameter.num,)
        if parameter.is_constexpr:
            constants[path] = value
            signature[parameter.name] = "constexpr"
        else:
            special = not parameter.do_not_specialize
            signature[parameter.name] = leaf(path, value, special)
    return signature, constants, attributes


def _assemble(ptx: str, arch: int) -> str:
    """What ptxas says about registers, spills and serialised instructions."""
    name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={name}", file.name, "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stderr


def compile_launch(case: AnyCase, arch: int, launch: Launch, spill_limit: float) -> Report:
    """Compiles one launch of a case and judges it; spill_limit: bytes of spill stores allowed."""
    arguments = launch.arguments
    options = {name: arguments[name] for name in OPTIONS if name in arguments}
    start = time.perf_counter()
    source = ASTSource(launch.kernel, *_describe(launch))
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    log = _assemble(ptx, arch)
    seconds = time.perf_counter() - start

    def number(pattern: str) -> int:
        found = re.search(pattern, log)
        assert found is not None, f"ptxas did not report {pattern!r}"
        return int(found[1])

    kinds = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")
    counts = {kind: len(re.findall(rf"\b{re.escape(kind)}", ptx)) for kind in kinds}
    multiplies = "tt.dot" in compiled.asm["ttir"]
    plain = "fma" if multiplies else "none"
    products = next((f"{kind.split('.')[0]} {n}" for kind, n in counts.items() if n), plain)
    if "cp.async.bulk.tensor" in ptx:
        products += " tma"
    registers = number(r"Used (\d+) registers")
    spills = number(r"(\d+) bytes spill stores")
    shared = compiled.metadata.shared
    limit = SHARED_MEMORY[family_of(arch)]
    problems = []
    if spills > spill_limit:
        problems.append("spills")
    if shared > limit:
        problems.append(f"shared memory over {limit}")
    if getattr(compiled.metadata, "tmem_size", 0) > _TENSOR_MEMORY:
        problems.append(f"tensor memory over {_TENSOR_MEMORY}")
    wrapping = products_of_32_bits(compiled.asm["ttir"])
    if wrapping := wrapping - BOUNDED.get(launch.kernel.__name__, {}).keys():
        problems.append("32-bit products in addresses: " + " ".join(sorted(wrapping)))
    if "serializ" in log:
        problems.append("serialised")
    if case.dtype != "float32" and products.startswith("fma"):
        problems.append("no tensor cores")
    blocks = [arguments[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_C") if name in arguments]
    tile = "x".join(map(str, blocks[:2])) + f" w{options['num_warps']}s{options['num_stages']}"
    tile += f" {arguments.get('LOOP', '')}"
    name = launch.kernel.__name__.removesuffix("_kernel")
    name = re.sub(
        "^_(attention|causal_sgu|selected_attention|select_blocks|native_sparse_attention|rms_norm"
        "|gelu)_",
        "",
        name,
    )
    return Report(
        case.name, case.channels, arch, name, tile, registers, spills,
        number(r"(\d+) bytes spill loads"), shared,
        programs_that_fit(arch, registers, shared, options["num_warps"]), products,
        tensor_share(compiled.asm["cubin"], arch), accesses(ptx).narrow, round(seconds, 1),
        ", ".join(problems),
    )  # fmt: skip


def _compile_index(module: str, case: int, arch: int, index: int) -> Report:
    """In a worker process: kernels and tensors do not travel, so the plan is made again."""
    op = importlib.import_module(module)
    launch = op.plan(op.CASES[case], target_for(op.CASES[case], family_of(arch)))[index]
    return compile_launch(op.CASES[case], arch, launch, op.spill_limit(op.CASES[case]))


def compile_all(
    cases: dict[str, list[int]], archs: list[int], jobs: int
) -> Iterator[tuple[str, Report]]:
    """The module and every launch of the given CASES of modules, for every architecture."""
    work = []
    for module, indices in cases.items():
        op = importlib.import_module(module)
        for arch in archs:
            for c in indices:
                launches = op.plan(op.CASES[c], target_for(op.CASES[c], family_of(arch)))
                work += [(module, c, arch, i) for i in range(len(launches))]
    if not work:
        return
    # At most `jobs` processes at a time, for all modules: each has PyTorch and Triton to import.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        modules = [item[0] for item in work]
        yield from zip(modules, pool.map(_compile_index, *zip(*work, strict=True)), strict=True)


def op_of(module: str) -> str:
    """attention for hierkernels.ops.attention.aot."""
    return module.split(".")[-2]


def summary(reports: dict[str, list[Report]]) -> Iterator[str]:
    """The lines of a table: for each operator the kernels compiled, and the most that one takes."""
    yield f"{'operator':26s}kernels  problems  registers  B spilled  shared KiB  seconds"
    for op, of_op in reports.items():
        numbers = [
            sum(bool(r.problem) for r in of_op), max(r.registers for r in of_op),
            max(r.spill_stores for r in of_op),
        ]  # fmt: skip
        shared, seconds = max(r.shared for r in of_op) / 1024, sum(r.seconds for r in of_op)
        columns = "".join(f"{n:{width}d}" for n, width in zip(numbers, (10, 11, 11), strict=True))
        yield f"{op:26s}{len(of_op):7d}{columns}{shared:12.1f}{seconds:9.1f}"


def main(modules: Sequence[str], description: str | None) -> int:
    """The command of operators' aot modules, which have CASES, plan and spill_limit.

    Exit status 1 if any kernel fails. --json writes the reports as a list for each operator.
    """
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="every case, not only the quick set")
    parser.add_argument("--case", nargs="*", help="only cases of these names")
    parser.add_argument("--arch", nargs="*", type=int, default=ARCHITECTURES,
                        choices=(*ARCHITECTURES, *OTHERS))  # fmt: skip
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", help="also write the reports to this file")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("interpreted kernels cannot be compiled: unset TRITON_INTERPRET")
    cases = {
        module: [
            i for i, c in enumerate(importlib.import_module(module).CASES)
            if (c.name in arguments.case if arguments.case else arguments.full or c.quick)
        ]
        for module in modules
    }  # fmt: skip
    if not any(cases.values()):
        known = sorted({c.name for m in modules for c in importlib.import_module(m).CASES})
        parser.error(f"no case has these names: {arguments.case}; there are {', '.join(known)}")
    reports: dict[str, list[Report]] = {}
    for module, report in compile_all(cases, list(arguments.arch), arguments.jobs):
        op = op_of(module)
        if op not in reports:
            print(op)
        print(report, flush=True)
        reports.setdefault(op, []).append(report)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({op: [asdict(r) for r in of] for op, of in reports.items()}, file, indent=1)
    print("", *summary(reports), sep="\n")
    bad = sum(bool(report.problem) for of_op in reports.values() for report in of_op)
    total = sum(map(len, reports.values()))
    print(f"{total} kernels, {bad} with problems (Triton {triton.__version__})")
    return 1 if bad else 0
