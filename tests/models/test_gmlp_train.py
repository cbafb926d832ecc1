"""gMLPGPT through the commands: trained, evaluated on every byte, sampled."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from python_models import checkpoint, gMLPGPT, sample
from python_models.registry import MODELS
from python_models.train import TrainConfig, main

OPTIONS = ["dim=24", "depth=2", "seq_len=24", "heads=2", "ff_mult=2", "window=[5,1],[4,2]"]
OPTIONS += ["attn_dim=6", "reversible=true"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    data = tmp_path / "text"
    data.write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 60)
    return data


def test_commands(text: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture) -> None:
    """It learns, its checkpoint has its options, and it can be sampled, from nothing too."""
    arguments = ["--model", "gmlp-gpt", "--data", str(text), "--option", *OPTIONS]
    arguments += ["--batch-size", "8", "--warmup", "5", "--learning-rate", "0.01"]
    arguments += ["--eval-every", "60", "--sample-every", "0", "--save-every", "60"]
    whole = [*arguments, "--steps", "120"]
    assert main([*whole, "--out", str(tmp_path / "whole")]) == 0
    log = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").open()]
    bits = [line["held_out_bits_per_byte"] for line in log if "held_out_bits_per_byte" in line]
    assert bits[1] < bits[0] < math.log2(257)
    assert bits[1] < 2.0

    folder = checkpoint.find(tmp_path / "whole")
    state = checkpoint.load_state(folder, model="gmlp-gpt")
    assert state["options"]["window"] == [[5, 1], [4, 2]]
    prompt = ["--checkpoint", str(folder), "--bytes", "50", "--temperature", "0"]
    capfdbinary.readouterr()
    for text_before in ("", "the quick brown fox jumps over the lazy dog\nthe"):
        assert sample.main([*prompt, "--prompt", text_before]) == 0
        out = capfdbinary.readouterr().out
        assert out.startswith(text_before.encode())
        assert len(out) == len(text_before) + 51


def test_options_of_windows() -> None:
    entry = MODELS["gmlp-gpt"]
    options = entry.parse(["depth=2", "window=[5,1],[4,2]", "attn_dim=null", "reversible=true"])
    assert options["window"] == ((5, 1), (4, 2))
    # From a checkpoint, where tuples have become lists.
    model = entry.make(json.loads(json.dumps({**options, "dim": 8})))
    assert isinstance(model, gMLPGPT)
    assert [block.f.net.fn.every for block in model.net.blocks] == [1, 2]
    assert model.net.blocks[0].f.net.fn.fn.attn is None
    with pytest.raises(ValueError, match=r"window must be .* depth = 6"):
        entry.make(entry.parse(["window=5"]))
    assert TrainConfig(model="gmlp-gpt").out == "runs/gmlp-gpt"
    assert TrainConfig().out == "runs/megabyte"


def test_every_byte_is_predicted(continues_bytes: Callable[..., None]) -> None:
    """The first one too, from the token that stands before it; and generation agrees."""
    entry = MODELS["gmlp-gpt"]
    options = {**entry.parse(OPTIONS[:5]), "window": 5, "depth": 2}
    model = entry.make(options).double().eval()
    ids = torch.randint(256, (2, 24))
    with_start = torch.cat((torch.full((2, 1), 256), ids), dim=1)
    log_p = model(with_start[:, :-1]).log_softmax(-1)
    expected = -log_p.gather(-1, ids[..., None]).mean()
    torch.testing.assert_close(entry.loss(model, ids), expected, rtol=0, atol=1e-12)

    continues_bytes(entry, model, ids)
