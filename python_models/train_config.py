"""What determines a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from hierkernels import BACKENDS
from python_models.registry import MODELS, PRESETS

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _option(default: Any, text: str, **keywords: Any) -> Any:
    return field(default=default, metadata={"help": text, **keywords})


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines a run. Each field is an option of the command line."""

    model: str = _option("megabyte", "which model", choices=sorted(MODELS))
    preset: str = _option("small", "which sizes of the model", choices=PRESETS)
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
    batch_size: int = _option(4, "windows of one forward pass, of all processes together")
    accumulate: int = _option(1, "forward passes of one step")
    learning_rate: float = _option(3e-3, "the highest one")
    warmup: int = _option(100, "steps in which the learning rate rises to it")
    final_share: float = _option(0.05, "what the cosine leaves of it in the end")
    weight_decay: float = _option(0.1, "AdamW's, on matrices")
    beta2: float = _option(0.98, "AdamW's decay of the mean square gradient")
    clip: float = _option(1.0, "largest norm of the gradient")
    precision: str = _option(
        "float32", "bfloat16 runs matrix products under autocast", choices=sorted(PRECISIONS)
    )
    backend: str | None = _option(
        None, "backend of hierkernels (default: the best there is)", choices=BACKENDS
    )
    device: str = _option("cpu", "such as cpu or cuda")
    threads: int | None = _option(None, "CPU threads (default: PyTorch's)")
    seed: int = _option(0, "of weights, data order and samples")
    log_every: int = _option(10, "steps between lines of the log")
    eval_every: int = _option(200, "steps between evaluations; 0: only at the end")
    eval_windows: int = _option(128, "held-out windows of one evaluation")
    sample_every: int = _option(400, "steps between samples; 0: none")
    sample_bytes: int = _option(160, "length of a sample")
    tensorboard: bool = _option(False, "also log for TensorBoard, into the run folder")
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
