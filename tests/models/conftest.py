"""What the tests of several models share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from python_models.registry import ByteModel, continue_bytes


@pytest.fixture
def continues_bytes() -> Callable[[ByteModel, nn.Module, Tensor], None]:
    """Checks the generation of a model whose window is 24 bytes and whose start token is 256."""

    def check(entry: ByteModel, model: nn.Module, ids: Tensor) -> None:
        """ids (2, 24): greedy draws are those of the model run on everything; streams go on."""
        stream = entry.generate(
            model, ids[:, :20], filter_thres=0.9, temperature=0.0, generator=torch.Generator()
        )
        drawn = torch.stack(list(stream), dim=1)
        assert drawn.shape == (2, 4)
        start = torch.full((2, 1), 256)
        greedy = model(torch.cat((start, ids[:, :20], drawn[:, :3]), dim=1)).argmax(-1)
        assert torch.equal(drawn, greedy[:, 20:])
        more = continue_bytes(
            entry,
            model,
            b"ab",
            60,
            window=24,
            filter_thres=0.9,
            temperature=1.0,
            generator=torch.Generator().manual_seed(0),
        )
        assert len(list(more)) == 60

    return check
