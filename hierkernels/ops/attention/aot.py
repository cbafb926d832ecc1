"""Compiles the attention kernels for GPUs that are not there and reports what they use.

    python -m hierkernels.ops.attention.aot [--full] [--arch 80 90 100] [--jobs 2] [--json FILE]

Each case is planned by triton_launch.py from tensors without memory, so what is compiled is what a
user's call would launch: tiles from triton_configs.py, specialised on the same strides. A kernel
fails if it spills registers (_spill_limit), exceeds the shared or tensor memory, or has its
tensor-core instructions serialised. Exit status 1 if any does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from hierkernels.ops.attention.api import make_call
from hierkernels.ops.attention.call import AttentionCall
from hierkernels.ops.attention.triton_configs import SHARED_MEMORY
from hierkernels.ops.attention.triton_launch import Launch, Target, plan_backward, plan_forward
from hierkernels.ops.local_attention import api as local_attention

ARCHITECTURES = (80, 90, 100)
_TENSOR_MEMORY = 512  # columns


@dataclass(frozen=True)
class Case:
    """A call to compile: shapes, dtype and options of hk.attention."""

    name: str
    channels: int
    dtype: str = "bfloat16"
    heads: int = 4
    kv_heads: int = 4
    queries: int = 2048
    options: str = ""  # names that _make_call knows, separated by blanks
    quick: bool = False  # part of the set for continuous integration


CASES = (
    Case("causal", 64, quick=True),
    Case("causal", 128, quick=True),
    Case("causal", 256, quick=True),
    Case("bias", 64, options="bias", quick=True),
    Case("packed", 64, kv_heads=1, queries=32, quick=True),
    Case("short", 64, queries=9, options="full", quick=True),
    Case("short", 128, queries=9, options="full"),
    Case("short-grouped", 64, kv_heads=1, queries=9, options="full"),
    Case("grouped", 128, kv_heads=1),
    Case("packed", 128, kv_heads=1, queries=32),
    Case("decode", 128, kv_heads=1, queries=1),
    Case("decode", 256, kv_heads=1, queries=1),
    Case("cross", 64, queries=64),
    Case("cross", 128, queries=64),
    Case("cross", 256, queries=64),
    Case("window", 64, options="window"),
    Case("odd", 80),
    Case("bias", 128, options="bias"),
    Case("bias", 256, options="bias"),
    Case("shared-bias", 64, options="shared_bias"),
    Case("shared-bias", 128, options="shared_bias"),
    Case("shared-bias", 256, options="shared_bias"),
    Case("slot-bias", 64, options="slot_bias", quick=True),
    Case("slot-bias", 128, options="slot_bias"),
    Case("slot-bias", 256, options="slot_bias"),
    Case("key-bias", 128, options="key_bias"),
    Case("mask", 128, options="mask"),
    Case("padding", 128, options="padding"),
    Case("softcap", 128, options="softcap"),
    Case("dropout", 64, options="dropout"),
    Case("dropout", 128, options="dropout"),
    Case("everything", 128, options="shared_bias mask padding softcap dropout lse"),
    Case("float16", 128, dtype="float16"),
    Case("float32", 64, dtype="float32"),
    Case("float32", 128, dtype="float32"),
    Case("float32", 256, dtype="float32"),
)


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
    products: str
    seconds: float
    problem: str

    def __str__(self) -> str:
        return (
            f"sm_{self.arch:<4d}{self.case:14s}D{self.channels:<4d}{self.kernel:15s}{self.tile:22s}"
            f"{self.registers:4d} registers {self.spill_stores:4d}/{self.spill_loads:<4d} B spill "
            f"{self.shared / 1024:6.1f} KiB  {self.products:12s}{self.seconds:5.1f} s  "
            f"{self.problem or 'ok'}"
        )


# ---- planning ----


def _spill_limit(case: Case) -> float:
    """Bytes of spill stores that a case may have."""
    if case.dtype == "float32":
        return float("inf")  # without tensor cores, arithmetic is what takes the time
    if case.channels > 128 or case.name == "everything":
        return 64  # accumulators take half of the registers; some pointers may wait in memory
    return 0


def _make_call(case: Case) -> AttentionCall:
    elements: torch.dtype = getattr(torch, case.dtype)

    def empty(*shape: int, dtype: torch.dtype = elements) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    B, H, N, D = 2, case.heads, case.queries, case.channels
    n_keys = N if case.queries in (9, 2048) else 2048
    options: dict[str, dict[str, Any]] = {
        "full": {"is_causal": False},
        "window": {"window_size": (256, 0)},
        "bias": {"attn_bias": empty(B, H, N, n_keys)},
        "shared_bias": {"attn_bias": empty(H, N, n_keys)},
        "key_bias": {"attn_bias": empty(B, 1, 1, n_keys)},
        "mask": {"attn_mask": empty(N, n_keys, dtype=torch.bool)},
        "padding": {"key_padding_mask": empty(B, n_keys, dtype=torch.bool)},
        "softcap": {"softcap": 30.0},
        "dropout": {"dropout_p": 0.1, "dropout_seed": 1},
        "slot_bias": {"attn_bias": empty(H, 128, 256)},  # of local attention
        "lse": {},
    }
    arguments: dict[str, Any] = {"is_causal": True}
    for name in case.options.split():
        arguments |= options[name]
    q, k, v = empty(B, H, N, D), *(empty(B, case.kv_heads, n_keys, D) for _ in "kv")
    if "slot_bias" in case.options.split():
        return local_attention.make_call(q, k, v, 128, **arguments).attention
    return make_call(q, k, v, **arguments)


def plan(case: Case, arch: int) -> list[Launch]:
    """The launches of a case: forward, then backward with the gradient of a bias."""
    call = _make_call(case)
    target = Target(f"sm_{arch}", "ieee" if call.q.dtype == torch.float32 else "tf32")
    out, lse = call.new_outputs()
    dlse = lse if "lse" in case.options.split() else None
    launches, _ = plan_backward(call, target, out, lse, out, dlse, call.new_gradients(), call.bias)
    return plan_forward(call, target, out, lse) + launches


# ---- compiling ----


def _describe(launch: Launch) -> tuple[dict, dict, dict]:
    """(signature, constants, attributes) of ASTSource, specialised as the launcher would."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    types = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    types |= {torch.uint8: "u8", torch.int64: "i64"}

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


