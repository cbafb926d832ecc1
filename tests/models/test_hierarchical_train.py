"""HierarchicalTransformer through the commands: trained, evaluated on every byte, sampled."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from python_models import HierarchicalTransformer, checkpoint, sample
from python_models.registry import MODELS
from python_models.train import TrainConfig, main

OPTIONS = ["dim=24,32", "depth=2", "seq_len=24", "heads=2,3", "dim_head=8,8", "ff_mult=2,2"]
OPTIONS += ["hierarchies=1,4", "hierarchical_stride=1,2", "window_sizes=6,null"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    data = tmp_path / "text"
    data.write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 60)
    return data


def test_commands(text: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture) -> None:
    """It learns, its checkpoint has its options, and it can be sampled, from nothing too."""
    arguments = ["--model", "hierarchical", "--data", str(text), "--option", *OPTIONS]
    arguments += ["--batch-size", "8", "--warmup", "5", "--learning-rate", "0.01"]
    arguments += ["--eval-every", "40", "--sample-every", "0", "--save-every", "80"]
    assert main([*arguments, "--steps", "80", "--out", str(tmp_path / "run")]) == 0
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    bits = [line["held_out_bits_per_byte"] for line in log if "held_out_bits_per_byte" in line]
    assert bits[1] < bits[0] < math.log2(257)
    assert bits[1] < 2.0

    folder = checkpoint.find(tmp_path / "run")
    state = checkpoint.load_state(folder, model="hierarchical")
    assert state["options"]["window_sizes"] == [6, None]
    prompt = ["--checkpoint", str(folder), "--bytes", "50", "--temperature", "0"]
    capfdbinary.readouterr()
    for text_before in ("", "the quick brown fox jumps over the lazy dog\nthe"):
        assert sample.main([*prompt, "--prompt", text_before]) == 0
        out = capfdbinary.readouterr().out
        assert out.startswith(text_before.encode())
        assert len(out) == len(text_before) + 51


def test_options_of_hierarchies() -> None:
    entry = MODELS["hierarchical"]
    # From a checkpoint, where tuples have become lists.
    model = entry.make(json.loads(json.dumps(entry.parse(OPTIONS))))
    assert isinstance(model, HierarchicalTransformer)
    assert [(h.factor, h.stride, h.window) for h in model.hierarchies] == [(1, 1, 6), (4, 2, None)]
    with pytest.raises(ValueError, match="hierarchical_stride must be one value or a tuple of 3"):
        entry.make(entry.parse(["hierarchies=1,2,4"]))
    assert TrainConfig(model="hierarchical").out == "runs/hierarchical"


def test_every_byte_is_predicted(continues_bytes: Callable[..., None]) -> None:
    """The first one too, from the token that stands before it; and generation agrees."""
    entry = MODELS["hierarchical"]
    model = entry.make(entry.parse(OPTIONS)).double()
    ids = torch.randint(256, (2, 24))
    with_start = torch.cat((torch.full((2, 1), 256), ids), dim=1)
    log_p = model(with_start[:, :-1]).log_softmax(-1)
    expected = -log_p.gather(-1, ids[..., None]).mean()
    loss = entry.loss(model, ids)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)

    # Trained for the total.
    total, parts = model(with_start, return_loss=True)
    assert len(parts) == 3
    assert min(part.item() for part in parts) > 0.1
    parameters = list(model.parameters())
    expected_gradients = torch.autograd.grad(total, parameters)
    for got, gradient in zip(
        torch.autograd.grad(loss, parameters), expected_gradients, strict=True
    ):
        torch.testing.assert_close(got, gradient, rtol=0, atol=1e-12)

    continues_bytes(entry, model, ids)
