"""Training by several processes, presets and the log for TensorBoard."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from python_models import checkpoint
from python_models.metrics_log import MetricsLog
from python_models.registry import MODELS, PRESETS
from python_models.train import TrainConfig, main, train

OPTIONS = ("dim=32,24", "depth=1,1", "max_seq_len=6,4", "heads=2", "dim_head=8")
SHORT = [
    *("--steps", "6", "--batch-size", "4", "--accumulate", "2", "--warmup", "2"),
    *("--log-every", "1", "--eval-every", "3", "--eval-windows", "7", "--sample-every", "0"),
]


@pytest.fixture
def data(tmp_path: Path) -> str:
    file = tmp_path / "text"
    file.write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 60)
    return str(file)


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess:
    """The training command, in processes that share each batch."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(processes), "-m", "python_models.train", *arguments),
        ],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]


def test_two_processes_train_as_one(data: str, tmp_path: Path) -> None:
    """At the same global batch: equal losses and weights; then both go on from the checkpoint."""
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = ["--data", data, *SHORT, "--option", *OPTIONS]
    assert main([*arguments, "--out", str(one)]) == 0
    result = torchrun(2, *arguments, "--out", str(two))
    assert result.returncode == 0, result.stderr
    expected, got = lines(one), lines(two)
    assert len(got) == len(expected) == 8  # a line a step and two evaluations, written once
    for a, b in zip(expected, got, strict=True):
        assert b == pytest.approx({**a, "seconds": b["seconds"]}, rel=1e-5)
    states = [checkpoint.load_state(checkpoint.find(folder)) for folder in (one, two)]
    weights = [
        checkpoint.load_tensors(checkpoint.find(folder), state)
        for folder, state in zip((one, two), states, strict=True)
    ]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-5, msg=name)

    assert len(states[1]["random"]) == 2
    assert states[1]["random"][0]["torch"] != states[1]["random"][1]["torch"]
    with pytest.raises(checkpoint.CheckpointError, match=r"by 2 processes .* got 1"):
        train(TrainConfig(**restored(states[1])), resume=True, quiet=True)
    result = torchrun(2, "--resume", "--out", str(two), "--steps", "8")
    assert result.returncode == 0, result.stderr
    assert checkpoint.find(two).name == "checkpoint-00000008"


def restored(state: dict) -> dict:
    return {**state["config"], "option": tuple(state["config"]["option"])}


def test_processes_must_divide_the_batch(data: str, tmp_path: Path) -> None:
    arguments = ["--data", data, *SHORT, "--option", *OPTIONS, "--batch-size", "3"]
    result = torchrun(2, *arguments, "--out", str(tmp_path / "run"))
    assert result.returncode != 0
    assert "batch_size must be a multiple of the 2 processes, got 3" in result.stderr


@pytest.mark.parametrize("model", sorted(MODELS))
def test_presets(model: str, data: str, tmp_path: Path) -> None:
    """The smallest one trains in a moment; the sizes of the papers make models."""
    config = TrainConfig(
        model=model, preset="tiny", data=data, out=str(tmp_path / "run"), steps=2, eval_windows=2
    )
    assert train(config, quiet=True).step == 2
    entry, sizes = MODELS[model], []
    with torch.device("meta"):
        for preset in PRESETS:
            module = entry.make(entry.parse((), preset))
            sizes.append(sum(p.numel() for p in module.parameters()))
    assert 4 * sizes[0] < sizes[1] < sizes[2] / 4
    assert entry.parse(("depth=1",) if model != "megabyte" else ("depth=1,1",), "paper")["depth"]


def test_tensorboard(data: str, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    arguments = ["--data", data, *SHORT, "--option", *OPTIONS, "--out", str(out)]
    assert main([*arguments, "--sample-every", "6", "--sample-bytes", "3", "--tensorboard"]) == 0
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    logged = [line for line in lines(out) if "train_bits_per_byte" in line]
    for name in ("train_bits_per_byte", "gradient_norm", "learning_rate"):
        scalars = events.Scalars(name)
        assert [s.step for s in scalars] == [1, 2, 3, 4, 5, 6]
        assert [s.value for s in scalars] == pytest.approx([line[name] for line in logged])
    assert len(events.Scalars("held_out_bits_per_byte")) == 2
    assert events.Tags()["tensors"] == ["sample/text_summary"]


def test_tensorboard_without_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        MetricsLog(tmp_path, after_step=0, tensorboard=True)
