"""Memformer as a language model of bytes: segments, generation, and through the commands."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from python_models import MemformerLanguageModel, checkpoint, sample
from python_models.memformer_language_model import SegmentReader
from python_models.registry import MODELS, continue_bytes
from python_models.train import main

SMALL = {
    "num_tokens": 11, "dim": 16, "depth": (1, 2), "heads": 2, "segment_len": 5, "segments": 3,
    "num_memory_slots": 4, "num_mem_updates": 2,
}  # fmt: skip


def make(**changes: object) -> MemformerLanguageModel:
    torch.manual_seed(1)
    model = MemformerLanguageModel(**{**SMALL, **changes}).double()
    with torch.no_grad():  # larger than at first: the memory matters
        for p in (p for p in model.parameters() if p.ndim > 1):
            p.add_(torch.randn_like(p), alpha=0.2)
    return model


def make_ids(length: int, batch: int = 2, count: int = 11) -> Tensor:
    return torch.randint(count, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("length", [1, 4, 5, 10, 13])
def test_segments_by_hand(length: int) -> None:
    """The encoder reads the segment before; the memory knows those before that one."""
    model = make()
    net, ids = model.net, make_ids(length)
    start = torch.full((2, 1), 11)
    mems, source, expected = None, start, []
    for first in range(0, length, 5):
        segment = ids[:, first : first + 5]
        read = torch.cat((start, segment), dim=1)
        results = net(source, mems=mems)
        logits = net.decoder.net(read, results.enc_out)
        expected.append(logits[:, : segment.shape[1]])
        tail, mems, source = logits[:, segment.shape[1] :], results.mem, segment
    if length % 5:
        expected.append(tail)
    else:
        expected.append(net.decoder.net(start, net(source, mems=mems).enc_out))
    expected = torch.cat(expected, dim=1)
    got = model(ids)
    assert got.shape == (2, length + 1, 12)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    log_p = expected[:, :-1].log_softmax(-1).gather(-1, ids[..., None])
    torch.testing.assert_close(model(ids, return_loss=True), -log_p.mean(), rtol=0, atol=1e-12)


def test_no_token_sees_a_later_one_and_all_see_the_first() -> None:
    model = make()
    ids = make_ids(20, batch=1)
    logits = model(ids)
    for n in range(20):
        changed = ids.clone()
        changed[:, n] = (changed[:, n] + 1) % 11
        moved = (model(changed) - logits).abs().amax(dim=(0, 2))
        assert (moved[: n + 1] == 0).all()
        assert (moved[n + 1 :] > 0).all()


def test_replay_has_the_gradients_of_plain_backprop() -> None:
    ids, found = make_ids(18), []
    for replay in (False, True):
        model = make(replay=replay)
        loss = model(ids, return_loss=True)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


def test_reader_gives_the_logits_of_forward() -> None:
    """Token by token and in pieces of every kind: inside a segment, across one, across several."""
    model, ids = make(), make_ids(17)
    with torch.no_grad():
        expected = model(ids)
        for pieces in ([0] + [1] * 17, [17], [2, 3, 1], [4, 1, 5, 0, 6], [3, 13, 1], [5, 5, 5, 2]):
            reader, n = SegmentReader(model), 0
            for size in pieces:
                got = reader.append(ids[:, n : n + size])
                n += size
                torch.testing.assert_close(got, expected[:, n], rtol=0, atol=1e-11)


@pytest.mark.parametrize("length", [0, 3, 5, 12])
def test_greedy_tokens_do_not_depend_on_the_cache(length: int) -> None:
    """To the end of a training example, and beyond it."""
    model = make()
    prime = make_ids(length, batch=3)
    for total in (None, 24):
        seen: list[Tensor] = []
        settings = {"seq_len": total, "temperature": 0}
        cached = model.generate(prime, on_token=seen.append, **settings)
        assert cached.shape == (3, total or 15)
        assert torch.equal(cached[:, :length], prime)
        assert torch.equal(cached[:, length:], torch.stack(seen, dim=1))
        assert torch.equal(model.generate(prime, use_cache=False, **settings), cached)
        assert (cached < 11).all(), "the start token is never said"


def test_commands(tmp_path: Path, capfdbinary: pytest.CaptureFixture) -> None:
    """It learns, its checkpoint has its options, and it can be sampled, from nothing too."""
    text = tmp_path / "text"
    text.write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 60)
    options = ["dim=24", "depth=1,1", "segment_len=12", "segments=2", "heads=2"]
    options += ["num_memory_slots=4", "replay=true"]
    arguments = ["--model", "memformer", "--data", str(text), "--option", *options]
    arguments += ["--batch-size", "8", "--warmup", "5", "--learning-rate", "0.02"]
    arguments += ["--eval-every", "25", "--sample-every", "0", "--save-every", "0"]
    run = tmp_path / "run"
    assert main([*arguments, "--steps", "50", "--out", str(run)]) == 0
    log = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    bits = [line["held_out_bits_per_byte"] for line in log if "held_out_bits_per_byte" in line]
    assert bits[1] < bits[0] < math.log2(257)
    assert bits[1] < 2.0

    state = checkpoint.load_state(checkpoint.find(run), model="memformer")
    assert state["options"]["depth"] == [1, 1]
    prompt = ["--checkpoint", str(run), "--bytes", "50", "--temperature", "0"]
    capfdbinary.readouterr()
    for text_before in ("", "the quick brown fox jumps over the lazy dog\nthe"):
        assert sample.main([*prompt, "--prompt", text_before]) == 0
        out = capfdbinary.readouterr().out
        assert out.startswith(text_before.encode())
        assert len(out) == len(text_before) + 51


def test_registry() -> None:
    entry = MODELS["memformer"]
    options = entry.parse(["dim=16", "depth=1,1", "heads=2", "segment_len=6", "segments=2"])
    assert entry.window(options) == 12
    model = entry.make(json.loads(json.dumps(options))).eval()
    more = continue_bytes(
        entry, model, b"ab", 30, window=12, filter_thres=0.9, temperature=1.0,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert len(list(more)) == 30


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = make()
    model.float().save_pretrained(tmp_path)
    other = MemformerLanguageModel.from_pretrained(tmp_path)
    assert torch.equal(other(make_ids(12)), model(make_ids(12)))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"depth": 2}, TypeError, "depth must be a tuple"),
        ({"depth": (1, 1, 1)}, ValueError, "depth must be"),
        ({"segments": 0}, ValueError, "segments must be at least 1"),
        ({"segment_len": 2.0}, TypeError, "segment_len must be an integer"),
        ({"replay": 1}, TypeError, "replay must be True or False"),
        ({"heads": 3}, ValueError, "must divide dim = 16, got 3"),
    ],
)
def test_constructor_refuses(change: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(**change)


@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        ([1], TypeError, "ids must be a tensor"),
        (torch.zeros(2, 3), TypeError, "ids must be integers"),
        (make_ids(4)[0], ValueError, r"ids must be \(batch, tokens\)"),
        (torch.full((1, 3), 11), ValueError, "ids must be from 0 to num_tokens - 1 = 10"),
        (make_ids(0), ValueError, "ids must have at least one token"),
    ],
)
def test_forward_and_generation_refuse(ids: object, error: type[Exception], words: str) -> None:
    model = make()
    with pytest.raises(error, match=words):
        model(ids, return_loss=True)
    if "at least one" not in words:
        with pytest.raises(error, match=words.replace("ids", "prime")):
            model.generate_tokens(ids)
    with pytest.raises(ValueError, match=r"seq_len counts the prime .* at least 4, got 3"):
        model.generate_tokens(make_ids(4), seq_len=3)
