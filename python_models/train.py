"""Trains a model on bytes: ``python -m python_models.train --help``.

A run folder holds ``metrics.jsonl`` (one line a measurement, so that the curve can be drawn) and
the newest checkpoint. Ctrl-C finishes the step, saves and ends; a second one ends at once. Limited
by steps, a run that was stopped and resumed is the same, bit for bit, as one that was not.

``torchrun --nproc-per-node 2 -m python_models.train`` shares each batch out to two processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

import hierkernels as hk
from python_models import checkpoint, distributed
from python_models.data import Corpus
from python_models.freed_memory import keep_freed_memory
from python_models.metrics_log import MetricsLog
from python_models.registry import MODELS
from python_models.train_config import TrainConfig
from python_models.training_run import Run

__all__ = ["Run", "TrainConfig", "build_parser", "main", "train"]


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """Yields a list that Ctrl-C or a request to terminate adds to; a second one has its effect."""
    received: list[int] = []
    previous = {}

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, remember)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train(
    config: TrainConfig, *, resume: bool = False, overwrite: bool = False, quiet: bool = False
) -> Run:
    """Runs until a limit of the config or a signal; returns the run as it was saved.

    Where torchrun started several processes, all of them call this, and the first one writes.

    Raises:
        ValueError: an option out of range; a corpus or a checkpoint that cannot be used
            (CorpusError, CheckpointError); a run folder with a checkpoint, if neither resume nor
            overwrite says what is to become of it.
    """
    with distributed.process_group(config.device):
        run = _train(config, resume=resume, overwrite=overwrite, quiet=quiet)
        run.leave()
        return run


def _train(config: TrainConfig, *, resume: bool, overwrite: bool, quiet: bool) -> Run:
    options = MODELS[config.model].parse(config.option, config.preset)
    run_dir = Path(config.out)
    state = None
    if resume:
        folder = checkpoint.find(run_dir)
        state = checkpoint.load_state(folder, model=config.model)
        if state["options"] != json.loads(json.dumps(options)):
            raise checkpoint.CheckpointError(
                f"checkpoint {folder} is of a {config.model} with other options: "
                f"{state['options']}, expected {options}"
            )
    elif checkpoint.exists(run_dir) and not overwrite:
        raise ValueError(
            f"the run folder {run_dir} holds a checkpoint: give --resume to go on from it, "
            "--overwrite to begin anew, or another --out"
        )
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    run = Run(config, options)
    corpus = Corpus.open(
        config.data, pattern=config.pattern, cache_dir=config.cache_dir, window=run.window
    )
    if state is not None:
        run.load(folder, state)
    log, is_first = None, distributed.rank() == 0
    if is_first:
        run_dir.mkdir(parents=True, exist_ok=True)
        log = MetricsLog(run_dir, after_step=run.step, tensorboard=config.tensorboard)
        if state is None:
            checkpoint.remove_all(run_dir)
    parameters = sum(p.numel() for p in run.module.parameters())
    bar = tqdm(
        total=config.steps,
        initial=run.step,
        unit="step",
        disable=quiet or not is_first,
        dynamic_ncols=True,
    )
    if not bar.disable:
        bar.write(
            f"{config.model}, {parameters / 1e6:.1f} M parameters; corpus {corpus.path}, "
            f"{len(corpus.train) / 1e6:.2f} MB to train on, {len(corpus.held_out) / 1e6:.2f} MB "
            f"held out; {config.batch_size * config.accumulate} windows of {run.window} bytes "
            "a step"
        )
    with stop_on_signal() as stopped, hk.use_backend(config.backend):
        _loop(run, corpus, log, bar, stopped)
    bar.close()
    if log is not None:
        log.close()
    return run


def _loop(run: Run, corpus: Corpus, log: MetricsLog | None, bar: tqdm, stopped: list[int]) -> None:
    config, run_dir = run.config, Path(run.config.out)
    before, began = run.seconds, time.monotonic()

    def tick() -> bool:
        """Looks at the clock and the signals, of the first process; False if it is to end."""
        now = before + time.monotonic() - began
        run.seconds, stop = distributed.first_decides((now, bool(stopped)))
        return config.progress(run.step, run.seconds) < 1 and not stop

    def write(**values: float) -> None:
        if log is not None:
            log.write(step=run.step, seconds=round(run.seconds, 2), **values)

    def evaluate() -> None:
        bits = run.metrics["held_out_bits_per_byte"] = run.evaluate(corpus.held_out)
        tick()
        write(held_out_bits_per_byte=bits)
        if not bar.disable:
            bar.write(f"step {run.step}, {run.seconds:.0f} s: held out {bits:.3f} bits per byte")

    begun_at = evaluated_at = run.step
    goes_on = tick()
    while goes_on:
        loss, norm, rate = run.train_step(corpus.train)
        goes_on = tick()
        bar.update()
        logs, evaluates, samples, saves = (
            every > 0 and run.step % every == 0
            for every in (
                config.log_every,
                config.eval_every,
                config.sample_every,
                config.save_every,
            )
        )
        if logs or evaluates or saves or not goes_on:
            bits = run.metrics["train_bits_per_byte"] = float(loss) / math.log(2)
            if not math.isfinite(bits):  # seen before a checkpoint of it replaces a good one
                raise FloatingPointError(
                    f"the loss is {bits} at step {run.step}: try a lower learning_rate"
                )
            bar.set_postfix({name.split("_bits")[0]: f"{v:.3f}" for name, v in run.metrics.items()})
            write(train_bits_per_byte=bits, gradient_norm=float(norm), learning_rate=rate)
        if evaluates:
            evaluate()
            evaluated_at = run.step
        if samples and log is not None and (config.tensorboard or not bar.disable):
            prompt, text = run.sample(corpus.held_out)
            log.write_sample(run.step, prompt + text)
            if not bar.disable:
                bar.write(
                    f"--- sample: {len(prompt)} characters are the prompt\n{prompt}{text}\n---"
                )
        if saves:
            run.save(run_dir)
        if evaluates or samples or saves:
            goes_on = tick()
    was_stopped = config.progress(run.step, run.seconds) < 1
    if run.step > begun_at:
        if evaluated_at != run.step and not was_stopped:
            evaluate()
        run.save(run_dir)
    if not bar.disable:
        why = "stopped" if was_stopped else "done"
        bar.write(f"{why} at step {run.step}; checkpoint in {run_dir}")


def build_parser() -> argparse.ArgumentParser:
    """The command line: one option for each field of TrainConfig, and what to do with old runs."""
    defaults = "\n".join(
        f"  {name}: " + ", ".join(f"{key}={_text(v)}" for key, v in entry.options.items())
        for name, entry in MODELS.items()
    )
    parser = argparse.ArgumentParser(
        prog="python -m python_models.train",
        description="Train a model on bytes and report bits per byte on held-out ones.",
        epilog=f"options of the models (--option) and their defaults:\n{defaults}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    types = {"int": int, "float": float, "str": str, "tuple": str}
    for entry in dataclasses.fields(TrainConfig):
        metadata = dict(entry.metadata)
        text = metadata.pop("help")
        if entry.default not in (None, (), "", False):
            text += f" (default: {entry.default})"
        kind = str(entry.type).split(" ")[0].split("[")[0]
        parser.add_argument(
            "--" + entry.name.replace("_", "-"),
            default=argparse.SUPPRESS,  # so that resuming knows which were given
            help=text,
            **({"action": "store_true"} if kind == "bool" else {"type": types[kind]}),
            **metadata,
        )
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--resume", action="store_true", help="go on from the run folder's checkpoint"
    )
    group.add_argument(
        "--overwrite", action="store_true", help="replace the run folder's checkpoint"
    )
    return parser


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else json.dumps(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    given = vars(build_parser().parse_args(arguments))
    resume, overwrite = given.pop("resume"), given.pop("overwrite")
    try:
        if resume:
            model = given.get("model", TrainConfig.model)
            folder = checkpoint.find(given.get("out", f"runs/{model}"))
            given = {**checkpoint.load_state(folder)["config"], **given}
        if "option" in given:
            given["option"] = tuple(given["option"])
        train(TrainConfig(**given), resume=resume, overwrite=overwrite)
    except (ValueError, TypeError, FloatingPointError, NotImplementedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
