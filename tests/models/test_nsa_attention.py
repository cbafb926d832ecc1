"""SparseAttention against the package that it follows, and what its constructor refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from python_models import SparseAttention
from python_models import nsa_compression as networks

BASE: dict[str, Any] = {
    "dim": 32,
    "dim_head": 8,
    "heads": 4,
    "kv_heads": 2,
    "sliding_window_size": 7,
    "compress_block_size": 5,
    "compress_block_sliding_stride": 2,
    "selection_block_size": 8,
    "num_selected_blocks": 3,
    "causal": True,
}
WIDE = {"compress_block_sliding_stride": 4, "selection_block_size": 20}

# Each option on its own, and those that meet in the code.
CASES: dict[str, dict[str, Any]] = {
    "base": {},
    "stride-4-selection-20": WIDE,
    "selection-16": {"selection_block_size": 16},
    "no-overlap": {"compress_block_size": 8, "compress_block_sliding_stride": 8},
    "blocks-of-windows": {"compress_block_size": 4, "compress_block_sliding_stride": 4},
    "none-selected": {"num_selected_blocks": 0},
    "more-than-there-are": {"num_selected_blocks": 40},
    "own-selection-of-heads": {"query_heads_share_selected_kv": False},
    "diff-topk": {"use_diff_topk": True},
    "diff-topk-own-selection": {"use_diff_topk": True, "query_heads_share_selected_kv": False},
    "all-kv-heads": {"kv_heads": None},
    "one-kv-head": {"kv_heads": 1, **WIDE},
    "three-memory-tokens": {"num_compressed_mem_kv": 3},
    "no-norm": {"norm": False},
    "wide-mlp": {"compress_mlp_expand_factor": 1.5},
    "odd-dims": {"dim": 27, "dim_head": 6, "heads": 3, "kv_heads": 3},
    "not-causal": {"causal": False},
    "not-causal-none-selected": {"causal": False, "num_selected_blocks": 0},
    "not-causal-no-overlap": {
        "causal": False,
        "compress_block_size": 8,
        "compress_block_sliding_stride": 8,
    },
    "not-causal-diff-topk": {"causal": False, "use_diff_topk": True, **WIDE},
}
LENGTHS = (1, 7, 8, 9, 63, 120)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}

# As name: (class, arguments); the last is the package's other network of one projection.
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "conv": ("ConvLinearCompress", {"heads": 2, "dim_head": 8, "compress_window_size": 5}),
    "pool": ("AttentionPool", {"dim_head": 8, "compress_window_size": 5}),
    "grouped-mlp": ("GroupedMLP", {"dim_head": 8, "compress_window_size": 5, "heads": 2}),
    "projection": ("SingleProjection", {"dim_head": 8, "compress_window_size": 5}),
    "grouped-projection": (
        "SingleProjection",
        {"dim_head": 8, "compress_window_size": 5, "heads": 2},
    ),
    "transformer": ("CompressTransformer", {"num_layers": 2, "dim": 16, "num_heads": 2}),
}


def upstream(**options: Any) -> nn.Module:
    package = pytest.importorskip(
        "native_sparse_attention_pytorch",
        reason="native-sparse-attention-pytorch==0.2.3 is the oracle and not installed",
    )
    return package.SparseAttention(**options)


def shake(module: nn.Module) -> nn.Module:
    """Weights of which none is 0, as those of a trained model."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    return module


def pair(change: dict[str, Any], dtype: torch.dtype, **ours: Any) -> tuple[nn.Module, nn.Module]:
    options = {**BASE, **change}
    theirs = shake(upstream(**options)).to(dtype)
    mine = SparseAttention(**{**options, **ours}).to(dtype)
    mine.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, mine


