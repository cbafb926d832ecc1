"""Trains a model on bytes: ``python -m python_models.train --help``.

A run folder holds ``metrics.jsonl`` (one line a measurement, so that the curve can be drawn) and
the newest checkpoint. Ctrl-C finishes the step, saves and ends; a second one ends at once. Limited
by steps, a run that was stopped and resumed is the same, bit for bit, as one that was not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import hierkernels as hk
from python_models import checkpoint
from python_models.data import Corpus, evaluation_batches, random_batch
from python_models.registry import MODELS, ByteModel, continue_bytes

_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _option(default: Any, text: str, **keywords: Any) -> Any:
    return field(default=default, metadata={"help": text, **keywords})


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines a run. Each field is an option of the command line."""

    model: str = _option("megabyte", "which model", choices=sorted(MODELS))
    option: tuple[str, ...] = _option(
        (), "change a constructor argument, such as dim=384,256", nargs="+", metavar="NAME=VALUE"
    )
    data: str | None = _option(
        None, "file or folder of bytes (default: the Python source of the standard library)"
    )
    pattern: str = _option("*", "which names of a data folder to read")
    cache_dir: str | None = _option(None, "where joined data files are kept (default: ~/.cache)")
    out: str = _option("", "the run folder (default: runs/ and the name of the model)")
    steps: int | None = _option(None, "stop after this many steps")
    minutes: float | None = _option(
        None, "stop after this long, evaluations included (default: 10 if steps is not given)"
    )
    batch_size: int = _option(4, "windows of one forward pass")
    accumulate: int = _option(1, "forward passes of one step")
    learning_rate: float = _option(3e-3, "the highest one")
    warmup: int = _option(100, "steps in which the learning rate rises to it")
    final_share: float = _option(0.05, "what the cosine leaves of it in the end")
    weight_decay: float = _option(0.1, "AdamW's, on matrices")
    beta2: float = _option(0.98, "AdamW's decay of the mean square gradient")
    clip: float = _option(1.0, "largest norm of the gradient")
    precision: str = _option(
        "float32", "bfloat16 runs matrix products under autocast", choices=sorted(_PRECISIONS)
    )
    backend: str | None = _option(None, "backend of hierkernels (default: the best there is)")
    device: str = _option("cpu", "such as cpu or cuda")
    threads: int | None = _option(None, "CPU threads (default: PyTorch's)")
    seed: int = _option(0, "of weights, data order and samples")
    log_every: int = _option(10, "steps between lines of the log")
    eval_every: int = _option(200, "steps between evaluations; 0: only at the end")
    eval_windows: int = _option(128, "held-out windows of one evaluation")
    sample_every: int = _option(400, "steps between samples; 0: none")
    sample_bytes: int = _option(160, "length of a sample")
    save_every: int = _option(200, "steps between checkpoints; 0: only at the end")

    def __post_init__(self) -> None:
        if not self.out:
            object.__setattr__(self, "out", f"runs/{self.model}")
        at_least = {
            **dict.fromkeys(("batch_size", "accumulate", "log_every", "eval_windows"), 1),
            **dict.fromkeys(("warmup", "eval_every", "sample_every", "save_every"), 0),
            **dict.fromkeys(("weight_decay", "sample_bytes"), 0),
            **{n: 1 for n in ("steps", "threads") if getattr(self, n) is not None},
        }
        for name, minimum in at_least.items():
            if not getattr(self, name) >= minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {getattr(self, name)}")
        positive = ["learning_rate", "clip", *(["minutes"] if self.minutes is not None else [])]
        for name in positive:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("final_share", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 to below 1, got {getattr(self, name)}")

    @property
    def minute_limit(self) -> float | None:
        """Minutes, with the default."""
        return 10.0 if self.minutes is None and self.steps is None else self.minutes

    def progress(self, step: int, seconds: float) -> float:
        """Share of the run that is over, from 0 to 1, by whichever limit is nearer."""
        by_steps = step / self.steps if self.steps else 0.0
        by_time = seconds / (60 * self.minute_limit) if self.minute_limit else 0.0
        return min(max(by_steps, by_time), 1.0)

    def rate(self, step: int, seconds: float) -> float:
        """Learning rate: a linear rise in ``warmup`` steps, times a cosine over the whole run."""
        rise = min((step + 1) / (self.warmup + 1), 1.0)
        fall = 0.5 * (1 + math.cos(math.pi * self.progress(step, seconds)))
        return self.learning_rate * rise * (self.final_share + (1 - self.final_share) * fall)


class Run:
    """The state of a training run between two steps."""

    def __init__(self, config: TrainConfig, options: dict[str, Any]) -> None:
        self.config = config
        self.options = options
        self.entry: ByteModel = MODELS[config.model]
        self.window = self.entry.window(options)
        self.device = torch.device(config.device)
        torch.manual_seed(config.seed)
        self.module = self.entry.make(options).to(self.device)
        parameters = list(self.module.parameters())
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim >= 2]},
                {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(0.9, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.data_order = torch.Generator().manual_seed(config.seed)
        self.step = 0
        self.seconds = 0.0  # of training, of all the sessions that made this run
        self.metrics: dict[str, float] = {}

    def train_step(self, data: Any) -> tuple[Tensor, Tensor, float]:
        """One update; returns the loss (nats a byte), the gradient's norm and the learning rate."""
        config = self.config
        rate = config.rate(self.step, self.seconds)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.module.train()
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for _ in range(config.accumulate):
            ids = random_batch(
                data,
                batch_size=config.batch_size,
                window=self.window,
                generator=self.data_order,
            )
            with self.autocast():
                loss = self.entry.loss(self.module, ids.to(self.device)) / config.accumulate
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), config.clip)
        self.optimizer.step()
        self.step += 1
        return total, norm, rate

    @torch.no_grad()
    def evaluate(self, data: Any) -> float:
        """Bits per byte of the held-out windows, each one read from its first byte on."""
        self.module.eval()
        nats = count = 0.0
        for ids in evaluation_batches(
            data,
            batch_size=self.config.batch_size,
            window=self.window,
            limit=self.config.eval_windows,
        ):
            with self.autocast():
                loss = self.entry.loss(self.module, ids.to(self.device))
            nats += float(loss) * ids.numel()
            count += ids.numel()
        return nats / count / math.log(2)

    def sample(self, data: Any) -> tuple[str, str]:
        """A prompt from the held-out bytes and what the model makes of it."""
        prompt = bytes(data[: self.window // 4])
        # Its own generator: whether there are samples must not change the training.
        generator = torch.Generator(self.device).manual_seed(self.config.seed + self.step)
        continuation = continue_bytes(
            self.entry,
            self.module,
            prompt,
            self.config.sample_bytes,
            window=self.window,
            filter_thres=0.9,
            temperature=0.8,
            generator=generator,
        )
        return prompt.decode(errors="replace"), bytes(continuation).decode(errors="replace")

    def autocast(self) -> Any:
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_PRECISIONS[self.config.precision])

    def save(self, run_dir: Path) -> Path:
        """Writes a checkpoint from which :meth:`load` goes on as if nothing had happened."""
        tensors = {f"model.{name}": t for name, t in self.module.state_dict().items()}
        for name, parameter in self.module.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        random = {"torch": torch.get_rng_state(), "data": self.data_order.get_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        state = {
            "model": self.config.model,
            "options": self.options,
            "config": dataclasses.asdict(self.config),
            "seconds": self.seconds,
            "metrics": self.metrics,
            "random": {name: bytes(t.tolist()).hex() for name, t in random.items()},
        }
        return checkpoint.save(run_dir, self.step, tensors, state)

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        """Takes over everything that :meth:`save` wrote."""
        tensors = checkpoint.load_tensors(folder, state)
        checkpoint.load_model(self.module, tensors, folder)
        for name, parameter in self.module.named_parameters():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                stored = tensors.get(f"optimizer.{key}.{name}")
                if stored is None:
                    raise checkpoint.CheckpointError(
                        f"checkpoint {folder} lacks optimizer.{key}.{name}: it cannot be resumed"
                    )
                self.optimizer.state[parameter][key] = stored.to(self.device)
        random = {
            name: torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
            for name, text in state["random"].items()
        }
        torch.set_rng_state(random["torch"])
        self.data_order.set_state(random["data"])
        if self.device.type == "cuda" and "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], self.device)
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.metrics = state["metrics"]


class MetricsLog:
    """Appends to ``metrics.jsonl``; what a resumed run did after its checkpoint is cut off."""

    def __init__(self, run_dir: Path, *, after_step: int) -> None:
        self.path = run_dir / "metrics.jsonl"
        kept = []
        if self.path.exists() and after_step:
            for line in self.path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= after_step:
                        kept.append(line + "\n")
                except json.JSONDecodeError:
                    break  # a run was killed while it wrote this line
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(kept))
        os.replace(partial, self.path)

    def write(self, **values: float) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")


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

    Raises:
        ValueError: an option out of range; a corpus or a checkpoint that cannot be used
            (CorpusError, CheckpointError); a run folder with a checkpoint, if neither resume nor
            overwrite says what is to become of it.
    """
    options = MODELS[config.model].parse(config.option)
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
    run_dir.mkdir(parents=True, exist_ok=True)
    if state is not None:
        run.load(folder, state)
    else:
        checkpoint.remove_all(run_dir)
    log = MetricsLog(run_dir, after_step=run.step)
    parameters = sum(p.numel() for p in run.module.parameters())
    bar = tqdm(total=config.steps, initial=run.step, unit="step", disable=quiet, dynamic_ncols=True)
    if not quiet:
        bar.write(
            f"{config.model}, {parameters / 1e6:.1f} M parameters; corpus {corpus.path}, "
            f"{len(corpus.train) / 1e6:.2f} MB to train on, {len(corpus.held_out) / 1e6:.2f} MB "
            f"held out; {config.batch_size * config.accumulate} windows of {run.window} bytes "
            "a step"
        )
    with stop_on_signal() as stopped, hk.use_backend(config.backend):
        _loop(run, corpus, log, bar, stopped)
    bar.close()
    return run


def _loop(run: Run, corpus: Corpus, log: MetricsLog, bar: tqdm, stopped: list[int]) -> None:
    config, run_dir = run.config, Path(run.config.out)
    before, began = run.seconds, time.monotonic()

    def tick() -> None:
        run.seconds = before + time.monotonic() - began

    def evaluate() -> None:
        bits = run.metrics["held_out_bits_per_byte"] = run.evaluate(corpus.held_out)
        tick()
        log.write(step=run.step, seconds=round(run.seconds, 2), held_out_bits_per_byte=bits)
        if not bar.disable:
            bar.write(f"step {run.step}, {run.seconds:.0f} s: held out {bits:.3f} bits per byte")

    begun_at = evaluated_at = run.step
    while config.progress(run.step, run.seconds) < 1 and not stopped:
        loss, norm, rate = run.train_step(corpus.train)
        tick()
        bar.update()
        over = bool(stopped) or config.progress(run.step, run.seconds) >= 1
        logs, evaluates, samples, saves = (
            every > 0 and run.step % every == 0
            for every in (
                config.log_every,
                config.eval_every,
                config.sample_every,
                config.save_every,
            )
        )
        if logs or evaluates or saves or over:
            bits = run.metrics["train_bits_per_byte"] = float(loss) / math.log(2)
            if not math.isfinite(bits):  # seen before a checkpoint of it replaces a good one
                raise FloatingPointError(
                    f"the loss is {bits} at step {run.step}: try a lower learning_rate"
                )
            bar.set_postfix({name.split("_bits")[0]: f"{v:.3f}" for name, v in run.metrics.items()})
            log.write(
                step=run.step,
                seconds=round(run.seconds, 2),
                train_bits_per_byte=bits,
                gradient_norm=float(norm),
                learning_rate=rate,
            )
        if evaluates:
            evaluate()
            evaluated_at = run.step
        if samples and not bar.disable:
            prompt, text = run.sample(corpus.held_out)
            bar.write(f"--- sample: {len(prompt)} characters are the prompt\n{prompt}{text}\n---")
        if saves:
            run.save(run_dir)
    if run.step > begun_at:
        if evaluated_at != run.step and not stopped:
            evaluate()
        run.save(run_dir)
    if not bar.disable:
        why = "stopped" if stopped else "done"
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
        if entry.default not in (None, (), ""):
            text += f" (default: {entry.default})"
        parser.add_argument(
            "--" + entry.name.replace("_", "-"),
            type=types[str(entry.type).split(" ")[0].split("[")[0]],
            default=argparse.SUPPRESS,  # so that resuming knows which were given
            help=text,
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
    sys.exit(main())
