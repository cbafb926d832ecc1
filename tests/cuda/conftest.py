"""The emulated CUDA core, built once; the tests are skipped where there is no C++ compiler."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
from emulation import build

from hierkernels import cuda_core


@pytest.fixture(scope="session")
def emulated_core() -> ModuleType:
    """The library's CUDA sources, compiled for the emulation."""
    try:
        return build.load()
    except build.NoCompiler as error:
        pytest.skip(str(error))


@pytest.fixture
def emulation(emulated_core: ModuleType) -> Iterator[ModuleType]:
    """The emulated core with all checks on, and no memory allowed."""
    emulated_core.set_options(seed=1, races=True, bounds=True)
    emulated_core.forbid_all()
    yield emulated_core
    emulated_core.forbid_all()


@pytest.fixture
def emulated_cuda(emulation: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """backend="cuda" computes CPU tensors, by the emulation."""
    monkeypatch.setattr(cuda_core, "emulated_core", emulation)
    return emulation
