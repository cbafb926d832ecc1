"""Tables of measured configurations, and the command that writes them, hierkernels.tune.

Nothing is measured here but by the test for a GPU: candidates are compiled, times are given.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from hierkernels import tune
from hierkernels.ops.attention import aot
from hierkernels.triton_common import configs, search
from hierkernels.triton_common.configs import Config
from hierkernels.triton_common.launch import Target

DEVICE = "Test GPU 80GB"
CONFIG = {"block_m": 64, "block_n": 32, "num_warps": 8, "num_stages": 4, "loop": "split"}
BUCKET = "16-bit d64 rows128"


@pytest.fixture(autouse=True)
def no_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the user's nor the environment's tables, and none remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HIERKERNELS_TUNING", raising=False)
    configs.table_of.cache_clear()


def _write(path: Path, entries: dict, **changes) -> Path:
    content = {"format": 1, "device": DEVICE, "configurations": entries} | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def _forward(device: str = DEVICE, case: str = "causal"):
    """The forward launch of a call with 64 channels."""
    found = next(c for c in aot.CASES if c.name == case and c.channels == 64)
    return aot.plan(found, Target("sm_90", "tf32", device))[0]


def test_file_names() -> None:
    assert configs.file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"


def test_a_table_overrules_the_heuristic(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For its kernel and bucket alone, and on its device."""
    standard = _forward(device="").arguments
    path = _write(tmp_path / "table.json", {"attention_forward": {BUCKET: CONFIG}})
    monkeypatch.setenv("HIERKERNELS_TUNING", str(path))
    tuned = _forward().arguments
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "LOOP")
    assert [tuned[name] for name in names] == list(CONFIG.values())
    assert [standard[name] for name in names] != list(CONFIG.values())
    assert _forward(device="").arguments["BLOCK_M"] == standard["BLOCK_M"]
    other = _forward(case="window").arguments  # the same bucket: key ranges are alike
    assert other["BLOCK_M"] == CONFIG["block_m"]
    assert _forward(case="bias").arguments["num_stages"] != CONFIG["num_stages"]


def test_the_order_of_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The environment's folder before the user's, bucket by bucket, and that before the shipped."""
    name = configs.file_name(DEVICE)
    monkeypatch.setattr(configs, "SHIPPED", tmp_path / "shipped")
    folders = (tmp_path / "shipped", configs.user_folder(), tmp_path / "own")
    for n, folder in enumerate(folders, 1):
        buckets = {bucket: CONFIG | {"num_stages": n} for bucket in "abc"[n - 1 :]}
        _write(folder / name, {"kernel": buckets})
    table = configs.table_of(DEVICE, str(tmp_path / "own"))
    assert [table["kernel", bucket].num_stages for bucket in "abc"] == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "format must be 1, got 'list'"),
        ('{"format": 2}', "format must be 1, got 2"),
        ('{"format": 1, "device": "other"}', "for the device 'other', not 'Test GPU 80GB'"),
        ({"configurations": 3}, "configurations must be an object"),
        ({"attention_forward": 3}, "attention_forward must be an object"),
        ({"k": {"b": 3}}, "k, 'b': must be an object, got 3"),
        ({"k": {"b": {**CONFIG, "warps": 4}}}, "k, 'b': unknown warps"),
        ({"k": {"b": {"block_m": 64}}}, "missing block_n, missing num_stages, missing num_warps"),
        ({"k": {"b": {**CONFIG, "block_m": 48}}}, "block_m must be one of 16, 32, .*, got 48"),
        ({"k": {"b": {**CONFIG, "num_warps": True}}}, "num_warps must be one of .*, got True"),
        ({"k": {"b": {**CONFIG, "loop": "no"}}}, "loop must be one of always, .*, got 'no'"),
    ],
)  # fmt: skip
def test_bad_tables(text, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The error names the file, the entry, and what is allowed."""
    path = tmp_path / "bad.json"
    if isinstance(text, str):
        path.write_text(text)
    elif "configurations" in text:
        _write(path, {}, **text)
    else:
        _write(path, text)
    monkeypatch.setenv("HIERKERNELS_TUNING", str(path))
    with pytest.raises(ValueError, match=message) as error:
        _forward()
    assert str(path) in str(error.value)


