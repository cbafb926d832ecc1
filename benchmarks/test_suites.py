"""Every suite of benchmarks/suites: the rows of each group, and peak memory against length."""

from __future__ import annotations

import pytest

from benchmarks import memory, replay, suite
from benchmarks.measure import Group, RowResult, groups
from benchmarks.suite import Suite


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    device, full = config.getoption("device"), config.getoption("full")
    names = config.getoption("op") or suite.names()
    if metafunc.function is test_time:
        parameters = [
            pytest.param(group, row, id="-".join((*group.key, row)))
            for group in groups(full, names)
            for row in group.suite.rows(group.case, device, full)
        ]
        metafunc.parametrize(("group", "row"), parameters)
    if metafunc.function is test_memory:
        parameters = [
            pytest.param(one, row, n, id=f"{one}-n{n}-{row}")
            for one in map(suite.load, names)
            if device == "cpu" and one.memory
            for n in (one.memory.lengths if full else one.memory.quick_lengths)
            for row in one.memory.rows
        ]
        metafunc.parametrize(("one", "row", "n"), parameters)


@pytest.mark.benchmark(timer=replay.clock)
def test_time(group: Group, row: str, benchmark, measured) -> None:
    result: RowResult = measured(group, row)
    benchmark.group = str(group)
    if result.failed:
        pytest.fail(result.failed, pytrace=False)
    if result.skipped:
        pytest.skip(result.skipped)
    benchmark.extra_info |= result.extra_info | {"row": row}
    replay.replay(benchmark, result.samples)


@pytest.mark.benchmark(timer=replay.clock)
def test_memory(one: Suite, row: str, n: int, benchmark, say) -> None:
    """Peak extra memory of a forward and backward, float32, each in a fresh process."""
    benchmark.group = f"{one} · peak memory · float32 · N = {n}"
    needed = one.memory.needs(row, n)
    if memory.available() < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB")
    try:
        found = memory.measure(one.name, row, n)
    except RuntimeError as error:
        pytest.skip(str(error))
    if found["peak_extra_bytes"] is None:
        pytest.skip("this system does not let a process reset its memory high-water mark")
    benchmark.extra_info |= {"op": one.name, "row": row, "n": n, "case_group": "memory"} | found
    say(f"{benchmark.group}: {row} {found['peak_extra_bytes'] / 2**20:.0f} MiB")
    replay.replay(benchmark, [found["seconds"]])
