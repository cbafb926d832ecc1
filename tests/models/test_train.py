"""Training, its checkpoints and the two commands, on a model small enough for seconds."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from python_models import checkpoint, sample
from python_models.checkpoint import CheckpointError
from python_models.registry import MODELS
from python_models.train import Run, TrainConfig, build_parser, main, train

OPTIONS = ("dim=32,24", "depth=1,1", "max_seq_len=6,4", "heads=2", "dim_head=8", "ff_dropout=0.2")


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    data = tmp_path / "text"
    data.write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 60)
    return TrainConfig(
        option=OPTIONS,
        data=str(data),
        out=str(tmp_path / "run"),
        steps=12,
        batch_size=4,
        accumulate=2,
        warmup=3,
        log_every=2,
        eval_every=4,
        eval_windows=6,
        sample_every=5,
        sample_bytes=4,
        save_every=4,
    )


def everything(run_dir: str) -> tuple[dict[str, torch.Tensor], dict]:
    folder = checkpoint.find(run_dir)
    state = checkpoint.load_state(folder)
    return checkpoint.load_tensors(folder, state), state


def log_lines(run_dir: str) -> list[dict]:
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").open()]
    for line in lines:
        del line["seconds"]
    return lines


def test_it_learns(config: TrainConfig) -> None:
    run = train(replace(config, steps=150, learning_rate=5e-3, eval_every=75), quiet=True)
    held_out = [m["held_out_bits_per_byte"] for m in log_lines(config.out) if len(m) == 2]
    assert len(held_out) == 2
    assert held_out[-1] < 3.0 < math.log2(257)
    assert run.metrics["held_out_bits_per_byte"] == held_out[-1]


def test_resume_is_bit_identical(config: TrainConfig, tmp_path: Path) -> None:
    """Stopped after 5 of 12 steps, in a run that evaluates and draws samples at other steps."""
    whole, parts = replace(config, out=str(tmp_path / "w")), replace(config, out=str(tmp_path / "p"))
    train(whole, quiet=True)

    stopped = Run(parts, MODELS["megabyte"].parse(OPTIONS))
    train_step = Run.train_step

    def stop_at_five(self: Run, data: object) -> object:
        result = train_step(self, data)
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "train_step", stop_at_five)
        stopped = train(parts, quiet=True)
    assert stopped.step == 5
    assert checkpoint.find(parts.out).name.endswith("5")
    torch.rand(7)  # the generator is elsewhere when the run goes on
    train(parts, resume=True, quiet=True)

    expected, expected_state = everything(whole.out)
    got, got_state = everything(parts.out)
    assert got.keys() == expected.keys()
    assert any(name.startswith("optimizer.exp_avg_sq.") for name in expected)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
    assert got_state["random"] == expected_state["random"]
    assert got_state["metrics"] == expected_state["metrics"]
    stopped_line = {"step": 5, "train_bits_per_byte", "gradient_norm", "learning_rate"} if 0 else 5
    remaining = [line for line in log_lines(parts.out) if line["step"] != stopped_line]
    assert remaining == log_lines(whole.out)
