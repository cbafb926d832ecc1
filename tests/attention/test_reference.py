"""The reference against definitions that share nothing with it: loops, SDPA, Philox in Python."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import hierkernels as hk
from hierkernels.ops.attention import api, reference
from hierkernels.ops.attention.spec import CORRECTNESS, Case
from hierkernels.testing import check_accuracy, make_inputs

B, HQ, HKV, NQ, NK, D, DV = 2, 4, 2, 5, 7, 3, 2
MASK32 = 0xFFFFFFFF


def _tensors(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = (B, HQ, NQ, D), (B, HKV, NK, D), (B, HKV, NK, DV)
    q, k, v = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    return q, k, v


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def _naive(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sees: Callable[[int, int, int, int], bool],
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    keep: Callable[[int, int, int, int], float] = lambda b, h, i, j: 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention one number at a time; sees and keep take (batch, head, query, key)."""
    scale = 1 / math.sqrt(D) if scale is None else scale
    out = torch.zeros(B, HQ, NQ, DV, dtype=torch.float64)
    lse = torch.full((B, HQ, NQ), -math.inf, dtype=torch.float64)
    ql, kl, vl = q.tolist(), k.tolist(), v.tolist()
    full_bias = None if bias is None else bias.expand(B, HQ, NQ, NK).tolist()
    for b in range(B):
        for h in range(HQ):
            kv = h * HKV // HQ
            for i in range(NQ):
                scores = {}
                for j in range(NK):
                    if not sees(b, h, i, j):
                        continue
                    s = scale * sum(x * y for x, y in zip(ql[b][h][i], kl[b][kv][j], strict=True))
                    if softcap is not None:
                        s = softcap * math.tanh(s / softcap)
                    scores[j] = s + (0.0 if full_bias is None else full_bias[b][h][i][j])
                if not scores:
                    continue
                total = sum(math.exp(s) for s in scores.values())
                lse[b, h, i] = math.log(total)
                for c in range(DV):
                    out[b, h, i, c] = sum(
                        math.exp(s) / total * keep(b, h, i, j) * vl[b][kv][j][c]
                        for j, s in scores.items()
                    )
    return out, lse


ROW_MASK = torch.rand(B, 1, NQ, NK, generator=torch.Generator().manual_seed(3)) > 0.5
ROW_MASK[0, 0, 2] = False  # a query that sees nothing
PADDING = torch.tensor([[True] * 4 + [False] * 3, [False] * 2 + [True] * 5])

