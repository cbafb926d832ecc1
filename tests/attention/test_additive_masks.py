"""Masks made of large negative numbers, as many models carry them: which number hides what."""

from __future__ import annotations

import pytest
import torch

import hierkernels as hk
from hierkernels.native import native
from hierkernels.ops.attention.spec import dtype_name

BACKENDS = ["reference", *([] if native() is None else ["cpu"])]
LOW = (torch.float32, torch.bfloat16, torch.float16)
N, D = 70, 16  # more than one tile of the kernels
HIDDEN_QUERY = 1  # sees no key


def _inputs(dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k, v and a bool mask: the later half of the keys is hidden, and all from one query."""
    leaves = [torch.randn(1, 2, N, D).to(dtype).requires_grad_() for _ in range(3)]
    mask = (torch.arange(N) < N // 2).repeat(N, 1)
    mask[HIDDEN_QUERY] = False
    return leaves, mask


def _bias(mask: torch.Tensor, number: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, number)


def _run(leaves: list[torch.Tensor], **options: object) -> list[torch.Tensor]:
    """out, lse and the gradients of a loss of all queries, the hidden one too."""
    out, lse = hk.attention(*leaves, return_lse=True, **options)
    loss = (out.float() * torch.linspace(1, 2, N)[:, None]).sum()
    return [out, lse, *torch.autograd.grad(loss, leaves)]


# (dtype of q, dtype of the bias, the number)
HIDING = [
    *[(dtype, torch.float32, torch.finfo(torch.float32).min) for dtype in LOW],
    (torch.bfloat16, torch.bfloat16, torch.finfo(torch.bfloat16).min),
    (torch.float64, torch.float64, torch.finfo(torch.float64).min),
    (torch.float16, torch.float16, -torch.inf),
    (torch.float32, torch.float32, -torch.inf),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "bias_dtype", "number"), HIDING)
def test_the_least_number_hides_as_a_bool_mask_does(
    backend: str, dtype: torch.dtype, bias_dtype: torch.dtype, number: float
) -> None:
    leaves, mask = _inputs(dtype)
    actual = _run(leaves, attn_bias=_bias(mask, number, bias_dtype), backend=backend)
    expected = _run(leaves, attn_mask=mask, backend=backend)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
    out, lse, dq, _, _ = actual
    assert not out[:, :, HIDDEN_QUERY].any() and not dq[:, :, HIDDEN_QUERY].any()
    assert (lse[:, :, HIDDEN_QUERY] == -torch.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", [-1e9, -1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_name)
def test_other_numbers_hide_beside_visible_keys_only(
    backend: str, dtype: torch.dtype, number: float
) -> None:
    leaves, mask = _inputs(dtype)
    out = hk.attention(*leaves, attn_bias=_bias(mask, number, torch.float32), backend=backend)
    masked = hk.attention(*leaves, attn_mask=mask, backend=backend)
    seeing = torch.arange(N) != HIDDEN_QUERY
    torch.testing.assert_close(out[:, :, seeing], masked[:, :, seeing])
    q, k, v = (leaf.double() for leaf in leaves)
    scores = (q @ k.mT * D**-0.5 + _bias(mask, number, torch.float64)).to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    average = (torch.softmax(scores, -1).double() @ v)[:, :, HIDDEN_QUERY]
    bound = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float64: 1e-6}[dtype]
    assert (out[:, :, HIDDEN_QUERY] - average).abs().max() < bound


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_least_float16_is_an_ordinary_score(backend: str) -> None:
    leaves, mask = _inputs(torch.float32)
    bias = _bias(mask, torch.finfo(torch.float16).min, torch.float16)
    out = hk.attention(*leaves, attn_bias=bias, backend=backend)
    q, k, v = (leaf.double() for leaf in leaves)
    expected = torch.softmax(q @ k.mT * D**-0.5 + bias, -1) @ v
    # 65504 leaves a float32 eight bits behind the point.
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("number", [-1e9, -1e30])
def test_gradients_of_the_reference_where_all_scores_are_huge(number: float) -> None:
    leaves, mask = _inputs(torch.float32)
    bias = _bias(mask, number, torch.float32)
    actual = _run(leaves, attn_bias=bias, backend="reference")
    q, k, v = leaves
    out = torch.softmax(q @ k.mT * D**-0.5 + bias, -1) @ v
    loss = (out * torch.linspace(1, 2, N)[:, None]).sum()
    for a, e in zip(
        [actual[0], *actual[2:]], [out, *torch.autograd.grad(loss, leaves)], strict=True
    ):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("number", [-3e9, -1e20, -1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_name)
def test_gradients_stay_finite_where_all_scores_are_huge(dtype: torch.dtype, number: float) -> None:
    n = 600  # several tiles: the backward then works from the saved lse
    q, k, v = (torch.randn(1, 1, n, D, dtype=dtype).requires_grad_() for _ in range(3))
    bias = torch.zeros(n, n)
    bias[5] = number
    out = hk.attention(q, k, v, attn_bias=bias)
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert gradient.isfinite().all()
        assert gradient.abs().max() < 2 * n  # no weight is above 1
