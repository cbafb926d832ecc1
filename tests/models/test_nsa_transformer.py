"""The NSA Transformer against the package that it follows, its presets, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from python_models import NSATransformer

SMALL: dict[str, Any] = {"num_tokens": 16, "dim": 24, "depth": 2, "dim_head": 8, "heads": 4}
SEED = {
    "sliding_window_size": 32,
    "compress_block_size": 4,
    "compress_block_sliding_stride": 4,
    "selection_block_size": 4,
    "num_selected_blocks": 4,
}
OVERLAP = {
    "sliding_window_size": 5,
    "compress_block_size": 5,
    "compress_block_sliding_stride": 2,
    "selection_block_size": 8,
    "num_selected_blocks": 2,
}
PAPER = {**OVERLAP, "compress_block_size": 4, "num_selected_blocks": 4}
CASES: dict[str, dict[str, Any]] = {
    "seed": {"use_sparse_attn": True, "sparse_attn_kwargs": SEED},
    "overlap": {"use_sparse_attn": True, "kv_heads": 2, "sparse_attn_kwargs": OVERLAP},
    "dense": {},
    "dense-grouped": {"kv_heads": 2},
}
PRESETS: dict[str, dict[str, Any]] = {
    **CASES,
    "paper": {
        "use_sparse_attn": True,
        "kv_heads": 2,
        "sparse_attn_kwargs": PAPER,
        "preset": "paper",
    },
}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def package() -> Any:
    return pytest.importorskip(
        "native_sparse_attention_pytorch.transformer",
        reason="native-sparse-attention-pytorch==0.2.3 is the oracle and not installed",
    )


def shaken(model: nn.Module) -> nn.Module:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def make(case: str, dtype: torch.dtype = torch.float64, **change: Any) -> NSATransformer:
    model = NSATransformer(**{**SMALL, **PRESETS[case], **change})
    return shaken(model).to(dtype)


def make_ids(length: int, batch: int = 2, seed: int = 3) -> Tensor:
    return torch.randint(16, (batch, length), generator=torch.Generator().manual_seed(seed))


class Upstream(nn.Module):
    """Its transformer; dense layers are called as they can be, not as its forward calls them."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.model = package().Transformer(**options)
        self.is_sparse = options.get("use_sparse_attn", False)

    def forward(self, ids: Tensor) -> Tensor:
        if self.is_sparse:
            return self.model(ids)
        x = self.model.token_emb(ids)
        for attention, ff in self.model.layers:
            x = attention(x) + x
            x = ff(x) + x
        return self.model.to_logits(self.model.norm(x))


def gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(named.items(), grads, strict=True)
    }


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_upstream(case: str, dtype: torch.dtype) -> None:
    theirs = shaken(Upstream(**{**SMALL, **CASES[case]})).to(dtype)
    mine = NSATransformer(**{**SMALL, **CASES[case]}, upstream_quirks=True).to(dtype)
    mine.load_state_dict(theirs.model.state_dict(), strict=True)
    for length in (1, 4, 35):
        ids = make_ids(length + 1)
        logits, expected = mine(ids[:, :-1]), theirs(ids[:, :-1])
        torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE[dtype])
        loss = mine(ids, return_loss=True)
        expected = nn.functional.cross_entropy(expected.mT, ids[:, 1:])
        torch.testing.assert_close(loss, expected, rtol=0, atol=TOLERANCE[dtype])
        got, wanted = gradients(mine, loss), gradients(theirs.model, expected)
        assert got.keys() == wanted.keys()
        for name, grad in wanted.items():
            torch.testing.assert_close(got[name], grad, rtol=0, atol=TOLERANCE[dtype], msg=name)


