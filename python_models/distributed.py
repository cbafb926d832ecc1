"""Several processes that train one model: what torchrun starts, or one process by itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Joins the processes that torchrun started, if it did; on the CPU by gloo, else by nccl."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield
        return
    if device == "cuda":  # the default device of a process is its own
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    try:
        yield
        dist.barrier()  # gloo aborts a process that leaves while another is still connected to it
    finally:
        dist.destroy_process_group()


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process; 0 is the one that writes files and speaks."""
    return dist.get_rank() if dist.is_initialized() else 0


def share(batch: Tensor) -> Tensor:
    """This process's rows of a batch, an equal part for each."""
    return batch.chunk(world_size())[rank()] if world_size() > 1 else batch


def total(values: Tensor) -> Tensor:
    """The sum over the processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def first_decides(value: object) -> object:
    """Process 0's value, in all of them."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def gather(value: object) -> list[object]:
    """Everybody's value, in the order of their numbers."""
    values: list[object] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values
