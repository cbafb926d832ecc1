"""What options cost hk.attention and hk.local_attention: rates against the plain causal kernel.

    python -m benchmarks.rates [-k TEXT] [--threads N] [--dtype float32|bfloat16]

A cell is the variant's rate over the plain kernel's, each in FLOPs of the products of visible
(query, key) pairs a second, so 1.00 means that the option costs nothing for what it leaves to
compute. Head dims that differ are compared by the same FLOPs. Masks and padding count as visible
what the range shows, since no kernel can know them in advance. Marks ("*"): below the row's goal.

The two are timed in turns, variant, plain, variant, ..., and a cell is the median of the ratios of
neighbours, so that drift of the machine cancels.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from hierkernels import testing
from hierkernels.ops.attention.spec import SPEED_DTYPES, Case, dtype_name
from hierkernels.ops.local_attention import testing as local_testing
from hierkernels.ops.local_attention.spec import LocalCase

GOAL_MODIFIERS, GOAL_DIMS, GOAL_MULTI_QUERY = 0.8, 0.7, 1.0
SAMPLE_S = 0.02  # a sample repeats the call until it lasts about so long


@dataclass(frozen=True)
class Rate:
    """A variant, what it is compared with, and the ratio it should reach."""

    case: Case
    plain: Case
    goal: float


def _case(name: str, B: int, H: int, N: int, D: int, **options: object) -> Case:
    Hkv, causal = options.pop("Hkv", H), options.pop("is_causal", True)
    return Case(name, B, H, Hkv, N, N, D, D, is_causal=causal, **options)  # type: ignore[arg-type]


def rates() -> Iterator[Rate]:
    """The rows of the table."""
    long, short = _case("plain", 1, 8, 2048, 64), _case("plain-short", 512, 8, 16, 64)
    options: dict[str, dict[str, object]] = {
        "mask (1,1,N,N)": {"mask": "qk"},
        "mask (1,H,N,N)": {"mask": "hqk"},
        "padding, right": {"B": 4, "Nq": 1024, "Nk": 1024, "padding": "right"},
        "bias (1,1,1,N)": {"bias": "k"},
        "bias (1,1,N,N)": {"bias": "qk"},
        "bias (1,H,N,N)": {"bias": "hqk"},
        "bias (1,H,N,N), batch 4": {"B": 4, "Nq": 1024, "Nk": 1024, "bias": "hqk"},
        "soft cap": {"softcap": 20.0},
        "dropout": {"dropout_p": 0.1},
        "kv heads 2": {"Hkv": 2},
    }
    for name, changes in options.items():
        case = replace(long, name=name, **changes)  # type: ignore[arg-type]
        yield Rate(case, replace(long, B=case.B, Nq=case.Nq, Nk=case.Nk), GOAL_MODIFIERS)
    yield Rate(replace(long, name="kv heads 1", Hkv=1), long, GOAL_MULTI_QUERY)
    wide = replace(long, name="plain", Nq=4096, Nk=4096)
    for width in (1024, 256, 128, 64):
        yield Rate(
            replace(wide, name=f"window {width}", window=(width, None)), long, GOAL_MODIFIERS
        )
    yield Rate(replace(short, name="short, padding", padding="right"), short, GOAL_MODIFIERS)
    yield Rate(replace(short, name="short, bias (1,H,N,N)", bias="hqk"), short, GOAL_MODIFIERS)
    yield Rate(replace(short, name="short, kv heads 2", Hkv=2), short, GOAL_MODIFIERS)
    yield Rate(replace(short, name="short, kv heads 1", Hkv=1), short, GOAL_MULTI_QUERY)
    yield from _local_rates()
    base = _case("plain", 1, 8, 1024, 64)
    for d in (32, 40, 80, 96, 100, 128, 160, 192, 256):
        yield Rate(replace(base, name=f"head dim {d}", D=d, Dv=d), base, GOAL_DIMS)


def _local_rates() -> Iterator[Rate]:
    """Local attention with options, against it without them."""
    for exact in (True, False):
        plain = LocalCase(
            "local", 1, 8, 8, 8192, 8192, 64, 64, is_causal=True, width=128, exact_window=exact
        )
        name = f"local{' exact' if exact else ''}, slot bias"
        yield Rate(replace(plain, name=name, bias="slots"), plain, GOAL_MODIFIERS)


def _bind(case: Case, dtype: torch.dtype, direction: str) -> Callable[[], object]:
    make_inputs = local_testing.make_inputs if isinstance(case, LocalCase) else testing.make_inputs
    inputs: testing.Inputs = make_inputs(case, dtype)  # type: ignore[arg-type]
    if direction == "forward":
        call = inputs.call()

        def forward() -> object:
            with torch.no_grad():
                return testing.api.run(call, "cpu")

        return forward
    inputs = inputs.requires_grad()
    out = inputs.run("cpu")[0]
    wanted = list(inputs.differentiable().values())
    return lambda: torch.autograd.grad(out, wanted, inputs.dout, retain_graph=True)


def _seconds(run: Callable[[], object], loops: int) -> float:
    start = time.perf_counter()
    for _ in range(loops):
        run()
    return (time.perf_counter() - start) / loops


def measure(rate: Rate, dtype: torch.dtype, direction: str, rounds: int) -> tuple[float, float]:
    """(rate over the plain kernel's, GFLOP/s of the variant)."""
    cases = rate.case, rate.plain
    runs = [_bind(case, dtype, direction) for case in cases]
    loops = []
    for run in runs:
        run()
        loops.append(max(1, round(SAMPLE_S / _seconds(run, 1))))
    ratios, best = [], float("inf")
    for _ in range(rounds):
        ours, plain = (_seconds(*pair) for pair in zip(runs, loops, strict=True))
        ratios.append(plain / ours)
        best = min(best, ours)
    flops, plain_flops = (case.flops(direction) for case in cases)
    return sorted(ratios)[rounds // 2] * flops / plain_flops, flops / best * 1e-9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("-k", default="", help="only rows whose name contains this")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=[dtype_name(t) for t in SPEED_DTYPES])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    columns = [
        (dtype, direction)
        for dtype in SPEED_DTYPES
        if options.dtype in (None, dtype_name(dtype))
        for direction in ("forward", "backward")
    ]
    heads = [f"{dtype_name(dtype)} {direction}" for dtype, direction in columns]
    print(f"{'':24}  goal" + "".join(f"{head:>24}" for head in heads))
    for rate in rates():
        if options.k not in rate.case.name:
            continue
        cells = []
        for dtype, direction in columns:
            ratio, gflops = measure(rate, dtype, direction, options.rounds)
            mark = "*" if ratio < rate.goal else " "
            cells.append(f"{ratio:.2f}{mark} ({gflops:.0f} GFLOP/s)".rjust(24))
        print(f"{rate.case.name:24}  {rate.goal:.2f}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
