"""Which backend computes an operator: one table, and a reason for every refusal.

Order of choice: the call's `backend=`, then `with hk.use_backend(...)`, then the environment
variable HIERKERNELS_BACKEND, then the first supported backend of AUTO_ORDER.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

BACKENDS = ("cuda", "triton", "cpu", "reference")
# On GPUs Triton comes first until a committed measurement says that the CUDA core is faster.
AUTO_ORDER = {"cuda": ("triton", "cuda", "reference"), "cpu": ("cpu", "reference")}
# Backends without kernels for an operator beside the great ones.
NO_KERNELS = {"gelu": ("cuda",), "rms_norm": ("cuda",), "rotary": ("cuda",)}

_forced: list[str] = []


def check_backend_name(backend: str, source: str = "backend") -> str:
    """Returns backend, or raises ValueError naming `source` when there is no such backend."""
    if backend not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
    return backend


@contextlib.contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Forces a backend for every op called inside; None restores the automatic choice."""
    if backend is not None:
        check_backend_name(backend)
    _forced.append(backend or "")
    try:
        yield
    finally:
        _forced.pop()


def requested_backend(backend: str | None, without: tuple[str, ...] = ()) -> str:
    """The backend that is asked for, "" when the choice is free.

    `without`: the operator's NO_KERNELS. Where one is forced for all operators alike, the
    choice is free. Asked for by the call itself, it refuses.
    """
    if backend is not None:
        return check_backend_name(backend)
    if _forced:
        name = _forced[-1]
    else:
        named = os.environ.get("HIERKERNELS_BACKEND", "")
        name = check_backend_name(named, "HIERKERNELS_BACKEND") if named else ""
    return "" if name in without else name


class Choice(NamedTuple):
    """The chosen backend and why each other one that was asked refused."""

    backend: str
    refusals: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [f"backend: {self.backend}"]
        for name, reasons in self.refusals.items():
            lines += [f"  {name}: {reason}" for reason in reasons]
        return "\n".join(lines)


@functools.cache
def load_backend(op: str, backend: str) -> ModuleType:
    """The module hierkernels.ops.<op>.<backend>; imported on first use only."""
    return importlib.import_module(f"hierkernels.ops.{op}.{backend}")


def _reasons(op: str, backend: str, problem: Any) -> list[str]:
    try:
        module = load_backend(op, backend)
    except ImportError as error:
        return [f"cannot be imported: {error}"]
    return module.supports(problem)


def resolve(op: str, problem: Any, backend: str = "") -> Choice:
    """Chooses the backend for a problem (which has .device_type).

    Raises NotImplementedError, with every reason, if the backend asked for refuses.
    """
    if backend:
        reasons = _reasons(op, backend, problem)
        if reasons:
            raise NotImplementedError(
                f"{op}: backend {backend!r} does not support this call: " + "; ".join(reasons)
            )
        return Choice(backend, {})
    refusals: dict[str, list[str]] = {}
    for name in AUTO_ORDER.get(problem.device_type, ("reference",)):
        reasons = _reasons(op, name, problem)
        if not reasons:
            return Choice(name, refusals)
        refusals[name] = reasons
    raise NotImplementedError(f"{op}: no backend supports this call: {refusals}")


def module_for(op: str, problem: Any, backend: str = "") -> ModuleType:
    """The module of the backend that resolve chooses."""
    try:
        first = load_backend(op, backend or AUTO_ORDER.get(problem.device_type, ("reference",))[0])
        if not first.supports(problem):
            return first
    except ImportError:
        pass
    return load_backend(op, resolve(op, problem, backend).backend)


def survey(op: str, problem: Any, backend: str = "") -> Choice:
    """Like resolve, but asks every backend, so that each refusal is listed."""
    refusals = {name: reasons for name in BACKENDS if (reasons := _reasons(op, name, problem))}
    return Choice(resolve(op, problem, backend).backend, refusals)
