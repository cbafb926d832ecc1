"""Memory replay: the gradients of plain back-propagation, with the activations of one segment."""

from __future__ import annotations

import copy
import weakref
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from python_models import Memformer
from python_models.memory_replay import memory_replay_backprop, run_segments

OPTIONS = {
    "dim": 16, "num_memory_slots": 5, "num_mem_updates": 2, "mem_update_attn_heads": 4,
    "enc_num_tokens": 13, "enc_max_seq_len": 6, "enc_depth": 2, "enc_heads": 2,
    "dec_num_tokens": 11, "dec_max_seq_len": 8, "dec_depth": 1, "dec_heads": 4,
}  # fmt: skip


def make(**changes: object) -> Memformer:
    torch.manual_seed(1)
    return Memformer(**{**OPTIONS, **changes}).double()


def make_ids(count: int, length: int, batch: int = 2) -> Tensor:
    return torch.randint(count, (batch, length), generator=torch.Generator().manual_seed(length))


def gradients(model: Memformer) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def plain(model: Memformer, src: Tensor, tgt: Tensor, masks: dict[str, Tensor]) -> Tensor:
    """Back-propagation through all segments at once, segment by segment as a user writes it."""
    mems, n = None, model.encoder.max_seq_len
    pieces = src.split(n, dim=1)
    src_masks = masks["src_mask"].split(n, dim=1) if masks else (None,) * len(pieces)
    for piece, mask in zip(pieces[:-1], src_masks[:-1], strict=True):
        mems = model(piece, src_mask=mask, mems=mems).mem
    results = model(
        pieces[-1], tgt, mems=mems, src_mask=src_masks[-1], tgt_mask=masks.get("tgt_mask")
    )
    results.dec_out.backward()
    return results.dec_out.detach()


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("length", [6, 12, 27])
def test_gradients_are_those_of_plain_backprop(length: int, masked: bool) -> None:
    """One segment, two, and five of which the last is shorter."""
    model = make()
    src, tgt = make_ids(13, length), make_ids(11, 7)
    masks = {}
    if masked:
        masks["src_mask"] = torch.arange(length) < torch.tensor([[length], [length - 4]])
        masks["tgt_mask"] = torch.arange(7) < torch.tensor([[4], [7]])
    expected_loss = plain(model, src, tgt, masks)
    expected = gradients(model)
    if length > 6:
        assert expected["memory_slots"].abs().max() > 1e-6
    loss = memory_replay_backprop(model, src, tgt, **masks)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=1e-14)
    assert_same(gradients(model), expected)


def test_equals_upstream() -> None:
    package = pytest.importorskip("memformer", reason="memformer==0.3.1 is not installed")
    mrbp = pytest.importorskip("memformer.mrbp", reason="memformer==0.3.1 is not installed")
    theirs = package.Memformer(**OPTIONS).double()
    ours = Memformer(**OPTIONS, upstream_quirks=True).double()
    ours.load_state_dict(theirs.state_dict())
    src, tgt = make_ids(13, 20), make_ids(11, 7)
    masks = {"src_mask": torch.arange(20) < torch.tensor([[20], [9]])}
    masks["tgt_mask"] = torch.arange(7) < torch.tensor([[4], [7]])
    mrbp.memory_replay_backprop(theirs, src, tgt, **masks)
    memory_replay_backprop(ours, src, tgt, **masks)
    got, expected = gradients(ours), gradients(theirs)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9, msg=name)


def test_gradients_are_added_up() -> None:
    model = make()
    src, tgt = make_ids(13, 14), make_ids(11, 7)
    memory_replay_backprop(model, src, tgt)
    once = {name: t.clone() for name, t in gradients(model).items()}
    for _ in range(2):
        memory_replay_backprop(model, src, tgt)
    assert_same(gradients(model), {name: 2 * t for name, t in once.items()})