def test_default_sizes_are_those_of_the_seed() -> None:
    """Upstream's newest defaults raise; the stride is the block size where none is given."""
    torch.manual_seed(0)
    model = NSATransformer(num_tokens=16, dim=24, depth=1, use_sparse_attn=True).double()
    explicit = NSATransformer(16, 24, 1, use_sparse_attn=True, sparse_attn_kwargs=SEED).double()
    explicit.load_state_dict(model.state_dict(), strict=True)
    ids = make_ids(21)
    assert torch.equal(model(ids), explicit(ids))
    assert model.layers[0][0].compress_block_sliding_stride == 4


def test_examples_of_the_seed() -> None:
    model = NSATransformer(num_tokens=100, dim=32, depth=2, dim_head=8, heads=4)
    assert model(torch.randint(0, 100, (1, 32))).shape == (1, 32, 100)
    assert model.sample(torch.randint(0, 100, (1, 10)), seq_len=14).shape == (1, 4)


def test_heads_of_the_dense_path() -> None:
    """Query head h uses key/value head h // G; upstream pairs it with h % kv_heads."""
    torch.manual_seed(0)
    model = make("dense-grouped", depth=1)
    quirk = make("dense-grouped", depth=1, upstream_quirks=True)
    state = model.state_dict()
    # Upstream's pairing is ours with the query heads in another order.
    order = torch.tensor([0, 2, 1, 3])  # (g h) -> (h g), two key/value heads
    name = "layers.0.0.to_q.weight"
    state[name] = state[name].unflatten(0, (4, 8))[order].flatten(0, 1)
    name = "layers.0.0.to_out.weight"
    state[name] = state[name].unflatten(1, (4, 8))[:, order].flatten(1, 2)
    ids = make_ids(9)
    assert not torch.allclose(quirk(ids), model(ids))
    quirk.load_state_dict(state)
    torch.testing.assert_close(quirk(ids), model(ids), rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", PRESETS)
def test_no_token_sees_a_later_one(case: str) -> None:
    model = make(case)
    ids = make_ids(40, batch=1)
    logits = model(ids)
    for n in range(1, 40, 3):
        changed = ids.clone()
        changed[:, n:] = (changed[:, n:] + 1) % 16
        assert torch.equal(model(changed)[:, :n], logits[:, :n])


@pytest.mark.parametrize("case", ["seed", "dense"])
def test_not_causal(case: str) -> None:
    """Upstream's Transformer cannot; here the first token sees the last one's change."""
    model = make(case, causal=False)
    ids = make_ids(40)
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % 16
    assert not torch.allclose(model(ids)[:, 0], model(changed)[:, 0])
    with pytest.raises(ValueError, match="use_cache_kv needs causal=True"):
        model.sample(ids, 50, use_cache_kv=True)
    assert model.sample(ids, 42).shape == (2, 2)


def test_paper_preset() -> None:
    """Its own sizes where none are given; keys and values for each branch; all of them learn."""
    model = NSATransformer(16, 24, 1, dim_head=8, heads=4, use_sparse_attn=True, preset="paper")
    attention = model.layers[0][0]
    assert (attention.compress_block_size, attention.compress_block_sliding_stride) == (32, 16)
    assert (attention.selection_block_size, attention.num_selected_blocks) == (64, 16)
    assert attention.sliding_window_size == 512
    assert attention.num_mem_compress_kv == 0
    assert attention.to_qkv.weight.shape == (32 + 6 * 32, 24)
    small = make("paper")
    small(make_ids(40), return_loss=True).backward()
    for name, parameter in small.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.count_nonzero(), name


def test_paper_preset_with_everything_selected_is_dense_attention() -> None:
    """With gates that leave the selected branch alone."""
    sparse = make("paper", depth=1, sparse_attn_kwargs={**PAPER, "num_selected_blocks": 5})
    dense = make("dense-grouped", depth=1)
    a, b = sparse.layers[0][0], dense.layers[0][0]
    with torch.no_grad():
        gates = a.to_strategy_combine[0]
        gates.weight.zero_()
        gates.bias.copy_(torch.tensor([-1e9, 1e9, -1e9] * 4))
        q, _, _, k, v, _, _ = a.to_qkv.weight.split(a.qkv_split)
        for linear, weight in ((b.to_q, q), (b.to_k, k), (b.to_v, v)):
            linear.weight.copy_(weight)
        b.to_out.weight.copy_(a.combine_heads.weight)
        b.norm.weight.copy_(a.norm.weight)
    x = torch.randn(2, 37, 24, dtype=torch.float64)
    torch.testing.assert_close(a(x), b(x), rtol=0, atol=1e-12)


def test_compiles() -> None:
    """As one graph, forward and backward."""
    model = make("overlap", torch.float32, depth=1)
    ids = make_ids(30)
    expected = model(ids, return_loss=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(ids, return_loss=True)
    torch.testing.assert_close(loss, expected)
    wanted = gradients(model, expected)
    for name, grad in gradients(model, loss).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-5, msg=name)
    torch._dynamo.reset()


def test_bfloat16_autocast_trains() -> None:
    model = make("overlap", torch.float32)
    ids = make_ids(40)
    exact = model(ids, return_loss=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, return_loss=True)
    loss.backward()
    assert loss.dtype == torch.float32
    assert abs(loss.item() - exact.item()) < 0.05 * exact.item()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("case", PRESETS)
def test_save_and_load(case: str, tmp_path: Path) -> None:
    model = make(case, torch.float32)
    model.save_pretrained(tmp_path / "model")
    other = NSATransformer.from_pretrained(tmp_path / "model")
    assert other.options == model.options
    assert torch.equal(other(make_ids(20)), model(make_ids(20)))


def test_load_upstream(tmp_path: Path) -> None:
    theirs = package().Transformer(**{**SMALL, **CASES["overlap"]})
    torch.save({"model": theirs.state_dict()}, tmp_path / "weights.pt")
    mine = NSATransformer(**{**SMALL, **CASES["overlap"]}).load_upstream(tmp_path / "weights.pt")
    torch.testing.assert_close(mine(make_ids(20)), theirs(make_ids(20)), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"num_tokens": 0}, ValueError, "num_tokens must be at least 1"),
        ({"depth": -1}, ValueError, "depth must be at least 0"),
        ({"dim": 2.5}, TypeError, "dim must be an integer"),
        ({"ff_expansion_factor": 0.0}, ValueError, "ff_expansion_factor must be positive"),
        ({"preset": "deepseek"}, ValueError, "preset must be one of seed, paper"),
        ({"sparse_attn_kwargs": [1]}, TypeError, "sparse_attn_kwargs must be a dict, got list"),
        (
            {"use_flex_fine_selection": True, "use_triton_fine_selection": True},
            ValueError,
            "exclude one another",
        ),
        ({"kv_heads": 3}, ValueError, "kv_heads must divide heads = 4, got 3"),
    ],
)
def test_constructor_refuses(change: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        NSATransformer(**{**SMALL, **change})


def test_forward_refuses() -> None:
    model = make("seed")
    for ids, error, words in (
        (torch.zeros(2, 5), TypeError, "ids must be integers, got torch.float32"),
        (torch.zeros(5, dtype=torch.long), ValueError, r"ids must be \(batch, tokens\)"),
        (torch.full((1, 4), 16), ValueError, "from 0 to num_tokens - 1 = 15"),
    ):
        with pytest.raises(error, match=words):
            model(ids)
    with pytest.raises(ValueError, match="return_loss needs two tokens"):
        model(make_ids(1), return_loss=True)
    _, cache = model(make_ids(6), return_cache=True)
    with pytest.raises(ValueError, match="return_loss needs cache=None"):
        model(make_ids(8), return_loss=True, cache=cache)
    with pytest.raises(ValueError, match="after the 6 tokens of the cache, got 5"):
        model(make_ids(5), cache=cache)
    with pytest.raises(ValueError, match="cache must have 2 layers, got 1"):
        model(make_ids(8), cache=cache[:1])
    assert model(make_ids(0)).shape == (2, 0, 16)