def results(layer: nn.Module, length: int, dim: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The output and the gradients of the input and of every parameter."""
    generator = torch.Generator().manual_seed(length)
    x, dout = torch.randn(2, 2, length, dim, generator=generator, dtype=torch.float64).to(dtype)
    x.requires_grad_()
    out = layer(x)
    wanted = {"x": x, **{n: p for n, p in layer.named_parameters() if p.requires_grad}}
    grads = torch.autograd.grad(out, list(wanted.values()), dout, allow_unused=True)
    named = {"out": out.detach()}
    for (name, parameter), grad in zip(wanted.items(), grads, strict=True):
        named[f"d {name}"] = torch.zeros_like(parameter) if grad is None else grad
    return named


def compare(theirs: nn.Module, mine: nn.Module, length: int, dim: int, dtype: torch.dtype) -> None:
    expected, got = (results(layer, length, dim, dtype) for layer in (theirs, mine))
    assert got.keys() == expected.keys()
    assert expected["out"].count_nonzero() and expected["d x"].count_nonzero()
    for name, value in expected.items():
        # The sums over tokens grow with their number, and so does their rounding.
        allowed = TOLERANCE[dtype] * max(1.0, float(value.abs().max()))
        difference = float((got[name] - value).abs().max()) if value.numel() else 0.0
        assert difference <= allowed, f"{name} at length {length}: {difference}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_upstream(case: str, dtype: torch.dtype) -> None:
    change = CASES[case]
    theirs, mine = pair(change, dtype, upstream_quirks=not change.get("causal", True))
    for length in LENGTHS:
        compare(theirs, mine, length, change.get("dim", BASE["dim"]), dtype)


def test_equals_upstream_at_every_length() -> None:
    theirs, mine = pair({"use_diff_topk": True}, torch.float64)
    for length in range(1, 121):
        compare(theirs, mine, length, BASE["dim"], torch.float64)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("network", NETWORKS)
def test_compression_networks(network: str, dtype: torch.dtype) -> None:
    package = pytest.importorskip(
        "native_sparse_attention_pytorch.compress_networks",
        reason="native-sparse-attention-pytorch==0.2.3 is the oracle and not installed",
    )
    name, arguments = NETWORKS[network]
    theirs = shake(upstream(**BASE, compress_mlp=getattr(package, name)(**arguments))).to(dtype)
    mine = SparseAttention(**BASE, compress_mlp=getattr(networks, name)(**arguments)).to(dtype)
    mine.load_state_dict(theirs.state_dict(), strict=True)
    for length in (8, 41):
        compare(theirs, mine, length, BASE["dim"], dtype)
    assert mine(torch.zeros(1, 1, BASE["dim"], dtype=dtype)).isfinite().all()  # no window at all


def test_compression_transformer_drops_out_while_training() -> None:
    network = networks.CompressTransformer(1, 16, 2, dropout=0.5)
    windows = torch.randn(2, 2, 3, 5, 8)
    assert not torch.equal(network(windows), network(windows))
    network.eval()
    assert torch.equal(network(windows), network(windows))


def test_strategy_combine_mlp() -> None:
    torch.manual_seed(0)
    combine = nn.Sequential(nn.Linear(32, 20), nn.SiLU(), nn.Linear(20, 12))
    theirs = shake(upstream(**BASE, strategy_combine_mlp=combine)).double()
    mine = SparseAttention(**BASE, strategy_combine_mlp=combine).double()
    mine.load_state_dict(theirs.state_dict(), strict=True)
    compare(theirs, mine, 41, BASE["dim"], torch.float64)


@pytest.mark.parametrize("case", CASES)
def test_state_dict_and_initial_gates_are_upstream(case: str) -> None:
    options = {**BASE, **CASES[case]}
    theirs, mine = upstream(**options).state_dict(), SparseAttention(**options).state_dict()
    assert [(n, t.shape) for n, t in mine.items()] == [(n, t.shape) for n, t in theirs.items()]
    for name in theirs:
        if name.startswith("to_strategy_combine") or "rotary" in name or "positions" in name:
            assert torch.equal(mine[name], theirs[name]), name


def test_window_both_ways_sees_no_padding() -> None:
    """What was meant without causal: no zeros behind the sequence, and the query's own block."""
    options = {**BASE, "causal": False, "num_selected_blocks": 2}
    torch.manual_seed(0)
    layer = shake(SparseAttention(**options)).double()
    quirks = SparseAttention(**options, upstream_quirks=True).double()
    quirks.load_state_dict(layer.state_dict())
    x = torch.randn(1, 8 * 7, 32, dtype=torch.float64)  # whole windows and blocks: no padding
    close_selected = {"to_strategy_combine.0.bias": torch.tensor([0.0, -1e9, 0.0] * 4)}
    for one in (layer, quirks):
        one.load_state_dict(close_selected, strict=False)
    torch.testing.assert_close(layer(x), quirks(x), rtol=0, atol=1e-12)
    assert not torch.allclose(layer(x[:, :-1]), quirks(x[:, :-1]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"heads": 3}, ValueError, "kv_heads must divide heads = 3, got 2"),
        ({"kv_heads": 0}, ValueError, "kv_heads must be at least 1"),
        ({"dim_head": 7}, ValueError, "dim_head must be even"),
        ({"dim": 0}, ValueError, "dim must be at least 1"),
        (
            {"compress_block_size": 1},
            ValueError,
            "compress_block_size must be at least .* 2, got 1",
        ),
        ({"compress_block_sliding_stride": 0}, ValueError, "stride must be at least 1"),
        ({"selection_block_size": 9}, ValueError, "must divide selection_block_size"),
        ({"num_selected_blocks": -1}, ValueError, "num_selected_blocks must be at least 0"),
        ({"num_selected_blocks": 2.0}, TypeError, "num_selected_blocks must be an integer"),
        ({"sliding_window_size": 0}, ValueError, "sliding_window_size must be at least 1"),
        ({"num_compressed_mem_kv": -1}, ValueError, "num_compressed_mem_kv must be at least 0"),
        ({"preset": "deepseek"}, ValueError, "preset must be one of seed, paper"),
        ({"preset": "paper"}, ValueError, "must divide .*compress_block_size"),
        (
            {"preset": "paper", "compress_block_size": 4, "use_diff_topk": True},
            ValueError,
            "use_diff_topk=False",
        ),
        (
            {"preset": "paper", "compress_block_size": 4, "num_selected_blocks": 2},
            ValueError,
            "num_selected_blocks must be at least 3",
        ),
    ],
)
def test_constructor_refuses(change: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        SparseAttention(**{**BASE, **change})


def test_forward_refuses() -> None:
    layer = SparseAttention(**BASE)
    with pytest.raises(ValueError, match=r"inp must be \(batch, tokens, 32\), got \(2, 5, 31\)"):
        layer(torch.zeros(2, 5, 31))
    with pytest.raises(TypeError, match="cache must be what return_cache gave, got tuple"):
        layer(torch.zeros(2, 1, 32), cache=())
    _, cache = layer(torch.zeros(2, 5, 32), return_cache=True)
    with pytest.raises(ValueError, match=r"batch size of the cache \(2\), got 3"):
        layer(torch.zeros(3, 1, 32), cache=cache)
    both_ways = SparseAttention(**{**BASE, "causal": False})
    with pytest.raises(ValueError, match="return_cache need causal=True"):
        both_ways(torch.zeros(2, 5, 32), return_cache=True)
