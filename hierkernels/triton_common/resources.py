"""What a compiled kernel means for a multiprocessor: programs that fit, tensor cores, narrow loads.

And a question to its addresses: which of their factors are multiplied in 32 bits.

Estimates from the code alone, to compare tiles with one another before anything can be timed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass

import triton

# By architecture: bytes of shared memory of a multiprocessor, warps, programs (CUDA C++ programming
# guide, table of compute capabilities). A program takes 1 KiB besides its own.
_LIMITS = {
    80: (164 * 1024, 64, 32),
    86: (100 * 1024, 48, 16),
    89: (100 * 1024, 48, 24),
    90: (228 * 1024, 64, 32),
    100: (228 * 1024, 64, 32),
    120: (100 * 1024, 48, 24),
}
_REGISTERS = 64 * 1024
_RESERVED = 1024
# Multiply-adds of 16-bit numbers that one of the four schedulers' tensor cores does in a cycle.
_RATE = {80: 256, 86: 128, 89: 128, 90: 512, 120: 128}


def programs_that_fit(arch: int, registers: int, shared: int, warps: int) -> int:
    """Programs that a multiprocessor holds at once."""
    memory, most_warps, most = _LIMITS[arch]
    of_warp = -(-registers * 32 // 256) * 256
    return min(
        _REGISTERS // (of_warp * warps), memory // (shared + _RESERVED), most_warps // warps, most
    )


@dataclass(frozen=True)
class Accesses:
    """Instructions that load or store global memory, by bytes of a thread: {2: 64, 16: 4}."""

    loads: dict[int, int]
    copies: dict[int, int]  # to shared memory, asynchronously
    stores: dict[int, int]

    @property
    def narrow(self) -> int:
        """Those of less than 4 bytes, which no asynchronous copy can do."""
        kinds = (self.loads, self.stores)
        return sum(n for kind in kinds for size, n in kind.items() if size < 4)


def accesses(ptx: str) -> Accesses:
    """The accesses in a kernel's PTX."""
    found: dict[str, dict[int, int]] = {"ld": {}, "st": {}, "cp": {}}
    for kind, vector, bits in re.findall(
        r"\b(ld|st)\.global(?:\.(?!v\d|[bfus]\d)[\w:]+)*(?:\.v(\d))?\.[bfus](\d+)\b", ptx
    ):
        size = int(vector or 1) * int(bits) // 8
        found[kind][size] = found[kind].get(size, 0) + 1
    for size in re.findall(
        r"cp\.async\.c[ag]\.shared\.global\S* \[[^]]*\], *\[[^]]*\], *(\w+)", ptx
    ):
        n = int(size, 0)
        found["cp"][n] = found["cp"].get(n, 0) + 1
    return Accesses(found["ld"], found["cp"], found["st"])


def _loops(sass: list[str]) -> list[str]:
    """The instructions between a label and a jump back to it."""
    labels: dict[str, int] = {}
    inside = [False] * len(sass)
    for n, line in enumerate(sass):
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = n
        elif (jump := re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)) and jump[1] in labels:
            inside[labels[jump[1]] : n + 1] = [True] * (n + 1 - labels[jump[1]])
    return [line for line, within in zip(sass, inside, strict=True) if within]


def tensor_share(cubin: bytes, arch: int) -> float | None:
    """Cycles of tensor cores over these and one for every other instruction, within loops.

    What a scheduler would reach if nothing overlapped and no load was waited for. None where there
    is no loop with products, or where another unit issues them (sm_100).
    """
    if arch not in _RATE:
        return None
    tool = triton.knobs.nvidia.nvdisasm.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True)
    tensor, others = 0.0, 0
    for line in _loops(done.stdout.splitlines()):
        if shape := re.search(r"\bHGMMA\.64x(\d+)x16", line):
            tensor += 16 * int(shape[1]) * 16 / _RATE[arch]  # a warp has 16 of the 64 rows
        elif re.search(r"\bHMMA\.16816", line):
            tensor += 16 * 8 * 16 / _RATE[arch]
        elif re.search(r"/\*[0-9a-f]+\*/\s+\S", line):
            others += 1
    return tensor / (tensor + others) if tensor else None


# ---- products of 32 bits in addresses ----

# Of numbers that are not known at compile time, by kernel and variable; each is below 2**31, since:
BOUNDED = {
    "_attention_forward_kernel": {"stride_lse": "heads of at most 64 queries"},
    "_attention_backward_dq_kernel": {"stride_lse": "heads of at most 64 queries"},
    "_attention_backward_dbias_kernel": {
        "stats": "heads of at most 64 queries",
        "row0": "buckets of the queries",
        "bias_at": "partial sums, of which each has its memory",
        "at": "at most 64 queries and keys",
    },
    "_causal_sgu_forward_kernel": {"first": "buckets of the tokens"},
    "_causal_sgu_backward_gate_kernel": {"first": "buckets of the tokens"},
    "_causal_sgu_backward_weight_kernel": {"first": "buckets of the tokens"},
    "_rms_norm_backward_kernel": {"rows": "supports() leaves room for those of the last program"},
    "_selected_attention_backward_dkv_kernel": {
        "begin": "visits of a pair, which supports() bounds",
        "of_all": "blocks of all pairs, which supports() bounds",
    },
}
_OPERATION = re.compile(r'\s*(%[\w#]+)(?::\d+)? = "?([\w.]+)"?(.*)')
# What an offset is not followed through: it is bounded by what it comes from.
_LEAVES = ("tt.load", "tt.make_range", "tt.get_program_id", "arith.divsi", "arith.remsi", "scf.for")
_SHAPES = ("tt.splat", "tt.broadcast", "tt.expand_dims", "arith.extsi")


def products_of_32_bits(ttir: str) -> set[str]:
    """Variables of 32 bits that are products of two run-time numbers, and part of an address."""
    operations: dict[str, tuple[str, list[str], str]] = {}
    for line in ttir.splitlines():
        if found := _OPERATION.match(line):
            operands = re.findall(r"%[\w#]+", found[3].split(" : ")[0])
            operations[found[1]] = found[2], operands, line
    places = dict(re.findall(r'^(#loc\d+) = loc\("(\w+)"', ttir, re.MULTILINE))

    def is_constant(name: str) -> bool:
        kind, operands, _ = operations.get(name, ("", [], ""))
        if kind in _SHAPES:
            return is_constant(operands[0])
        return kind == "arith.constant"

    def follow(name: str) -> None:
        if name in seen or name not in operations or operations[name][0] in _LEAVES:
            return
        seen.add(name)
        kind, operands, line = operations[name]
        narrow = re.search(r": (?:tensor<[\dx]+x)?i32>? loc", line) is not None
        if kind == "arith.muli" and narrow and not any(map(is_constant, operands)):
            place = re.search(r"loc\((#loc\d+)\)", line)
            products.add(places.get(place[1], line.strip()) if place else line.strip())
        for operand in operands[1:] if kind == "arith.select" else operands:
            follow(operand)

    seen: set[str] = set()
    products: set[str] = set()
    for kind, operands, _ in operations.values():
        if kind == "tt.addptr":
            follow(operands[1])
    return products
