"""A training run between two steps: the model, its optimizer, the order of the data, and time."""

from __future__ import annotations

import dataclasses
import gc
import math
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from python_models import checkpoint, distributed
from python_models.arguments import check_device
from python_models.data import evaluation_batches, random_batch
from python_models.registry import MODELS, ByteModel, continue_bytes
from python_models.train_config import PRECISIONS, TrainConfig

_ADAM = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of a parameter


class _Loss(nn.Module):
    """The loss as a module's forward pass, which is what DistributedDataParallel watches."""

    def __init__(self, entry: ByteModel, module: nn.Module) -> None:
        super().__init__()
        self.entry = entry
        self.module = module

    def forward(self, ids: Tensor) -> Tensor:
        return self.entry.loss(self.module, ids)


class Run:
    """The state of a training run between two steps; of one process, if there are several."""

    def __init__(self, config: TrainConfig, options: dict[str, Any]) -> None:
        self.config = config
        self.options = options
        self.entry: ByteModel = MODELS[config.model]
        self.window = self.entry.window(options)
        self.device = check_device(config.device)
        torch.manual_seed(config.seed)
        self.module = self.entry.make(options).to(self.device)
        self.loss: nn.Module = _Loss(self.entry, self.module)
        if distributed.world_size() > 1:
            if config.batch_size % distributed.world_size():
                raise ValueError(
                    f"batch_size must be a multiple of the {distributed.world_size()} processes, "
                    f"got {config.batch_size}"
                )
            torch.manual_seed(config.seed + distributed.rank())  # dropout differs, weights do not
            # Layers that are dropped leave parameters without a gradient.
            self.loss = DistributedDataParallel(self.loss, find_unused_parameters=True)
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

    def leave(self) -> None:
        """Parts from the other processes: the run trains no more."""
        if isinstance(self.loss, DistributedDataParallel):
            # It holds the group, whose threads must end before the process does.
            self.loss = self.loss.module
            gc.collect()

    def train_step(self, data: Any) -> tuple[Tensor, Tensor, float]:
        """One update; returns the loss (nats a byte), the gradient's norm and the learning rate."""
        config = self.config
        rate = config.rate(self.step, self.seconds)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.module.train()
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for last in [False] * (config.accumulate - 1) + [True]:
            ids = random_batch(
                data,
                batch_size=config.batch_size,
                window=self.window,
                generator=self.data_order,
            )
            with self.gradients(shared=last):
                with self.autocast():
                    loss = self.loss(distributed.share(ids).to(self.device)) / config.accumulate
                loss.backward()
            total += loss.detach()
        total = distributed.total(total) / distributed.world_size()
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), config.clip)
        self.optimizer.step()
        self.step += 1
        return total, norm, rate

    @torch.no_grad()
    def evaluate(self, data: Any) -> float:
        """Bits per byte of the held-out windows, each one read from its first byte on."""
        self.module.eval()
        batches = evaluation_batches(
            data,
            batch_size=self.config.batch_size,
            window=self.window,
            limit=self.config.eval_windows,
        )
        nats = count = 0.0
        for ids in islice(batches, distributed.rank(), None, distributed.world_size()):
            with self.autocast():
                loss = self.entry.loss(self.module, ids.to(self.device))
            nats += float(loss) * ids.numel()
            count += ids.numel()
        nats, count = distributed.total(torch.tensor([nats, count], dtype=torch.float64)).tolist()
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

    def gradients(self, *, shared: bool) -> Any:
        """Whether the backward pass within adds up the gradients of all processes."""
        if isinstance(self.loss, DistributedDataParallel) and not shared:
            return self.loss.no_sync()
        return nullcontext()

    def autocast(self) -> Any:
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=PRECISIONS[self.config.precision])

    def save(self, run_dir: Path) -> None:
        """Writes a checkpoint from which :meth:`load` goes on as if nothing had happened."""
        random = {"torch": torch.get_rng_state(), "data": self.data_order.get_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        of_all = distributed.gather({name: bytes(t.tolist()).hex() for name, t in random.items()})
        if distributed.rank():
            return
        tensors = {f"model.{name}": t for name, t in self.module.state_dict().items()}
        for name, parameter in self.module.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        state = {
            "model": self.config.model,
            "options": self.options,
            "config": dataclasses.asdict(self.config),
            "seconds": self.seconds,
            "metrics": self.metrics,
            "random": of_all,
        }
        checkpoint.save(run_dir, self.step, tensors, state)

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        """Takes over everything that :meth:`save` wrote."""
        if len(state["random"]) != distributed.world_size():
            raise checkpoint.CheckpointError(
                f"checkpoint {folder} was written by {len(state['random'])} processes and goes on "
                f"with as many, got {distributed.world_size()}"
            )
        tensors = checkpoint.load_tensors(folder, state)
        checkpoint.load_model(self.module, tensors, folder)
        for name, parameter in self.module.named_parameters():
            keys = [key for key in _ADAM if f"optimizer.{key}.{name}" in tensors]
            if len(keys) not in (0, len(_ADAM)):  # none: it has never had a gradient
                raise checkpoint.CheckpointError(
                    f"checkpoint {folder} has only {keys} of the optimizer's state of {name}"
                )
            for key in keys:
                stored = tensors[f"optimizer.{key}.{name}"]
                self.optimizer.state[parameter][key] = stored.to(self.device)
        random = {
            name: torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
            for name, text in state["random"][distributed.rank()].items()
        }
        torch.set_rng_state(random["torch"])
        self.data_order.set_state(random["data"])
        if self.device.type == "cuda" and "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], self.device)
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.metrics = state["metrics"]