def test_a_table_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HIERKERNELS_TUNING", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"HIERKERNELS_TUNING names .*none, which does not exist"):
        _forward()


def test_written_tables_are_read(tmp_path: Path) -> None:
    """Entries are added to those of other buckets; a broken file is not built on."""
    path, config = tmp_path / "new" / "table.json", Config(**CONFIG)
    for bucket in "ab":
        entry = configs.entry_of(config, 10.5, 12.25)
        configs.write_table(path, DEVICE, {"kernel": {bucket: entry}})
    assert configs.read_table(path, DEVICE) == {("kernel", b): config for b in "ab"}
    path.write_text("{")
    with pytest.raises(ValueError, match="not readable"):
        configs.write_table(path, DEVICE, {})
    assert path.read_text() == "{"


def test_every_task_has_candidates() -> None:
    """All kernels that are tuned, the heuristic's configuration first, no launch twice."""
    tasks = search.tasks("sm_90", None, ["causal", "short", "paper", "package-logit", "tune"])
    kernels = {task.kernel for task in tasks}
    assert kernels >= {
        "attention_forward", "attention_backward_dq", "attention_backward_dkv",
        "selected_attention_forward", "selected_attention_backward_dq",
        "selected_attention_backward_dkv", "select_blocks_probability", "select_blocks_logit",
        "causal_sgu_forward", "causal_sgu_backward_gate", "causal_sgu_backward_weight",
    }  # fmt: skip
    assert len({(task.kernel, task.bucket) for task in tasks}) == len(tasks)
    for task in tasks:
        tried = search.candidates(task, "sm_90", 5)
        assert tried[0] == task.heuristic
        assert len(set(tried)) == 5


def test_candidates_that_do_not_fit_are_dropped() -> None:
    """393 KiB of shared memory: over the limit of every device."""
    (task,) = search.tasks("sm_90", ["causal_sgu_forward"], ["tune"])
    large = Config(128, 128, 8, 8, block_k=64)
    (first, fits), (second, exceeds) = search.compiled(task, [task.heuristic, large], "sm_90", 1)
    assert (first, second) == (task.heuristic, large)
    assert not fits.problem
    assert "shared memory" in exceeds.problem


def test_the_fastest_is_taken(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """By the times that the device gives; what it refuses is left out."""
    (task,) = search.tasks("sm_90", None, ["package-logit"])
    tried = search.candidates(task, "sm_90", 4)
    times = dict(zip(tried, (30.0, 20.0, None, 25.0), strict=True))

    def measured(_task, config, _family, _device) -> float:
        if times[config] is None:
            raise RuntimeError("too many resources requested for launch")
        return times[config]

    monkeypatch.setattr(search, "microseconds", measured)
    entry = tune._timed(task, tried, "sm_90")
    assert entry == configs.entry_of(tried[1], 20.0, 30.0)
    assert "too many resources" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no GPU is there"),
        (["--dry-run"], "--dry-run needs --device"),
        (["--device", "sm_90"], "--device is for --dry-run"),
        (["--dry-run", "--device", "sm_90", "--candidates", "0"], "at least 1, got 0"),
        (["--dry-run", "--device", "sm_90", "--case", "none"], "no kernel and call"),
        (["--dry-run", "--device", "sm_70"], "invalid choice: 'sm_70'"),
    ],
)
def test_errors_of_the_command(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit):
        tune.main(arguments)
    assert message in capsys.readouterr().err


def test_dry_run() -> None:
    """What would be timed after compiling, without a GPU."""
    command = [sys.executable, "-m", "hierkernels.tune", "--dry-run", "--device", "sm_90"]
    command += ["--kernel", "select_blocks_logit", "--case", "package-logit"]
    command += ["--candidates", "2", "--jobs", "1"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    task = "select_blocks_logit, 16-bit d64 rows128 top4 (as package-logit)"
    assert f"{task}: 2 candidates" in done.stdout
    assert "1 would be timed" in done.stdout or "2 would be timed" in done.stdout


@pytest.mark.gpu
def test_tunes_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    arguments = ["--kernel", "select_blocks_logit", "--candidates", "3", "--output", str(path)]
    assert tune.main(arguments) == 0
    table = configs.read_table(path, torch.cuda.get_device_name())
    assert [kernel for kernel, _ in table] == ["select_blocks_logit"]
