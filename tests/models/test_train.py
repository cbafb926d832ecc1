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
    whole, parts = (
        replace(config, out=str(tmp_path / "w")),
        replace(config, out=str(tmp_path / "p")),
    )
    train(whole, quiet=True)

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
    # The line of the step at which it was stopped is the only difference of the two logs.
    assert [line for line in log_lines(parts.out) if line["step"] != 5] == log_lines(whole.out)


def test_looking_at_a_run_does_not_change_it(config: TrainConfig) -> None:
    run = Run(config, MODELS["megabyte"].parse(OPTIONS))
    data = torch.arange(200, dtype=torch.uint8).numpy()
    torch_state, data_state = torch.get_rng_state(), run.data_order.get_state()
    assert run.sample(data) == run.sample(data)
    assert run.evaluate(data) == run.evaluate(data)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert torch.equal(run.data_order.get_state(), data_state)


def test_accumulation_is_a_larger_batch(config: TrainConfig) -> None:
    """Without dropout, two passes of four windows are one of eight."""
    options = MODELS["megabyte"].parse((*OPTIONS, "ff_dropout=0"))
    data = torch.randint(97, 123, (500,), dtype=torch.uint8).numpy()
    norms = []
    for batch_size, accumulate in ((8, 1), (4, 2)):
        run = Run(replace(config, batch_size=batch_size, accumulate=accumulate), options)
        loss, norm, _ = run.train_step(data)
        norms.append((float(loss), float(norm)))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_learning_rate() -> None:
    config = TrainConfig(steps=1000, warmup=9, learning_rate=1.0, final_share=0.1)
    rates = [config.rate(step, 0.0) for step in range(1001)]
    assert rates[0] == pytest.approx(0.1, rel=1e-3)
    assert max(rates) == rates[9] == pytest.approx(1.0, abs=1e-3)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[1000] == pytest.approx(0.1)
    # The limit that is nearer decides.
    timed = replace(config, minutes=1.0)
    assert timed.progress(100, 30.0) == 0.5
    assert timed.progress(900, 30.0) == 0.9
    assert TrainConfig().progress(10**6, 300.0) == 0.5  # ten minutes, if there is no limit


def test_minutes_end_a_run(config: TrainConfig) -> None:
    began = time.monotonic()
    run = train(replace(config, steps=None, minutes=1 / 60, save_every=0), quiet=True)
    assert 1 <= run.seconds < 1 + time.monotonic() - began
    assert checkpoint.find(config.out).name == f"checkpoint-{run.step:08d}"


def test_a_failed_write_leaves_the_old_checkpoint(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config, quiet=True)
    before = everything(config.out)

    def half(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises(OSError, match="disk is full"):
        train(replace(config, steps=16), resume=True, quiet=True)
    after = everything(config.out)
    assert after[1] == before[1]
    assert all(torch.equal(after[0][name], value) for name, value in before[0].items())


def test_a_loss_that_is_not_finite_is_not_saved(config: TrainConfig) -> None:
    train(config, quiet=True)
    broken = replace(config, steps=20, learning_rate=1e30, warmup=0)
    with pytest.raises(FloatingPointError, match="try a lower learning_rate"):
        train(broken, resume=True, quiet=True)
    tensors, _ = everything(config.out)
    assert all(t.isfinite().all() for t in tensors.values())


def test_a_run_folder_is_not_overwritten_by_accident(config: TrainConfig) -> None:
    train(config, quiet=True)
    with pytest.raises(ValueError, match=r"--resume .* --overwrite"):
        train(config, quiet=True)
    train(replace(config, steps=4), overwrite=True, quiet=True)
    assert checkpoint.find(config.out).name == "checkpoint-00000004"
    assert max(line["step"] for line in log_lines(config.out)) == 4


def damage_json(folder: Path) -> None:
    (folder / "state.json").write_text('{"format": 1, "st')


def damage_list(folder: Path) -> None:
    (folder / "state.json").write_text("[]")


def lack_field(folder: Path) -> None:
    (folder / "state.json").write_text('{"format": 1}')


def other_format(folder: Path) -> None:
    change_state(folder, format=99)


def other_model(folder: Path) -> None:
    change_state(folder, model="memformer")


def cut_tensors(folder: Path) -> None:
    content = (folder / "tensors.safetensors").read_bytes()
    (folder / "tensors.safetensors").write_bytes(content[:-100])


def flip_tensors(folder: Path) -> None:
    content = bytearray((folder / "tensors.safetensors").read_bytes())
    content[-50] ^= 1
    (folder / "tensors.safetensors").write_bytes(content)


def lose_tensors(folder: Path) -> None:
    (folder / "tensors.safetensors").unlink()


def change_state(folder: Path, **changes: object) -> None:
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, **changes}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_json, "state.json is damaged"),
        (damage_list, "state.json is not a checkpoint"),
        (lack_field, r"state.json lacks \['model', 'options'"),
        (other_format, "state.json has format 99"),
        (other_model, "state.json is of the model 'memformer', expected 'megabyte'"),
        (cut_tensors, "tensors.safetensors is damaged or cut short"),
        (flip_tensors, "tensors.safetensors is damaged or cut short"),
        (lose_tensors, "tensors.safetensors does not exist"),
    ],
)
def test_damaged_checkpoints(config: TrainConfig, damage: object, words: str) -> None:
    train(replace(config, steps=1), quiet=True)
    damage(checkpoint.find(config.out))
    with pytest.raises(CheckpointError, match=words):
        train(config, resume=True, quiet=True)


