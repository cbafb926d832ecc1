"""Options, fixtures and the closing table of the benchmarks.

pytest benchmarks --benchmark-only [--op NAME ...] [--full] [--device cpu|cuda] [--seconds S]
    [--save-result]
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config

from benchmarks import machine, report, suite, table
from benchmarks.measure import Group, Measurements, RowResult
from benchmarks.roof import RoofMeter

HERE = Path(__file__).resolve().parent
LATEST = HERE / "report" / "latest.json"

# Rounds of backward keep the graph; compiled graphs must then not give their buffers away.
torch._functorch.config.donated_buffer = False

_roof = pytest.StashKey[RoofMeter]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hierkernels benchmarks")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    group.addoption(
        "--op", action="append", choices=suite.names(), help="only this suite; may be repeated"
    )
    group.addoption("--full", action="store_true", help="all cases and peers, not the quick set")
    group.addoption(
        "--device", choices=("cpu", "cuda"), default=device, help="default: %(default)s"
    )
    group.addoption(
        "--seconds", type=float, help="timing budget of a group; default 0.35, with --full 5"
    )
    group.addoption(
        "--save-result",
        action="store_true",
        help="also write results/<machine>[-<suites>][-<-k>][-full].json, to be committed",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_json = config.option.benchmark_json or str(LATEST)
    Path(config.option.benchmark_json).parent.mkdir(parents=True, exist_ok=True)
    # torch.compile imports a deprecated part of PyTorch itself.
    config.addinivalue_line("filterwarnings", "ignore:.*script_method:DeprecationWarning")
    if not config.option.benchmark_verbose:
        config.option.benchmark_quiet = True  # the table at the end takes the place of theirs


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    info = machine.machine_info(config.getoption("device"))
    meter = config.stash.get(_roof, None)
    return info | ({"roof": asdict(meter.roof)} if meter else {})


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Adds the share of the roof, which is known when the run is over."""
    if meter := config.stash.get(_roof, None):
        for record in output_json["benchmarks"]:
            info = record["extra_info"]
            if "flops" in info:
                info["roof_share"] = meter.roof.share(info, record["stats"]["median"])


def pytest_benchmark_generate_commit_info() -> dict[str, Any]:
    return machine.commit_info()


@pytest.fixture(scope="session")
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Writes a line to the terminal while tests run."""
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    capture = request.config.pluginmanager.get_plugin("capturemanager")

    def write(line: str) -> None:
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(line)

    return write


@pytest.fixture(scope="session")
def measurements(
    request: pytest.FixtureRequest, say: Callable[[str], None]
) -> Iterator[Measurements]:
    config = request.config
    groups = {params["group"] for params in _parameters(request) if "group" in params}
    dtypes = sorted({group.dtype for group in groups}, key=str)
    say("roof: measuring matrix products and memory")
    meter = config.stash[_roof] = RoofMeter(config.getoption("device"), dtypes)
    meter.probe()
    say(f"roof: {meter.roof}")
    seconds, full = config.getoption("seconds"), config.getoption("full")
    seconds = (5.0 if full else 0.35) if seconds is None else seconds
    yield Measurements(meter, seconds, full, say, len(groups))
    meter.probe_again()
    say(f"roof: {meter.roof}")


def _parameters(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Those of every selected test."""
    return [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]


@pytest.fixture
def measured(
    request: pytest.FixtureRequest, measurements: Measurements
) -> Callable[[Group, str], RowResult]:
    """The result of one row; its whole group, as far as it was selected, is measured with it."""

    def result(group: Group, row: str) -> RowResult:
        rows = [p["row"] for p in _parameters(request) if p.get("group") == group]
        return measurements.group(group, rows)[row]

    return result


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    path = Path(config.option.benchmark_json)
    if not config._benchmarksession.benchmarks or not path.exists():  # type: ignore[attr-defined]
        return
    data = report.load(path)
    terminalreporter.section("time against hierkernels")
    for line in table.lines(data):
        terminalreporter.write_line(line)
    written = report.write(data, path.parent)
    terminalreporter.write_line(f"data: {_shown(path)}   report: {_shown(written)}")
    if config.getoption("save_result"):
        parts = [machine.slug(data["machine_info"]), *(config.getoption("op") or ())]
        # A part of a suite never takes the place of all of it.
        parts += re.findall(r"[\w-]+", config.option.keyword)
        parts += ["full"] if config.getoption("full") else []
        saved = HERE / "results" / f"{'-'.join(parts)}.json"
        shutil.copyfile(path, saved)
        terminalreporter.write_line(f"result: {_shown(saved)}")


def _shown(path: Path) -> str:
    """Relative to the repository where it lies in it."""
    path = path.resolve()
    return str(path.relative_to(HERE.parent)) if path.is_relative_to(HERE.parent) else str(path)
