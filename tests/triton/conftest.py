"""Runs the *_interpreted.py tests where Triton interprets its kernels, whoever imported it first.

Triton decides between compiler and interpreter (TRITON_INTERPRET=1) when a kernel's module is
imported, for the whole process. So these tests run in a second pytest process, which is sent the
names of tests, one at a time, and answers with what it found; each worker of pytest-xdist has one
of its own. With TRITON_INTERPRET=1 already set (`TRITON_INTERPRET=1 pytest tests/triton`, for a
debugger) they run in this process.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

import compiled
import pytest
import torch

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_PIPES = "HIERKERNELS_TEST_PIPES"  # set in the second process: two file descriptors


def _is_interpreted(item: pytest.Item) -> bool:
    return item.path.name.endswith("_interpreted.py")


class _Interpreter:
    """The second process, as the first sees it."""

    def __init__(self, session: pytest.Session) -> None:
        files = sorted({str(item.path) for item in session.items if _is_interpreted(item)})
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
        if markers := session.config.option.markexpr:
            command += ["-m", markers]
        asked, ask = os.pipe()
        answer, answered = os.pipe()
        environment = {**os.environ, "TRITON_INTERPRET": "1", _PIPES: f"{asked},{answered}"}
        for name in [name for name in environment if name.startswith("PYTEST_")]:
            del environment[name]  # of the worker that this process may be
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (close() closes all three)
        self._process = subprocess.Popen(
            [*command, *files], cwd=session.config.rootpath, env=environment, stdout=self._log,
            stderr=subprocess.STDOUT, pass_fds=(asked, answered),
        )  # fmt: skip
        os.close(asked)
        os.close(answered)
        self._names = open(ask, "w")  # noqa: SIM115
        self._results = open(answer)  # noqa: SIM115

    def run(self, node: str) -> tuple[str, str]:
        """(outcome, message) of a test."""
        try:
            print(node, file=self._names, flush=True)
            line = self._results.readline()
        except BrokenPipeError:
            line = ""
        if line:
            outcome, message = json.loads(line)
            return outcome, message
        self._process.wait()
        self._log.seek(0)
        return "failed", f"the interpreting process ended:\n{self._log.read()[-4000:]}"

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._names.close()  # the process then ends
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait()
        self._results.close()
        self._log.close()


_interpreter = pytest.StashKey[_Interpreter]()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if _INTERPRETED or not _is_interpreted(pyfuncitem):
        return None
    stash = pyfuncitem.session.stash
    if _interpreter not in stash:
        stash[_interpreter] = _Interpreter(pyfuncitem.session)
    outcome, message = stash[_interpreter].run(pyfuncitem.nodeid)
    if outcome == "skipped":
        pytest.skip(message)
    if outcome == "failed":
        pytest.fail(message, pytrace=False)
    return True


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _interpreter in session.stash:
        session.stash[_interpreter].close()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """In the second process: runs the tests that it is asked for."""
    if _PIPES not in os.environ or session.config.option.collectonly:
        return None
    asked, answered = (int(number) for number in os.environ[_PIPES].split(","))
    items = {item.nodeid: item for item in session.items}
    with open(asked) as names, open(answered, "w") as results:
        for name in map(str.rstrip, names):
            found = _run(items[name]) if name in items else ("failed", "no longer in the file")
            print(json.dumps(found), file=results, flush=True)
    return True


def _run(item: pytest.Item) -> tuple[str, str]:
    """(outcome, message) of a test, its fixtures included: the first that is not "passed"."""
    found: list[tuple[str, str]] = []

    class Listener:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            found.append((report.outcome, report.longreprtext))

    listener = Listener()
    item.config.pluginmanager.register(listener)
    try:
        # Which test comes next is not known: all fixtures end with this one.
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
    finally:
        item.config.pluginmanager.unregister(listener)
    return next((result for result in found if result[0] != "passed"), ("passed", ""))


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


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory) -> compiled.Reports:
    """The quick set of every operator, compiled for one architecture."""
    return compiled.reports(tmp_path_factory, "--arch", str(compiled.ARCH))


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory) -> compiled.Reports:
    """Every case of every operator, compiled for every architecture."""
    return compiled.reports(tmp_path_factory, "--full")