def test_checkpoint_of_other_options(config: TrainConfig) -> None:
    train(replace(config, steps=1), quiet=True)
    with pytest.raises(CheckpointError, match="with other options"):
        train(replace(config, option=(*OPTIONS, "heads=1")), resume=True, quiet=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"options": {"dim": [32, 24]}}, "state.json has options that make no megabyte"),
        ({"options": {"wings": 2}}, "state.json has options that make no megabyte"),
        ({"model": "sphinx"}, "state.json is of the unknown model 'sphinx'; there are megabyte"),
    ],
)
def test_sample_refuses_a_checkpoint(
    config: TrainConfig, changes: dict, words: str, capsys: pytest.CaptureFixture
) -> None:
    train(replace(config, steps=1), quiet=True)
    change_state(checkpoint.find(config.out), **changes)
    assert sample.main(["--checkpoint", config.out, "--bytes", "1"]) == 1
    assert words in capsys.readouterr().err


def test_checkpoint_that_does_not_fit(config: TrainConfig, capsys: pytest.CaptureFixture) -> None:
    train(replace(config, steps=1), quiet=True)
    folder = checkpoint.find(config.out)
    options = checkpoint.load_state(folder)["options"]
    change_state(folder, options={**options, "heads": 1})
    assert sample.main(["--checkpoint", config.out, "--bytes", "1"]) == 1
    assert "tensors.safetensors does not fit the model" in capsys.readouterr().err


def test_resume_without_a_checkpoint(config: TrainConfig) -> None:
    with pytest.raises(CheckpointError, match=r"there is no checkpoint in .*run"):
        train(config, resume=True, quiet=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"minutes": 0.0}, "minutes must be positive"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"warmup": -1}, "warmup must be at least 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"beta2": 1.0}, "beta2 must be from 0 to below 1"),
    ],
)
def test_config_refuses(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainConfig(**change)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["heads"], "must have the form name=value"),
        (["head=3"], "unknown option 'head'; there are num_tokens"),
        (["heads=many"], "option heads: 'many' is not a number"),
        (["heads=1,2"], "option heads takes one value"),
    ],
)
def test_model_options_refuse(settings: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MODELS["megabyte"].parse(settings)


def test_command_line_has_every_option() -> None:
    text = build_parser().format_help()
    for entry in fields(TrainConfig):
        assert f"--{entry.name.replace('_', '-')} " in text
        assert entry.metadata["help"].split()[0] in text
    assert "max_seq_len=64,8" in text


def test_commands(config: TrainConfig, capfdbinary: pytest.CaptureFixture) -> None:
    """Train, resume with the options of the checkpoint, sample twice; then errors of each."""
    arguments = ["--data", config.data, "--out", config.out, "--option", *OPTIONS]
    small = ["--steps", "6", "--eval-every", "3", "--sample-every", "4", "--sample-bytes", "9"]
    assert main([*arguments, *small, "--batch-size", "2", "--seed", "3"]) == 0
    captured = capfdbinary.readouterr()
    shown = captured.out + captured.err
    assert b"step 3," in shown
    assert b"held out" in shown
    assert b"--- sample" in shown
    assert main(["--resume", "--out", config.out, "--steps", "8"]) == 0
    state = checkpoint.load_state(checkpoint.find(config.out))
    assert (state["step"], state["config"]["seed"], state["config"]["steps"]) == (8, 3, 8)
    capfdbinary.readouterr()

    prompt = ["--checkpoint", config.out, "--prompt", "the quick ", "--bytes", "40", "--seed", "1"]
    texts = []
    for _ in range(2):  # 10 + 40 bytes are more than the 24 of a window
        assert sample.main(prompt) == 0
        texts.append(capfdbinary.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith(b"the quick ")
    assert len(texts[0]) == 51

    assert main(arguments) == 1
    assert b"--overwrite" in capfdbinary.readouterr().err
    assert main(["--data", "/nowhere", "--out", "elsewhere"]) == 1
    assert b"/nowhere does not exist" in capfdbinary.readouterr().err
    assert main(["--resume", "--out", "/nowhere"]) == 1
    assert b"there is no checkpoint in /nowhere" in capfdbinary.readouterr().err
    for wrong in ("nonsense", "cuda:99"):
        for command, options in ((main, [*arguments, "--overwrite"]), (sample.main, prompt)):
            assert command([*options, "--device", wrong]) == 1
            assert f"device must be one that PyTorch can use here, such as cpu, got '{wrong}'" in (
                capfdbinary.readouterr().err.decode()
            )
    for command, options in ((main, arguments), (sample.main, prompt)):
        with pytest.raises(SystemExit):
            command([*options, "--backend", "gpu"])
        assert b"invalid choice: 'gpu'" in capfdbinary.readouterr().err
    assert sample.main(["--checkpoint", config.out, "--bytes", "-1"]) == 1
    assert b"bytes must be at least 0" in capfdbinary.readouterr().err


def test_ctrl_c_saves_and_ends(config: TrainConfig) -> None:
    """The real command, in its own process."""
    command = [sys.executable, "-m", "python_models.train", "--data", config.data]
    command += ["--out", config.out, "--steps", "100000", "--threads", "1", "--save-every", "0"]
    command += ["--option", *OPTIONS]
    process = subprocess.Popen(
        command,
        cwd=Path(__file__).parents[2],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    log = Path(config.out) / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text()) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "stopped at step" in out + err
    state = checkpoint.load_state(checkpoint.find(config.out))
    assert state["step"] >= 10
