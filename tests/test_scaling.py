"""benchmarks.scaling: ratios of neighbouring lengths, the verdict, and what is written."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.scaling import Series

ROOT = Path(__file__).resolve().parents[1]


def _series(samples: dict[int, list[float]]) -> Series:
    return Series("op", "time", "float32", "forward", "cpu", samples)


def test_ratios_are_those_of_a_doubling():
    linear = _series({1024: [1.0, 3.0, 2.0], 2048: [4.0, 4.0, 2.0], 8192: [16.0, 16.0, 8.0]})
    assert linear.ratios() == [(1024, 2048, 2.0), (2048, 8192, 2.0)]
    assert linear.ratios(min) == [(1024, 2048, 2.0), (2048, 8192, 2.0)]


def test_a_median_above_the_mark_fails_and_is_marked():
    slow = _series({1: [1.0, 1.0, 1.0], 2: [2.0, 2.3, 2.4]})
    assert not slow.passes(2.1)
    assert slow.passes(2.1, min)
    assert slow.passes(2.3)
    *_, last, verdict = slow.lines(2.1)
    assert "2.30*" in last and "2.00 " in last
    assert verdict == "FAIL (medians)  PASS (smallest)"


def test_command_writes_both_allocators_to_one_file(tmp_path):
    path = tmp_path / "scaling.json"
    command = [sys.executable, "-m", "benchmarks.scaling", "local_attention", "--longest", "2048"]
    command += ["--dtype", "bfloat16", "--direction", "forward", "--seconds", "0.01"]
    for allocator in ("kept", "default", "kept"):
        done = subprocess.run(
            [*command, "--mark", "100", "--allocator", allocator, "--json", str(path)],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"allocator: {allocator}" in done.stdout
    found = json.loads(path.read_text())["series"]
    assert [one["allocator"] for one in found] == ["default", "kept"]
    assert all(set(one["samples"]) == {"1024", "2048"} for one in found)