def test_encoder_only_with_a_loss_of_its_own() -> None:
    """Upstream cannot: it expects three results, and there is no other loss than the decoder's."""
    model = make(encoder_only=True)
    src = make_ids(13, 20)

    def segment_loss(index: int, results: tuple) -> Tensor:
        return (index + 1) * results.enc_out.square().mean() + results.mem.mean()

    mems, total = None, 0.0
    for index, piece in enumerate(src.split(6, dim=1)):
        results = model(piece, mems=mems)
        mems = results.mem
        total = total + segment_loss(index, results)
    total.backward()
    expected = gradients(model)
    loss = memory_replay_backprop(model, src, segment_loss=segment_loss)
    torch.testing.assert_close(loss, total.detach(), rtol=1e-14, atol=0)
    assert_same(gradients(model), expected)
    with pytest.raises(ValueError, match="tgt or segment_loss must be given"):
        memory_replay_backprop(model, src)

    package = pytest.importorskip("memformer", reason="memformer==0.3.1 is not installed")
    from memformer.mrbp import memory_replay_backprop as upstream

    with pytest.raises(ValueError, match="not enough values to unpack"):
        upstream(package.Memformer(**{**OPTIONS, "encoder_only": True}), src, None)


def test_a_loss_and_targets_of_every_segment() -> None:
    """run_segments with and without replay, from a memory that needs a gradient too."""
    model = make()
    src, tgt = make_ids(13, 18), make_ids(11, 18)
    segments = [{"src": a, "tgt": b} for a, b in zip(src.split(6, 1), tgt.split(6, 1), strict=True)]
    found = []
    for replay in (False, True):
        mems = model.get_initial_mem(2).detach().requires_grad_()
        losses, last = run_segments(model, segments, mems=mems, replay=replay)
        assert len(losses) == 3
        (sum(losses) + last.square().mean()).backward()
        found.append({**gradients(model), "mems": mems.grad, "losses": torch.stack(losses)})
    assert_same(found[1], found[0])


def test_bfloat16_autocast_and_float32() -> None:
    """The segments are computed again in the precision that they were computed in."""
    model = make().float()
    src, tgt = make_ids(13, 20), make_ids(11, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected_loss = plain(model, src, tgt, {})
        expected = gradients(model)
        loss = memory_replay_backprop(model, src, tgt)
    assert torch.equal(loss, expected_loss)
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-2, atol=1e-5, msg=name)


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages made while it is active that are alive, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(
        self, function: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        given = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.known and key not in given:
                    self.known.add(key)
                    self.now += size
                    weakref.finalize(storage, self._forget, key, size)
        self.most = max(self.most, self.now)
        return out


def most_alive(model: Memformer, segments: int, *, replay: bool) -> int:
    """Most bytes alive at once beyond the parameters and their gradients in a training step."""
    src, tgt = make_ids(13, 6 * segments, batch=8), make_ids(11, 7, batch=8)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with LiveBytes() as live:
        if replay:
            memory_replay_backprop(model, src, tgt)
        else:
            plain(model, src, tgt, {})
    return live.most


def test_memory_does_not_grow_with_segments() -> None:
    """Of each segment only the memory it left stays, which a first pass cannot do without."""
    model = make(num_memory_slots=2, num_mem_updates=1, enc_depth=1)
    kept = 8 * 2 * 16 * 8  # bytes of a memory: batch 8, 2 slots, 16 channels, float64
    replayed = [most_alive(model, n, replay=True) for n in (4, 8, 16)]
    growing = [most_alive(model, n, replay=False) for n in (4, 8, 16)]
    assert growing[1] > 1.8 * growing[0]
    assert growing[2] > 1.8 * growing[1]
    for n, (few, many) in zip((4, 8), pairwise(replayed), strict=True):
        assert many - few <= 2 * n * kept  # n more segments; some room for what is small
    assert replayed[2] < growing[0]


def test_model_and_mode_are_left_alone() -> None:
    model = make().eval()
    before = copy.deepcopy(model.state_dict())
    memory_replay_backprop(model, make_ids(13, 20), make_ids(11, 7))
    assert not model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"src": torch.zeros(2, 9)}, TypeError, "src must be integers"),
        ({"src": torch.full((2, 9), 13)}, ValueError, "src must be from 0"),
        ({"src_mask": torch.ones(2, 8, dtype=torch.bool)}, ValueError, "src_mask must have shape"),
        ({"tgt": torch.full((2, 9), 11)}, ValueError, "tgt must be from 0"),
        ({"tgt": make_ids(11, 7, batch=3)}, ValueError, "tgt must have the batch size"),
        ({"tgt_mask": torch.ones(2, 4)}, TypeError, "tgt_mask must be bool"),
    ],
)
def test_refuses(change: dict, error: type[Exception], words: str) -> None:
    given = {"src": make_ids(13, 9), "tgt": make_ids(11, 7), **change}
    with pytest.raises(error, match=words):
        memory_replay_backprop(make(), **given)