def compile_launch(case: Case, arch: int, launch: Launch) -> Report:
    """Compiles one launch of a case and judges it."""
    arguments = launch.arguments
    options = {name: arguments[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
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
    products = next((f"{kind.split('.')[0]} {n}" for kind, n in counts.items() if n), "fma")
    spills = number(r"(\d+) bytes spill stores")
    shared, limit = compiled.metadata.shared, SHARED_MEMORY[f"sm_{arch}"]
    half = arguments["q_ptr"].element_size() == 2
    problems = []
    if spills > _spill_limit(case):
        problems.append("spills")
    if shared > limit:
        problems.append(f"shared memory over {limit}")
    if getattr(compiled.metadata, "tmem_size", 0) > _TENSOR_MEMORY:
        problems.append(f"tensor memory over {_TENSOR_MEMORY}")
    if "serializ" in log:
        problems.append("serialised")
    if half and products == "fma":
        problems.append("no tensor cores")
    tile = f"{arguments['BLOCK_M']}x{arguments['BLOCK_N']} w{options['num_warps']}"
    tile += f"s{options['num_stages']} {arguments.get('LOOP', '')}"
    name = launch.kernel.__name__.removeprefix("_attention_").removesuffix("_kernel")
    return Report(
        case.name, case.channels, arch, name, tile, number(r"Used (\d+) registers"), spills,
        number(r"(\d+) bytes spill loads"), shared, products, round(seconds, 1),
        ", ".join(problems),
    )  # fmt: skip


def _compile_index(case: Case, arch: int, index: int) -> Report:
    """In a worker process: kernels and tensors do not travel, so the plan is made again."""
    return compile_launch(case, arch, plan(case, arch)[index])


def compile_all(cases: list[Case], archs: list[int], jobs: int) -> Iterator[Report]:
    """Every launch of every case for every architecture, in order, `jobs` at a time."""
    work = [(c, a, i) for a in archs for c in cases for i in range(len(plan(c, a)))]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_compile_index, *zip(*work, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="every case, not only the quick set")
    parser.add_argument("--case", nargs="*", help="only cases of these names")
    parser.add_argument("--arch", nargs="*", type=int, default=ARCHITECTURES)
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", help="also write the reports to this file")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("interpreted kernels cannot be compiled: unset TRITON_INTERPRET")
    cases = [
        c for c in CASES
        if (c.name in arguments.case if arguments.case else arguments.full or c.quick)
    ]  # fmt: skip
    reports = []
    for report in compile_all(cases, list(arguments.arch), arguments.jobs):
        print(report, flush=True)
        reports.append(report)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump([asdict(report) for report in reports], file, indent=1)
    bad = sum(bool(report.problem) for report in reports)
    print(f"{len(reports)} kernels, {bad} with problems (Triton {triton.__version__})")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