# Options of hk.attention, and which (b, h, i, j) they leave visible. Keys end where queries end.
LOOPS: dict[str, tuple[dict, Callable[[int, int, int, int], bool]]] = {
    "full": ({}, lambda b, h, i, j: True),
    "causal": ({"is_causal": True}, lambda b, h, i, j: j - i <= NK - NQ),
    "window": ({"window_size": (2, 1)}, lambda b, h, i, j: -2 <= j - i - (NK - NQ) <= 1),
    "window-left": ({"window_size": (1, None)}, lambda b, h, i, j: j - i - (NK - NQ) >= -1),
    "window-causal": (
        {"window_size": (1, 3), "is_causal": True},
        lambda b, h, i, j: -1 <= j - i - (NK - NQ) <= 0,
    ),
    "bias": ({"attn_bias": _draw(HQ, NQ, NK)}, lambda b, h, i, j: True),
    "bias-key": ({"attn_bias": _draw(B, 1, 1, NK)}, lambda b, h, i, j: True),
    "mask": ({"attn_mask": ROW_MASK}, lambda b, h, i, j: bool(ROW_MASK[b, 0, i, j])),
    "padding": ({"key_padding_mask": PADDING}, lambda b, h, i, j: bool(PADDING[b, j])),
    "softcap-bias": ({"softcap": 0.7, "attn_bias": _draw(NQ, 1)}, lambda b, h, i, j: True),
    "scale": ({"scale": -1.3}, lambda b, h, i, j: True),
    "all": (
        {
            "is_causal": True, "attn_mask": ROW_MASK, "key_padding_mask": PADDING, "softcap": 2.0,
            "attn_bias": _draw(HQ, 1, NK), "scale": 0.4,
        },
        lambda b, h, i, j: bool(j - i <= NK - NQ and ROW_MASK[b, 0, i, j] and PADDING[b, j]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
def test_equals_the_loops(name: str) -> None:
    options, sees = LOOPS[name]
    q, k, v = _tensors()
    out, lse = hk.attention(q, k, v, **options, return_lse=True, backend="reference")
    values = {key: options.get(key) for key in ("softcap", "scale")}
    expected_out, expected_lse = _naive(q, k, v, sees, options.get("attn_bias"), **values)
    torch.testing.assert_close(out, expected_out, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-13)


def test_more_queries_than_keys_leaves_the_first_ones_nothing() -> None:
    q, k, v = torch.randn(1, 1, 5, 3), torch.randn(1, 1, 2, 3), torch.randn(1, 1, 2, 4)
    out, lse = hk.attention(q, k, v, is_causal=True, return_lse=True, backend="reference")
    assert torch.equal(out[:, :, :3], torch.zeros(1, 1, 3, 4))
    assert torch.equal(lse[:, :, :3], torch.full((1, 1, 3), -math.inf))
    torch.testing.assert_close(out[:, :, 3], v[:, :, 0])
    assert lse[:, :, 3:].isfinite().all()


@pytest.mark.parametrize("name", ["full", "causal", "mask", "bias", "scale"])
def test_equals_torch_with_every_gradient(name: str) -> None:
    q, k, v = _tensors()
    if name == "causal":  # torch aligns at the first token, so only equal lengths agree
        k, v = k[:, :, :NQ], v[:, :, :NQ]
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    ours: dict = {}
    theirs: dict = {}
    if name == "causal":
        ours, theirs = {"is_causal": True}, {"is_causal": True}
    elif name == "mask":  # without the query that sees nothing: torch's gradient there is NaN
        ours, theirs = ({"attn_mask": ROW_MASK[1:]},) * 2
    elif name == "scale":
        ours, theirs = ({"scale": 0.9},) * 2
    elif name == "bias":
        leaves.append(_draw(HQ, 1, NK).requires_grad_())
        ours, theirs = {"attn_bias": leaves[3]}, {"attn_mask": leaves[3]}
    out = hk.attention(*leaves[:3], **ours, backend="reference")
    expected = F.scaled_dot_product_attention(*leaves[:3], **theirs, enable_gqa=True)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)
    dout = _draw(*out.shape)
    grads = torch.autograd.grad(out, leaves, dout)
    expected_grads = torch.autograd.grad(expected, leaves, dout)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-11, atol=1e-13)


def test_lse_is_the_logsumexp_of_the_scores() -> None:
    q, k, v = (t.requires_grad_() for t in _tensors())
    _, lse = hk.attention(q, k, v, return_lse=True, backend="reference")
    scores = q @ k.repeat_interleave(HQ // HKV, 1).mT / math.sqrt(D)
    expected = scores.logsumexp(-1)
    torch.testing.assert_close(lse, expected, rtol=1e-12, atol=1e-13)
    dlse = _draw(*lse.shape)
    dq, dk, dv = torch.autograd.grad(lse, (q, k, v), dlse, materialize_grads=True)
    expected_dq, expected_dk = torch.autograd.grad(expected, (q, k), dlse)
    torch.testing.assert_close(dq, expected_dq)
    torch.testing.assert_close(dk, expected_dk)
    assert not dv.any()


def test_bias_of_minus_infinity_hides_keys() -> None:
    q, k, v = (t.requires_grad_() for t in _tensors())
    bias = torch.zeros(B, 1, NQ, NK, dtype=torch.float64).masked_fill(~ROW_MASK, -math.inf)
    hidden = hk.attention(q, k, v, attn_bias=bias, return_lse=True, backend="reference")
    masked = hk.attention(q, k, v, attn_mask=ROW_MASK, return_lse=True, backend="reference")
    for a, b in zip(hidden, masked, strict=True):
        torch.testing.assert_close(a, b)
    for grad in torch.autograd.grad(hidden[0].sum(), (q, k, v)):
        assert grad.isfinite().all()


# -------------------------------------------------------------------------------------------------
# Dropout


def _philox(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    """Philox4x32-10 in Python's integers, as Random123 states it."""
    c, k = list(counter), list(key)
    for _ in range(10):
        hi0, lo0 = divmod(0xD2511F53 * c[0], 2**32)
        hi1, lo1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [hi1 ^ c[1] ^ k[0], lo1, hi0 ^ c[3] ^ k[1], lo0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


# Random123's known answers (examples/kat_vectors): counter, key, output.
KNOWN_ANSWERS = {
    "zeros": ("00000000 " * 4, "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff " * 4, "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
}


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_philox_known_answers(name: str) -> None:
    counter, key, answer = ([int(w, 16) for w in row.split()] for row in KNOWN_ANSWERS[name])
    assert _philox(tuple(counter), (key[0], key[1])) == answer
    seed = key[0] | key[1] << 32
    i, h, b = (torch.tensor(c) for c in counter[1:])
    # The keys whose counter is this one lie 16 apart, one for each word.
    j = torch.tensor([counter[0] // 16 * 64 + counter[0] % 16 + 16 * word for word in range(4)])
    assert reference.philox_word(seed, i, j, h, b).tolist() == answer
    as_int64 = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
    assert reference.philox_word(as_int64, i, j, h, b).tolist() == answer


def _keeps(seed: int, p: float, b: int, h: int, i: int, j: int) -> bool:
    words = _philox((j // 64 * 16 + j % 16, i, h, b), (seed & MASK32, seed >> 32 & MASK32))
    return words[j // 16 % 4] >= int(p * 2**32)


@pytest.mark.parametrize("seed", [0, 5, 2**63 - 1, -1, -(2**63)])
def test_dropout_is_the_documented_function_of_the_indices(seed: int) -> None:
    q, k = torch.zeros(2, 2, 3, 4), torch.zeros(2, 1, 140, 4)
    call = api.make_call(q, k, k, dropout_p=0.3, dropout_seed=seed)
    expected = [
        [[[_keeps(seed, 0.3, b, h, i, j) for j in range(140)] for i in range(3)] for h in range(2)]
        for b in range(2)
    ]
    assert reference.dropout_keep(call).tolist() == expected


def test_dropout_drops_and_rescales() -> None:
    q, k, v = _tensors()
    p, seed = 0.4, 11
    out, lse = hk.attention(
        q, k, v, dropout_p=p, dropout_seed=seed, return_lse=True, backend="reference"
    )

    def keep(b: int, h: int, i: int, j: int) -> float:
        return _keeps(seed, p, b, h, i, j) / (1 - p)

    expected_out, expected_lse = _naive(q, k, v, lambda b, h, i, j: True, keep=keep)
    torch.testing.assert_close(out, expected_out, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-13)  # lse is not dropped


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_statistics(p: float) -> None:
    q = torch.zeros(2, 4, 128, 1)
    masks = [
        reference.dropout_keep(api.make_call(q, q, q, dropout_p=p, dropout_seed=s)).double()
        for s in (1, 2)
    ]
    n = masks[0].numel()
    five_sigma = 5 * math.sqrt(p * (1 - p) / n)
    for mask in masks:
        assert abs(mask.mean().item() - (1 - p)) < five_sigma
    # Another seed, batch, head, query or key is independent: the covariance with each shift is 0.
    a = masks[0] - (1 - p)
    pairs = {"seed": a * (masks[1] - (1 - p))}
    for dim, axis in enumerate(("batch", "head", "query", "key")):
        pairs[axis] = a * a.roll(1, dim)
    for axis, products in pairs.items():
        # rolling a dimension of 2 pairs each element twice, which doubles the variance
        assert abs(products.mean().item()) < 5 * math.sqrt(2 / n) * p * (1 - p), axis


def test_dropout_seed_none_follows_torchs_generator() -> None:
    q, k, v = _tensors()

    def draw() -> torch.Tensor:
        return hk.attention(q, k, v, dropout_p=0.5, backend="reference")

    torch.manual_seed(0)
    first, second = draw(), draw()
    torch.manual_seed(0)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)


# -------------------------------------------------------------------------------------------------
# Derivatives


def test_gradients_and_second_derivatives() -> None:
    q, k, v = (t[:1, :, :3].clone().requires_grad_() for t in _tensors())
    bias = _draw(HQ, 1, 3).requires_grad_()

    def f(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return hk.attention(
            *tensors[:3], attn_bias=tensors[3], is_causal=True, softcap=1.5, dropout_p=0.2,
            dropout_seed=3, return_lse=True, backend="reference",
        )  # fmt: skip

    assert torch.autograd.gradcheck(f, (q, k, v, bias))
    assert torch.autograd.gradgradcheck(f, (q, k, v, bias))


@pytest.mark.parametrize("case", CORRECTNESS, ids=lambda case: f"attention-reference-{case}")
def test_backward_formula_equals_autograd(case: Case) -> None:
    # What the kernels compute, and what follows another backend's forward, against autograd.
    inputs = make_inputs(case, torch.float64)
    call = inputs.call()
    out, lse = reference.forward(call)
    dq, dk, dv, dbias = reference.backward(
        call, out, lse, inputs.dout, inputs.dlse, bias_grad=inputs.bias is not None
    )
    results = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    if dbias is not None:
        results["dbias"] = dbias
    check_accuracy(inputs, results)
