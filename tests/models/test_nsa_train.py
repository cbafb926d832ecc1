"""The NSA Transformer through the commands: trained, evaluated on every byte, sampled."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from python_models import NSATransformer, SparseAttention, checkpoint, sample
from python_models.nsa_attention import DenseAttention
from python_models.registry import MODELS
from python_models.train import TrainConfig, main

OPTIONS = ["dim=24", "depth=2", "seq_len=24", "heads=4", "kv_heads=2", "dim_head=8"]
OPTIONS += ["sliding_window_size=6", "compress_block_size=4", "compress_block_sliding_stride=2"]
OPTIONS += ["selection_block_size=4", "num_selected_blocks=2"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    data = tmp_path / "text"
    data.write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 60)
    return data


def test_commands(text: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture) -> None:
    """It learns, its checkpoint has its options, and it can be sampled, from nothing too."""
    arguments = ["--model", "nsa", "--data", str(text), "--option", *OPTIONS]
    arguments += ["--batch-size", "8", "--warmup", "5", "--learning-rate", "0.01"]
    arguments += ["--eval-every", "40", "--sample-every", "0", "--save-every", "80"]
    assert main([*arguments, "--steps", "80", "--out", str(tmp_path / "run")]) == 0
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    bits = [line["held_out_bits_per_byte"] for line in log if "held_out_bits_per_byte" in line]
    assert bits[1] < bits[0] < math.log2(257)
    assert bits[1] < 2.0

    folder = checkpoint.find(tmp_path / "run")
    state = checkpoint.load_state(folder, model="nsa")
    assert state["options"]["selection_block_size"] == 4
    prompt = ["--checkpoint", str(folder), "--bytes", "50", "--temperature", "0"]
    capfdbinary.readouterr()
    for text_before in ("", "the quick brown fox jumps over the lazy dog\nthe"):
        assert sample.main([*prompt, "--prompt", text_before]) == 0
        out = capfdbinary.readouterr().out
        assert out.startswith(text_before.encode())
        assert len(out) == len(text_before) + 51


def test_options() -> None:
    entry = MODELS["nsa"]
    model = entry.make(json.loads(json.dumps(entry.parse(OPTIONS))))
    assert isinstance(model, NSATransformer)
    layer = model.layers[0][0]
    assert isinstance(layer, SparseAttention)
    assert (layer.compress_block_size, layer.compress_block_sliding_stride) == (4, 2)
    dense = entry.make(entry.parse([*OPTIONS, "use_sparse_attn=false"]))
    assert isinstance(dense.layers[0][0], DenseAttention)
    paper = entry.make(entry.parse([*OPTIONS, "num_selected_blocks=3", 'preset="paper"']))
    assert paper.layers[0][0].preset == "paper"
    assert TrainConfig(model="nsa").out == "runs/nsa"


def test_every_byte_is_predicted(continues_bytes: Callable[..., None]) -> None:
    """The first one too, from the token that stands before it; and generation agrees."""
    entry = MODELS["nsa"]
    model = entry.make(entry.parse(OPTIONS)).double()
    ids = torch.randint(256, (2, 24))
    with_start = torch.cat((torch.full((2, 1), 256), ids), dim=1)
    log_p = model(with_start[:, :-1]).log_softmax(-1)
    expected = -log_p.gather(-1, ids[..., None]).mean()
    torch.testing.assert_close(entry.loss(model, ids), expected, rtol=0, atol=1e-12)

    continues_bytes(entry, model, ids)
