"""hk.select_blocks on every CPU backend: ties, NaN, decoding, the future, probabilities."""

from __future__ import annotations

import math

import pytest
import torch

import hierkernels as hk
from hierkernels.native import native
from hierkernels.ops.select_blocks.spec import CORRECTNESS
from hierkernels.ops.select_blocks.testing import make_inputs
from hierkernels.testing import threads

BACKENDS = ["reference"] if native() is None else ["cpu", "reference"]
SIZES = {"block_size": 16, "stride": 8, "first_end": 15}
LOGIT = {**SIZES, "first_end": 7, "strict": True, "scoring": "logit"}
CASES = {case.name: case for case in CORRECTNESS}


def _scored(
    q: torch.Tensor, k: torch.Tensor, backend: str, **options
) -> tuple[torch.Tensor, dict[str, object]]:
    """(lse, the options of probability scoring)."""
    cut = {name: options[name] for name in ("query_offset", "is_causal") if name in options}
    _, lse = hk.compressed_attention(
        q, k, k, stride=8, first_end=15, return_lse=True, backend=backend, **cut
    )
    return lse, {**SIZES, "window_size": 16, "lse": lse, "backend": backend, **options}


@pytest.mark.parametrize("name", ["n507", "logit-n507", "many-blocks"])
def test_threads_and_runs_agree(name: str) -> None:
    inputs = make_inputs(CASES[name], torch.float32)
    first = inputs.run(BACKENDS[0])
    for n in (1, 2, 4):
        with threads(n):
            for _ in range(7):
                assert torch.equal(inputs.run(BACKENDS[0]), first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_blocks_when_there_are_few(backend: str) -> None:
    q, k = torch.randn(1, 2, 100, 8), torch.randn(1, 1, 11, 8)
    _, options = _scored(q, k, backend)
    chosen = hk.select_blocks(q, k, num_selected=9, **options)
    for i in range(100):
        begun = i // 16 + 1
        assert chosen[0, 0, i].tolist() == [*range(begun), *[-1] * (9 - begun)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers(backend: str, bad: float) -> None:
    """NaN never chooses an index out of range, and leaves blocks without it alone."""
    q, k = torch.randn(1, 2, 200, 8).abs(), torch.randn(1, 1, 24, 8)
    for spoilt_query in (False, True):
        q2, k2 = q.clone(), k.clone()
        if spoilt_query:
            q2[:, :, 150] = bad
        else:
            k2[:, :, 9] = bad
        _, options = _scored(q, k, backend, num_local=1, num_initial=1)
        for chosen in (
            hk.select_blocks(q2, k2, num_selected=4, **options),
            hk.select_blocks(q2, k2, num_selected=4, **LOGIT, backend=backend),
        ):
            assert ((chosen >= -1) & (chosen < 13)).all()
            clean = hk.select_blocks(q, k, num_selected=4, **LOGIT, backend=backend)
            assert clean.shape == chosen.shape
        if spoilt_query:  # other queries do not notice
            others = torch.arange(200) != 150
            expected = hk.select_blocks(q, k, num_selected=4, **options)
            actual = hk.select_blocks(q2, k, num_selected=4, **options)
            assert torch.equal(actual[:, :, others], expected[:, :, others])
        elif math.isnan(bad):  # windows 8 .. 10 belong to blocks 4 and 5: the score is the least
            chosen = hk.select_blocks(q2, k2, num_selected=2, **options | {"num_local": 0})
            assert not (chosen[:, :, 190:, 1:] == 4).any()
        assert (hk.select_blocks(q2, k2, num_selected=4, **options)[:, :, 190:, 0] == 0).all()


PROBABILITY_CASES = {
    "causal": {},
    "own-block": {"exclude_own_block": False, "strict": False},
    "not-causal": {"is_causal": False},
    "not-causal-own": {"is_causal": False, "exclude_own_block": False},
    "not-shared": {"shared": False},
    "offset": {"query_offset": 9},
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PROBABILITY_CASES)
def test_probabilities(backend: str, name: str) -> None:
    """Against a dense softmax, with gradients, and by finite differences."""
    options = {
        "num_selected": 2, "block_size": 4, "stride": 2, "first_end": 1, "scoring": "logit",
        "strict": True, "backend": backend,
    } | PROBABILITY_CASES[name]  # fmt: skip
    N, offset = 17, options.get("query_offset", 0)
    q = torch.randn(2, 4, N, 3, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 2, (N + offset) // 2, 3, dtype=torch.float64, requires_grad=True)
    indices, p = hk.select_blocks(q, k, return_probabilities=True, **options)
    assert indices.dtype == torch.int32 and not indices.requires_grad
    assert torch.equal(indices, hk.select_blocks(q, k, **options))

    J = k.shape[2] // 2
    logits = torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(2, 1)) * 3**-0.5
    if options.get("shared", True):
        logits = logits.unflatten(1, (2, 2)).mean(2)
    logits = logits[..., : 2 * J].unflatten(3, (J, 2)).mean(4)
    i, j = torch.arange(N)[:, None] + offset, torch.arange(J)
    ends = 1 + (2 * j + 1) * 2
    allowed = (ends < i) if options["strict"] else (ends <= i)
    if not options.get("is_causal", True):
        allowed = torch.ones_like(allowed)
    if options.get("exclude_own_block", True):
        allowed = allowed & (j != i // 4)
    logits = logits.masked_fill(~allowed, -math.inf)
    column = torch.full((*logits.shape[:3], 1), -1000.0, dtype=torch.float64)
    dense = torch.cat((column, logits), 3).softmax(3)[..., 1:]
    expected = dense.gather(3, indices.clamp(min=0).long()).masked_fill(indices < 0, 0.0)
    torch.testing.assert_close(p, expected)
    seed = torch.randn_like(p)
    found = torch.autograd.grad(p, (q, k), seed, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (q, k), seed))

    def f(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return hk.select_blocks(q, k, return_probabilities=True, **options)[1]

    small = tuple(t[:1, :, :9].detach().requires_grad_() for t in (q, k))
    assert torch.autograd.gradcheck(f, small)


@pytest.mark.parametrize("n", [0, 3, 4])
def test_probabilities_without_blocks(n: int) -> None:
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    k = torch.randn(1, 1, n // 2, 8, requires_grad=True)
    options = {"num_selected": 2, "block_size": 4, "stride": 2, "first_end": 1}
    indices, p = hk.select_blocks(
        q, k, scoring="logit", strict=True, return_probabilities=True, **options
    )
    p.sum().backward()
    assert ((p > 0) == (indices >= 0)).all() and q.grad.isfinite().all()
