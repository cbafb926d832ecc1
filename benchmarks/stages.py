"""The stages of native sparse attention: FLOPs, bytes, time, and the share of each one's limit.

    python -m benchmarks.stages [CASE] [--device cpu|cuda] [--backend NAME] [--dtype DTYPE]

CASE is one of hierkernels/ops/native_sparse_attention/spec.py, such as seed-4096 (the default) or
paper-65536. FLOPs and bytes are those that the spec counts; a stage's limit is the larger of FLOPs
over the rate of a matrix product and bytes over the rate of a move, both measured first. For the
size that a published implementation gives its stages for, these times stand beside ours.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from benchmarks.clock import Clock, make_clock, quickest
from benchmarks.roof import Roof, RoofMeter
from benchmarks.suite import BACKEND_ROWS
from hierkernels.ops.attention.spec import SPEED_DTYPES, dtype_name
from hierkernels.ops.native_sparse_attention import branches
from hierkernels.ops.native_sparse_attention.gated_sum import gated_sum
from hierkernels.ops.native_sparse_attention.spec import SPEED, NsaCase
from hierkernels.ops.native_sparse_attention.testing import Inputs, make_inputs

DIRECTIONS = ("forward", "backward")
# Milliseconds of Scalable-Flash-NSA (Triton) on an H800, by case and direction.
PUBLISHED = {
    ("paper-65536", "forward"): {
        "compressed": 8.8, "select": 9.0, "selected": 13.3, "window": 3.1, "gated sum": 1.1,
        "all": 34.2,
    },
    ("paper-65536", "backward"): {"all": 73.7},
}  # fmt: skip

Run = Callable[[], object]


def runs(inputs: Inputs, backend: str, direction: str) -> dict[str, Run]:
    """The calls that are timed, by the names of NsaCase.stages."""
    inputs = replace(inputs, indices=inputs.choose(backend))
    call, parts = inputs.call(), inputs.branches()
    with torch.no_grad():
        found = {name: part.run(backend) for name, part in parts.items()}
    lse = found["compressed"][1]
    outs = tuple(out for out, _ in found.values())
    if direction == "forward":
        forwards: dict[str, Run] = {
            name: lambda part=part: part.run(backend) for name, part in parts.items()
        }
        forwards["select"] = lambda: branches.select(call, lse, backend)
        forwards["gated sum"] = lambda: gated_sum(call.gates, outs, backend)
        return {name: _without_graph(run) for name, run in forwards.items()}
    backwards: dict[str, Run] = {}
    for name, part in parts.items():
        leaves = part.requires_grad()
        wanted = list(leaves.differentiable().values())
        backwards[name] = _gradient(leaves.run(backend)[0], wanted, part.dout)
    gates, *given = (t.detach().requires_grad_() for t in (call.gates, *outs))
    total = gated_sum(gates, (given[0], given[1], given[2]), backend)
    backwards["gated sum"] = _gradient(total, [gates, *given], inputs.dout)
    return backwards


def _without_graph(run: Run) -> Run:
    def forward() -> object:
        with torch.no_grad():
            return run()

    return forward


def _gradient(out: torch.Tensor, wanted: list[torch.Tensor], dout: torch.Tensor) -> Run:
    return lambda: torch.autograd.grad(out, wanted, dout, retain_graph=True)


def lines(
    inputs: Inputs, backend: str, direction: str, roof: Roof, clock: Clock
) -> Iterator[tuple[str, float, float, float, float]]:
    """(stage, FLOPs, bytes, seconds, share of the limit), and the sum of all, named all."""
    stages, timed = (
        inputs.case.stages(inputs.dtype, direction),
        runs(inputs, backend, direction),
    )
    seconds_of_all = least_of_all = 0.0
    for name, work in stages.items():
        timed[name]()
        seconds = quickest(clock, timed[name], calls=3)
        info = {"dtype": dtype_name(inputs.dtype), "flops": work.flops, "bytes": work.bytes}
        share = roof.share(info, seconds)
        seconds_of_all += seconds
        least_of_all += share * seconds
        yield name, work.flops, work.bytes, seconds, share
    flops, nbytes = (sum(getattr(w, n) for w in stages.values()) for n in ("flops", "bytes"))
    yield "all", flops, nbytes, seconds_of_all, least_of_all / seconds_of_all


def report(case: NsaCase, dtype: torch.dtype, device: str, backend: str) -> None:
    """Prints a table for each direction."""
    meter = RoofMeter(device, [dtype])
    meter.probe()
    clock = make_clock(device)
    inputs = make_inputs(case, dtype, device)
    print(f"{case.name}, {dtype_name(dtype)}, {backend}; {meter.roof}")
    for direction in DIRECTIONS:
        published = PUBLISHED.get((case.name, direction), {})
        print(f"{direction:12}{'GFLOP':>10}{'MB':>10}{'ms':>10}{'GFLOP/s':>10}{'of limit':>10}")
        for name, flops, nbytes, seconds, share in lines(
            inputs, backend, direction, meter.roof, clock
        ):
            text = f"{name:12}{flops * 1e-9:10.2f}{nbytes * 1e-6:10.1f}{seconds * 1e3:10.2f}"
            text += f"{flops / seconds * 1e-9:10.0f}{share:10.0%}"
            if name in published:
                text += f"   published, on an H800: {published[name]} ms"
            print(text, flush=True)


def main() -> None:
    cases = {case.name: case for case in SPEED}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("case", nargs="?", default="seed-4096", choices=cases)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    dtypes = {dtype_name(dtype): dtype for dtype in SPEED_DTYPES}
    parser.add_argument("--dtype", choices=dtypes, default="float32")
    parser.add_argument("--backend", help="default: cpu, or triton on a GPU")
    options = parser.parse_args()
    backend = options.backend or BACKEND_ROWS[options.device][-1]
    report(cases[options.case], dtypes[options.dtype], options.device, backend)


if __name__ == "__main__":
    main()
