"""Models on disk: a folder with config.json and model.safetensors, and the originals' own files."""

from __future__ import annotations

import inspect
import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FORMAT = 1
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
# Wrappers of a model put these before every name of its state dict.
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
_PLAIN = (bool, int, float, str, type(None))


class PretrainedError(ValueError):
    """The folder or file is missing, damaged, or of another model."""


class Pretrained:
    """Adds save_pretrained, from_pretrained and load_upstream to a module.

    The arguments that the module is constructed with are remembered as ``options``.
    """

    options: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        module = super().__new__(cls)
        # A copy is made without arguments and takes over the attribute; wrong ones are __init__'s
        # to refuse, in its own words.
        try:
            bound = inspect.signature(cls.__init__).bind(module, *args, **kwargs)
        except TypeError:
            return module
        options = dict(list(bound.arguments.items())[1:])
        for name, parameter in inspect.signature(cls.__init__).parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                options |= options.pop(name, {})
        module.options = options
        return module

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes config.json and model.safetensors into folder, which is made if need be.

        Raises:
            FileExistsError: the folder holds a model already; nothing is written.
            TypeError: the model was constructed with an argument that JSON cannot hold.
        """
        assert isinstance(self, nn.Module)
        folder = Path(folder)
        for name, value in self.options.items():
            if not _is_plain(value):
                raise TypeError(
                    f"{type(self).__name__} was made with {name}={value!r}, which {CONFIG} cannot "
                    "hold: save its state_dict() instead"
                )
        for file in (folder / CONFIG, folder / WEIGHTS):
            if file.exists():
                raise FileExistsError(f"{file} exists: choose another folder, or remove it")
        folder.mkdir(parents=True, exist_ok=True)
        # Two names of one tensor are both written: the format has no links.
        tensors = {name: t.detach().clone().contiguous() for name, t in self.state_dict().items()}
        config = {"format": FORMAT, "model": type(self).__name__, "options": self.options}
        save_file(tensors, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """The model that save_pretrained wrote, on the CPU, in training mode as if just made.

        Raises:
            PretrainedError: the folder is missing, damaged, or of another model or version.
        """
        config, weights = Path(folder) / CONFIG, Path(folder) / WEIGHTS
        for file in (config, weights):
            if not file.exists():
                raise PretrainedError(f"{file} does not exist")
        try:
            content = json.loads(config.read_text())
            form, model, options = (content[key] for key in ("format", "model", "options"))
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError) as error:
            raise PretrainedError(f"{config} is damaged: {error!r}") from error
        if form != FORMAT:
            raise PretrainedError(f"{config} has format {form}, this version reads {FORMAT}")
        if model != cls.__name__:
            raise PretrainedError(f"{config} is of the model {model}, expected {cls.__name__}")
        try:
            module = cls(**{name: tuples(value) for name, value in options.items()})
        except (TypeError, ValueError) as error:
            raise PretrainedError(f"{config} has options that make no {model}: {error}") from error
        try:
            tensors = load_file(weights)
        except SafetensorError as error:
            raise PretrainedError(f"{weights} is damaged: {error}") from error
        _load(module, tensors, weights)
        return module

    def load_upstream(self, path: str | os.PathLike[str]) -> Self:
        """Takes over a state dict of the original package, saved with torch.save; returns self.

        The file may hold the state dict itself or have it under "model" or "state_dict"; names may
        begin with what DistributedDataParallel or torch.compile put before them. Only tensors are
        read, no code of the file runs.

        Raises:
            PretrainedError: no such file, no state dict in it, or one of another model or size.
        """
        path = Path(path)
        if not path.exists():
            raise PretrainedError(f"{path} does not exist")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise PretrainedError(f"{path} is no file of tensors: {error}") from error
        for key in ("model", "state_dict"):
            if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
                content = content[key]
        if not isinstance(content, Mapping) or not all(
            isinstance(t, Tensor) for t in content.values()
        ):
            raise PretrainedError(f"{path} holds no state dict, but {type(content).__name__}")
        tensors = dict(content)
        for prefix in _WRAPPER_PREFIXES:
            if tensors and all(name.startswith(prefix) for name in tensors):
                tensors = {name.removeprefix(prefix): t for name, t in tensors.items()}
        assert isinstance(self, nn.Module)
        _load(self, tensors, path)
        return self


def tuples(value: Any) -> Any:
    """Lists, and those in them, as tuples: JSON knows only lists, the models take tuples."""
    return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value


def _is_plain(value: Any) -> bool:
    """Whether the value comes back equal from JSON (tuples as lists)."""
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(entry) for key, entry in value.items())
    return isinstance(value, _PLAIN)


def _load(module: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """All tensors and no others; nothing is changed if they do not fit."""
    own = module.state_dict()
    problems = [f"lacks {name}" for name in own if name not in tensors]
    problems += [f"has an unknown {name}" for name in tensors if name not in own]
    problems += [
        f"has {name} of shape {tuple(tensors[name].shape)}, expected {tuple(t.shape)}"
        for name, t in own.items()
        if name in tensors and tensors[name].shape != t.shape
    ]
    if problems:
        shown = "; ".join(problems[:3])
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise PretrainedError(
            f"{source} does not fit this {type(module).__name__}: it {shown}{more}"
        )
    module.load_state_dict(tensors)
