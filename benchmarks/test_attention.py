"""hk.attention against its peers: forward and backward of the cases in the op's spec."""

from __future__ import annotations

import pytest

from benchmarks import memory, replay
from benchmarks.measure import Group, RowResult
from benchmarks.rows import BACKEND_ROWS, PEER_ROWS
from hierkernels.ops.attention.spec import SPEED, Case, dtype_name

# Peers that compile for each shape take most of a run: the quick set has one long and one short.
# The eager reference takes seconds a call, and gigabytes, beyond 2048 tokens: the full set has it.
COMPILING_ROWS = ("compiled", "flex")
COMPILED_IN_QUICK = ("long-1x8x2048x64", "short-512x8x16x64")
EAGER_SCORES_IN_QUICK = 8 * 2048**2


def _rows(case: Case, device: str, full: bool) -> list[str]:
    peers = list(PEER_ROWS)
    if not full:
        if case.name not in COMPILED_IN_QUICK:
            peers = [row for row in peers if row not in COMPILING_ROWS]
        if case.B * case.Hq * case.Nq * case.Nk > EAGER_SCORES_IN_QUICK:
            peers.remove("eager")
    return [*BACKEND_ROWS[device], *peers]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    device, full = config.getoption("device"), config.getoption("full")
    if metafunc.function is test_attention:
        parameters = [
            pytest.param(
                Group(case, dtype, direction),
                row,
                id=f"{case.name}-{dtype_name(dtype)}-{direction}-{row}",
            )
            for case in SPEED
            if full or case.quick
            for dtype in case.dtypes
            for direction in ("forward", "backward")
            for row in _rows(case, device, full)
        ]
        metafunc.parametrize(("group", "row"), parameters)
    if metafunc.function is test_memory:
        parameters = [
            pytest.param(backend, n, id=f"n{n}-{backend}")
            for n in (memory.LENGTHS if full else memory.QUICK_LENGTHS)
            for backend in ("cpu", "reference")
            if device == "cpu"
        ]
        metafunc.parametrize(("backend", "n"), parameters)


@pytest.mark.benchmark(timer=replay.clock)
def test_attention(group: Group, row: str, benchmark, measured) -> None:
    result: RowResult = measured(group, row)
    benchmark.group = str(group)
    if result.failed:
        pytest.fail(result.failed, pytrace=False)
    if result.skipped:
        pytest.skip(result.skipped)
    benchmark.extra_info |= result.extra_info | {"row": row}
    replay.replay(benchmark, result.samples)


@pytest.mark.benchmark(timer=replay.clock)
def test_memory(backend: str, n: int, benchmark, say) -> None:
    """Peak extra memory of a forward and backward, causal float32, each in a fresh process."""
    benchmark.group = (
        f"attention · peak memory · float32 · (1, {memory.HEADS}, {n}, {memory.CHANNELS})"
    )
    if backend == "reference" and memory.available() < memory.eager_needs(n):
        pytest.skip(f"the eager reference needs {memory.eager_needs(n) / 2**30:.0f} GiB")
    try:
        found = memory.measure(backend, n)
    except RuntimeError as error:
        pytest.skip(str(error))
    if found["peak_extra_bytes"] is None:
        pytest.skip("this system does not let a process reset its memory high-water mark")
    row = "eager" if backend == "reference" else backend
    benchmark.extra_info |= {"row": row, "n": n, "case_group": "memory"} | found
    say(f"{benchmark.group}: {row} {found['peak_extra_bytes'] / 2**20:.0f} MiB")
    replay.replay(benchmark, [found["seconds"]])
