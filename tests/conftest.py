"""What all tests share: threads, when the marked ones run, and the instruction sets to run on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from hierkernels.native import native, native_error


def pytest_configure(config: pytest.Config) -> None:
    """Workers of pytest-xdist share the cores: one thread each, and for what they start.

    Tests of what several threads do set the number of threads themselves.
    """
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked slow run only where -m names them; tests marked gpu, where there is a GPU."""
    slow = pytest.mark.skip(reason="slow: run with -m slow")
    gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "slow" in item.keywords and "slow" not in config.option.markexpr:
            item.add_marker(slow)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(gpu)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Every test draws the same numbers, alone or in any order."""
    torch.manual_seed(0)


@pytest.fixture
def set_isa() -> Iterator[Callable[[str], None]]:
    """Chooses the instruction set of the CPU kernels; the one before is restored afterwards."""
    core = native()
    if core is None:
        pytest.skip(f"the compiled core is missing: {native_error()}")
    before = core.cpu_isa()
    yield core.set_cpu_isa
    core.set_cpu_isa(before)
