"""Checkpoints: a folder with the tensors (safetensors) and what is not a tensor (JSON).

A checkpoint is written to a folder of another name and renamed when it is complete, so a folder of
the right name is never half a checkpoint. The JSON holds the hash of the tensor file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 2
_PREFIX = "checkpoint-"
TENSORS = "tensors.safetensors"
STATE = "state.json"


class CheckpointError(ValueError):
    """The checkpoint is missing, damaged, or of another model."""


def save(run_dir: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Writes ``checkpoint-<step>`` into run_dir and then removes the older ones.

    A step that is there already is left as it is: a run passes each step once.
    """
    target = run_dir / f"{_PREFIX}{step:08d}"
    if target.exists():
        return target
    partial = run_dir / f".partial-{target.name}-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, partial / TENSORS)
    content = {"format": FORMAT, "step": step, "sha256": _hash(partial / TENSORS), **state}
    (partial / STATE).write_text(json.dumps(content, indent=1) + "\n")
    for file in (partial / TENSORS, partial / STATE):
        with file.open("rb") as stream:  # on the disk before the name is: a crash may follow
            os.fsync(stream.fileno())
    partial.rename(target)
    for other in _list(run_dir):
        if other != target:
            shutil.rmtree(other)
    return target


def find(path: str | os.PathLike[str]) -> Path:
    """The checkpoint folder that path is, or the newest one in it."""
    path = Path(path)
    if (path / STATE).exists() or path.name.startswith(_PREFIX):
        return path
    found = _list(path)
    if not found:
        raise CheckpointError(f"there is no checkpoint in {path}")
    return found[-1]


def exists(run_dir: Path) -> bool:
    """Whether run_dir holds a complete checkpoint."""
    return bool(_list(run_dir))


def remove_all(run_dir: Path) -> None:
    """Deletes every checkpoint in run_dir."""
    for old in _list(run_dir):
        shutil.rmtree(old)


def load_state(checkpoint: Path, *, model: str | None = None) -> dict[str, Any]:
    """The JSON part, checked: that it is one of ours, and of this model if one is named."""
    file = checkpoint / STATE
    try:
        state = json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint file {file} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"checkpoint file {file} is damaged: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"checkpoint file {file} is not a checkpoint: it holds no object")
    missing = {"format", "step", "sha256", "model", "options"} - set(state)
    if missing:
        raise CheckpointError(f"checkpoint file {file} lacks {sorted(missing)}: not a checkpoint")
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"checkpoint file {file} has format {state['format']}, this version reads {FORMAT}"
        )
    if model is not None and state["model"] != model:
        raise CheckpointError(
            f"checkpoint file {file} is of the model {state['model']!r}, expected {model!r}"
        )
    return state


def load_tensors(checkpoint: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors, after their hash has been compared with the one in the JSON part."""
    file = checkpoint / TENSORS
    if not file.exists():
        raise CheckpointError(f"checkpoint file {file} does not exist")
    if _hash(file) != state["sha256"]:
        raise CheckpointError(
            f"checkpoint file {file} is damaged or cut short: its hash is not the one in {STATE}"
        )
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint file {file} is damaged: {error}") from error


def load_model(module: torch.nn.Module, tensors: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Puts the tensors named ``model.*`` into the module, all of them and no others."""
    weights = {
        name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")
    }
    try:
        module.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"checkpoint file {checkpoint / TENSORS} does not fit the model: {error}"
        ) from error


def _list(run_dir: Path) -> list[Path]:
    return sorted(path for path in run_dir.glob(f"{_PREFIX}*") if (path / STATE).exists())


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
