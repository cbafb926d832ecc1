"""Runs the *_interpreted.py tests where Triton interprets its kernels, whoever imported it first.

Triton decides between compiler and interpreter (TRITON_INTERPRET=1) when a kernel's module is
imported, for the whole process. So these tests run in worker processes of their own, two at a
time, and each test here reports what its worker found. With TRITON_INTERPRET=1 already set
(`TRITON_INTERPRET=1 pytest tests/triton`, for a debugger) they run in this process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_REPORT = "HIERKERNELS_TEST_REPORT"  # set in workers: the file that they write their results to
_WORKERS = 2


def _is_interpreted(item: pytest.Item) -> bool:
    return item.path.name.endswith("_interpreted.py")


class _Workers:
    """pytest processes that run the interpreted tests of a session; results arrive as lines."""

    def __init__(self, session: pytest.Session) -> None:
        nodes = [item.nodeid for item in session.items if _is_interpreted(item)]
        self._folder = tempfile.TemporaryDirectory()
        self._results: dict[str, tuple[str, str]] = {}
        self._files = [Path(self._folder.name, f"{n}.jsonl") for n in range(_WORKERS)]
        self._logs = [path.with_suffix(".log") for path in self._files]
        self._processes = [
            self._start(session.config, nodes[n::_WORKERS], self._files[n], self._logs[n])
            for n in range(min(_WORKERS, len(nodes)))
        ]

    @staticmethod
    def _start(
        config: pytest.Config, nodes: list[str], report: Path, log: Path
    ) -> subprocess.Popen[bytes]:
        report.touch()
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
        if config.option.markexpr:
            command += ["-m", config.option.markexpr]
        environment = {**os.environ, "TRITON_INTERPRET": "1", _REPORT: str(report)}
        with log.open("wb") as output:
            return subprocess.Popen(
                [*command, *nodes], cwd=config.rootpath, env=environment, stdout=output,
                stderr=subprocess.STDOUT,
            )  # fmt: skip

    def result(self, node: str) -> tuple[str, str]:
        """(outcome, message) of a test, waiting for it."""
        while node not in self._results:
            running = any(process.poll() is None for process in self._processes)
            for path in self._files:
                # The last line may not be complete yet.
                for line in path.read_text().split("\n")[:-1] if path.exists() else ():
                    name, *result = json.loads(line)
                    self._results[name] = (result[0], result[1])
            if node not in self._results and not running:
                logs = "\n".join(log.read_text()[-2000:] for log in self._logs if log.exists())
                return "failed", f"the worker processes ended without this test:\n{logs}"
            time.sleep(0.05)
        return self._results[node]

    def close(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
            process.wait()
        self._folder.cleanup()


_workers = pytest.StashKey[_Workers]()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if _INTERPRETED or not _is_interpreted(pyfuncitem):
        return None
    stash = pyfuncitem.session.stash
    if _workers not in stash:
        stash[_workers] = _Workers(pyfuncitem.session)
    outcome, message = stash[_workers].result(pyfuncitem.nodeid)
    if outcome == "skipped":
        pytest.skip(message)
    if outcome == "failed":
        pytest.fail(message, pytrace=False)
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In a worker: one line for each test, when it is decided."""
    path = os.environ.get(_REPORT)
    if path is None or not (report.when == "call" or report.outcome != "passed"):
        return
    with open(path, "a") as file:
        file.write(json.dumps([report.nodeid, report.outcome, report.longreprtext]) + "\n")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _workers in session.stash:
        session.stash[_workers].close()


def _accept_arrays_of_one_number() -> None:
    """Lets the interpreter of Triton 3.6 take a number from NumPy 2.4, which refuses int([1])."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any = None) -> None:
        patch_tensor(*((tensor,) if scope is None else (tensor, scope)))
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch


if _INTERPRETED and importlib.util.find_spec("triton"):
    _accept_arrays_of_one_number()


@pytest.fixture(autouse=_INTERPRETED)
def one_thread() -> None:
    """The interpreter is one thread, and the workers share the cores."""
    torch.set_num_threads(1)
