"""The first minutes on a GPU: steps end at their limits, and later ones begin all the same."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks import first_run
from benchmarks.first_run import Step, run, steps


def _python(name: str, code: str, limit_s: int = 20, needs: str = "") -> Step:
    return Step(name, (sys.executable, "-c", code), limit_s, needs)


def test_every_step_runs_whatever_became_of_the_one_before(tmp_path: Path) -> None:
    # Its child would keep the log open, and the step waiting, if it were not ended as well.
    hang = "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    begin = time.monotonic()
    found = run(
        [
            _python("bad", "print('words'); raise SystemExit(3)"),
            _python("slow", hang, limit_s=1),
            _python("absent", "pass", needs="no-such-program-anywhere"),
            _python("good", "import os; print(os.environ['PYTHONPATH'])"),
        ],
        tmp_path,
    )
    assert time.monotonic() - begin < 20
    assert [(e.step, e.verdict) for e in found] == [
        ("bad", "failed: status 3"),
        ("slow", "failed: out of time (1 s)"),
        ("absent", "skipped: no no-such-program-anywhere"),
        ("good", "ok"),
    ]
    assert (tmp_path / "bad.log").read_text() == "words\n"
    assert (tmp_path / "good.log").read_text().strip() == str(first_run.ROOT)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [e["step"] for e in summary] == ["bad", "slow", "absent", "good"]


def test_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    names = [step.name for step in steps()]
    assert names.index("build") < names.index("tests") < names.index("memcheck")
    assert names[-2:] == ["tune", "benchmark"]
    assert first_run.main(["--list", "--from", "tune"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["tune", "benchmark"]
    assert first_run.main(["--list", "--only", "build"]) == 0
    assert "build_ext --inplace" in capsys.readouterr().out


def test_an_unknown_step_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        first_run.main(["--only", "nothing"])
    assert "nothing" in capsys.readouterr().err
