"""Eager PyTorch on one thread: its many small parallel regions crawl on a machine that is shared.

The kernels' own tests set the thread count around the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
