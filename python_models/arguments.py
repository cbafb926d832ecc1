"""Checks that several models make of what they are given."""

from __future__ import annotations

import torch
from torch import Tensor


def check_integers(name: str, values: object, *, minimum: int) -> None:
    """Raises TypeError or ValueError unless values is a tuple of integers from minimum on."""
    if not isinstance(values, tuple):
        raise TypeError(f"{name} must be a tuple of integers, got {values!r}")
    if not all(type(value) is int for value in values):
        raise TypeError(f"{name} must be made of integers, got {values}")
    if any(value < minimum for value in values):
        raise ValueError(f"{name} must be at least {minimum} everywhere, got {values}")


def check_integer(name: str, value: object, *, minimum: int) -> None:
    """Raises TypeError or ValueError unless value is an integer from minimum on."""
    if type(value) is not int:
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_device(device: str) -> torch.device:
    """The device of that name; ValueError unless PyTorch can use it on this machine."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device must be one that PyTorch can use here, such as cpu, got {device!r}: {reason}"
        ) from error
    return found


def check_token_type(name: str, ids: object, device: torch.device) -> None:
    """Raises TypeError or ValueError unless ids is a tensor of integers on the device."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(ids).__name__}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {ids.dtype}")
    if ids.device != device:
        raise ValueError(f"{name} must be on the model's device {device}, got {ids.device}")


def check_token_values(name: str, ids: Tensor, num_tokens: int) -> None:
    """Raises ValueError unless ids are from 0 to num_tokens - 1; looks at tensors on the CPU only.

    On a GPU this would wait for the device at every call, and a compiler cannot trace it.
    """
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= num_tokens:
            raise ValueError(
                f"{name} must be from 0 to num_tokens - 1 = {num_tokens - 1}, got values "
                f"from {low} to {high}"
            )


def check_mask(name: str, mask: object, device: torch.device, *shapes: tuple[int, int]) -> None:
    """Raises TypeError or ValueError unless mask is bool, on the device, and of one of the shapes.

    The shapes are (batch, tokens).
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool (True = real token), got {mask.dtype}")
    if tuple(mask.shape) not in shapes:
        raise ValueError(
            f"{name} must have shape (batch, tokens) = {' or '.join(map(str, shapes))}, "
            f"got {tuple(mask.shape)}"
        )
    if mask.device != device:
        raise ValueError(f"{name} must be on the model's device {device}, got {mask.device}")
