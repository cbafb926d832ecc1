"""The reference of selected attention against the definition spelled out key by key."""

from __future__ import annotations

import math

import pytest
import torch

import hierkernels as hk
from hierkernels.ops.selected_attention import reference
from hierkernels.ops.selected_attention.patterns import PATTERNS, draw_indices
from hierkernels.ops.selected_attention.spec import CORRECTNESS, SPEED
from hierkernels.ops.selected_attention.testing import make_inputs
from hierkernels.testing import compute

CASES = {case.name: case for case in CORRECTNESS}


def _spelled_out(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: list[int],
    weights: list[float] | None,
    p: int,
    block_size: int,
    own: bool,
    is_causal: bool,
) -> tuple[torch.Tensor, float]:
    """(out, lse) of one query at position p and one head."""
    chosen: dict[int, float] = {}  # block: weight
    for at, block in enumerate(indices):
        if block >= 0 and block not in chosen:
            chosen[block] = 1.0 if weights is None else weights[at]
    if own and p >= 0:
        chosen.setdefault(p // block_size, 1.0)
    scores, values = [], []
    for block, weight in chosen.items():
        for j in range(block * block_size, min((block + 1) * block_size, k.shape[0])):
            if j <= p or not is_causal:
                scores.append(weight * float(q @ k[j]) / math.sqrt(q.shape[0]))
                values.append(v[j])
    if not scores:
        return torch.zeros(v.shape[1], dtype=v.dtype), -math.inf
    most = max(scores)
    terms = [math.exp(s - most) for s in scores]
    out = sum(t * x for t, x in zip(terms, values, strict=True)) / sum(terms)
    return out, most + math.log(sum(terms))


SPELLED_OUT = (
    "n17", "q7-k200", "q33-k5", "q9-k0", "g3-per-head-own", "b5-g16-any", "named-0-own", "any",
    "holes", "future", "same-own-g4", "none", "any-full-q20-k90", "own-full", "weights-own",
    "weights-twice", "weights-per-head",
)  # fmt: skip


@pytest.mark.parametrize("name", SPELLED_OUT)
def test_definition(name: str) -> None:
    case = CASES[name]
    inputs = make_inputs(case, torch.float64)
    out, lse = inputs.run("reference")
    group = case.Hq // case.Hkv
    for h in {0, 1, case.Hq - 1}:
        choice = h if case.per_head else h // group
        for i in range(0, case.Nq, 3):
            weights = None if inputs.weights is None else inputs.weights[-1, choice, i].tolist()
            expected, expected_lse = _spelled_out(
                inputs.q[-1, h, i], inputs.k[-1, h // group], inputs.v[-1, h // group],
                inputs.indices[-1, choice, i].tolist(), weights,
                i + case.Nk - case.Nq, case.S, case.own, case.is_causal,
            )  # fmt: skip
            torch.testing.assert_close(out[-1, h, i], expected, rtol=1e-12, atol=1e-12)
            assert lse[-1, h, i].item() == pytest.approx(expected_lse, rel=1e-12, abs=1e-12)


SAVED = (
    "n65", "any-own-g4", "holes", "weights-any", "weights-twice", "lse-grad-none-seen",
    "g3-per-head-own", "everything",
)  # fmt: skip


@pytest.mark.parametrize("name", SAVED)
def test_backward_formula_is_the_gradient(name: str) -> None:
    # What kernels follow, from the saved out and lse, against autograd of the definition.
    inputs = make_inputs(CASES[name], torch.float64)
    expected = compute(inputs, "reference")
    grads = reference.backward(
        inputs.call(), expected["out"], expected["lse"], inputs.dout, inputs.dlse,
        inputs.weights is not None,
    )  # fmt: skip
    for result, grad in zip(("dq", "dk", "dv", "dweights"), grads, strict=True):
        if grad is None:
            assert inputs.weights is None
        else:
            torch.testing.assert_close(grad, expected[result], rtol=1e-10, atol=1e-10)


def test_documented_equivalence() -> None:
    inputs = make_inputs(CASES["any"], torch.float64)
    q, k, v = inputs.q, inputs.k, inputs.v
    block = torch.arange(k.shape[2]) // inputs.case.S
    chosen = (inputs.indices[..., None] == block).any(-2)
    chosen = chosen.repeat_interleave(q.shape[1] // chosen.shape[1], 1)
    expected = hk.attention(q, k, v, is_causal=True, attn_mask=chosen, backend="reference")
    torch.testing.assert_close(inputs.run("reference")[0], expected)


def test_second_derivative() -> None:
    inputs = make_inputs(CASES["weights-named-0"], torch.float64)
    q, k, v = (t[:1, :2, :6, :3].clone().requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
    indices = torch.tensor([[0, -1], [0, 1], [1, 0], [1, 1], [2, 0], [-1, 2]])
    weights = torch.rand(1, 2, 6, 2, dtype=torch.float64, requires_grad=True)

    def f(*tensors: torch.Tensor) -> torch.Tensor:
        *qkv, w = tensors
        return hk.selected_attention(
            *qkv, indices.expand(1, 2, 6, 2), block_size=2, block_weights=w, backend="reference"
        )

    assert torch.autograd.gradgradcheck(f, (q, k, v, weights))


def test_the_first_naming_has_the_weight_and_the_gradient() -> None:
    q, k, v = (torch.randn(1, 1, 4, 3, dtype=torch.float64) for _ in range(3))
    indices = torch.tensor([1, 0, 1]).expand(1, 1, 4, 3)
    weights = torch.tensor([0.5, 2.0, 9.0]).double().expand(1, 1, 4, 3).clone().requires_grad_()
    options = {"block_size": 2, "backend": "reference"}
    out = hk.selected_attention(q, k, v, indices, block_weights=weights, **options)
    expected = hk.selected_attention(
        q, k, v, indices[..., :2], block_weights=weights[..., :2], **options
    )
    torch.testing.assert_close(out, expected)
    (grad,) = torch.autograd.grad(out.square().sum(), weights)
    assert (grad[..., 2] == 0).all() and (grad[:, :, 2:, :2] != 0).all()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_are_what_they_say(pattern: str) -> None:
    n, S, N = (10 if pattern == "all" else 4), 8, 77
    generator = torch.Generator().manual_seed(1)
    drawn = draw_indices(pattern, (2, 3, N, n), S, N, generator)
    J, own = 10, torch.arange(N)[:, None] // S
    assert drawn.shape == (2, 3, N, n) and drawn.min() >= -1 and drawn.max() < J
    named = drawn >= 0
    if pattern == "sparse":
        assert (drawn <= own).all()
        assert torch.equal(named.sum(-1)[0, 0], torch.minimum(own[:, 0] + 1, torch.tensor(n)))
        for forced in (0 * own, own):
            assert (drawn == forced).any(-1).all()
        assert (drawn.diff(dim=-1).masked_fill(~named[..., 1:], 1) > 0).all()
    assert (drawn > own).any() == (pattern in ("any", "future", "same", "all"))
    assert (~named).any() == (pattern in ("sparse", "holes", "future", "none", "twice"))
    if pattern == "none":
        assert not named.any()
    if pattern == "holes":
        assert not named[..., 0].any() and named[..., 1].any()
    if pattern == "future":
        assert (drawn[..., 0] > own[:, 0])[..., :72].all()
    if pattern == "all":
        assert torch.equal(drawn.sort(-1).values, torch.arange(J).expand_as(drawn))
    if pattern == "twice":
        assert torch.equal(drawn[..., :2], drawn[..., 2:])


def test_flops_count_the_visible_pairs() -> None:
    for case in (CASES["n65"], CASES["n507-b64"], CASES["q7-k200"], CASES["named-16"]):
        seen = reference.visible(make_inputs(case, torch.float32).call())
        assert seen.sum() == case.visible * case.B * case.Hq
        assert case.flops() == 2 * seen.sum() * (case.D + case.Dv)
    assert len({case.name for case in (*CORRECTNESS, *SPEED)}) == len(CORRECTNESS) + len(SPEED)
