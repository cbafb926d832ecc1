"""hk.local_attention on the cpu backend: random problems, gradients, edges, repeatability."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hierkernels as hk
from hierkernels.native import native, native_error
from hierkernels.ops.attention.spec import dtype_name
from hierkernels.ops.local_attention.spec import LocalCase
from hierkernels.ops.local_attention.testing import make_inputs, make_standard
from hierkernels.testing import check_accuracy, compute, poisoned_memory

if native() is None:
    pytest.skip(f"the compiled core is missing: {native_error()}", allow_module_level=True)


@st.composite
def _problems(draw: st.DrawFn) -> LocalCase:
    causal = draw(st.booleans())
    group, heads = draw(st.sampled_from([1, 1, 2, 3])), draw(st.integers(1, 2))
    n = draw(st.integers(0, 300))
    return LocalCase(
        "random", draw(st.integers(1, 3)), heads * group, heads, n, n,
        draw(st.integers(1, 40)), draw(st.integers(1, 40)),
        is_causal=causal, width=draw(st.integers(1, 80)),
        look_backward=draw(st.integers(0, 3)),
        look_forward=None if causal else draw(st.sampled_from([None, 0, 1, 2])),
        exact_window=draw(st.booleans()), zero_lookback=draw(st.booleans()),
        bias=draw(st.sampled_from(["", "slots"])),
        padding=draw(st.sampled_from(["", "right", "left", "random", "empty"])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.3])), lse_grad=draw(st.booleans()),
        layout=draw(st.sampled_from(["bhnd", "bnhd", "packed"])),
    )  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(_problems(), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 9))
def test_random_problems(case: LocalCase, dtype: torch.dtype, seed: int) -> None:
    inputs = make_inputs(case, dtype, seed=seed)
    standard = make_standard(inputs)
    with poisoned_memory():
        results = compute(inputs, "cpu")
    check_accuracy(inputs, results, standard)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 60), st.integers(1, 20), st.integers(0, 3), st.integers(0, 2), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_visible_keys_are_those_of_the_words(
    n: int, w: int, back: int, forward: int, causal: bool, exact: bool
) -> None:
    """Loops in place of staircases: with equal scores, lse is the log of the number of keys."""
    forward = 0 if causal else forward
    q = torch.zeros(1, 1, n, 4, dtype=torch.float64)
    _, lse = hk.local_attention(
        q, q, q, w, is_causal=causal, look_backward=back, look_forward=forward,
        exact_window=exact, return_lse=True, backend="cpu",
    )  # fmt: skip
    for i in range(n):
        count = 0
        for j in range(n):
            near = -forward * w <= i - j <= back * w
            bucket = -forward <= i // w - j // w <= back
            count += (near if exact else bucket) and (j <= i or not causal)
        assert math.isclose(float(lse[0, 0, i].exp()), count, rel_tol=1e-12)


GRADCHECK = {
    "causal": {},
    "exact-back2": {"exact_window": True, "look_backward": 2},
    "both-dropout": {"is_causal": False, "dropout_p": 0.3, "dropout_seed": 5},
    "zero": {"zero_lookback": True},
    "zero-exact-back2": {"zero_lookback": True, "exact_window": True, "look_backward": 2},
    "zero-padding": {
        "zero_lookback": True,
        "key_padding_mask": torch.tensor([[False, True, True, False, True, True, True]] * 2),
    },
}


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("name", GRADCHECK)
def test_gradcheck(name: str, bias: bool) -> None:
    options = GRADCHECK[name]
    buckets = options.get("look_backward", 1) + (1 if options.get("is_causal", True) else 2)
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, 4, 7, 5), (2, 2, 7, 5), (2, 2, 7, 3), *([(4, 3, buckets * 3)] if bias else [])]
    leaves = [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]

    def f(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = hk.local_attention(
            *tensors[:3], 3, attn_bias=tensors[3] if bias else None, return_lse=True,
            backend="cpu", **options,
        )  # fmt: skip
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_results_are_bitwise_repeatable(dtype: torch.dtype) -> None:
    # Key tiles, batches and threads add to the same elements of the bias' gradient.
    case = LocalCase(
        "repeatable", 3, 4, 2, 700, 700, 16, 16, is_causal=True, width=50, bias="slots"
    )
    torch.set_num_threads(4)
    for batch in (1, 3):
        inputs = make_inputs(LocalCase(**{**vars(case), "B": batch}), dtype)
        first = compute(inputs, "cpu")
        for _ in range(3):
            for name, value in compute(inputs, "cpu").items():
                assert torch.equal(value, first[name]), name


def test_bias_of_minus_infinity_hides_slots() -> None:
    """Whole rows of it too: zero keys and real keys are hidden alike, without NaN."""
    q, k, v = (torch.randn(1, 2, 20, 8, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(2, 6, 12, dtype=torch.float64)
    bias[:, 1] = -math.inf  # every slot of the second query of each bucket
    bias[0, 2, :6] = -math.inf  # the look-back of one query
    for exact in (False, True):
        results = []
        for backend in ("cpu", "reference"):
            leaves = [t.detach().requires_grad_() for t in (q, k, v, bias)]
            out, lse = hk.local_attention(
                *leaves[:3], 6, attn_bias=leaves[3], zero_lookback=True, exact_window=exact,
                return_lse=True, backend=backend,
            )  # fmt: skip
            loss = out.square().sum() + lse.masked_fill(lse == -math.inf, 0.0).sum()
            results.append((out, lse, *torch.autograd.grad(loss, leaves)))
        assert results[0][1][0, :, 1::6].eq(-math.inf).all()
        for a, e in zip(*results, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


def test_bias_in_another_dtype_and_layout() -> None:
    case = LocalCase("dtype", 2, 2, 2, 70, 70, 16, 16, is_causal=True, width=16, bias="slots")
    inputs = make_inputs(case, torch.bfloat16)
    assert inputs.bias is not None
    bias = inputs.bias.float().mT.contiguous().mT  # last stride not 1
    strided = type(inputs)(**{**vars(inputs), "bias": bias})
    results = compute(strided, "cpu")
    assert results["dbias"].dtype == torch.float32
    check_accuracy(strided, results, make_standard(strided))


def test_calls_that_no_kernel_takes_run_on_the_reference() -> None:
    """520 channels are above what the kernels take: the automatic choice is still right."""
    case = LocalCase(
        "wide", 1, 2, 1, 30, 30, 520, 8, is_causal=True, width=8, bias="slots", zero_lookback=True
    )
    inputs = make_inputs(case, torch.float32)
    check_accuracy(inputs, compute(inputs, None), make_standard(inputs))
    with pytest.raises(NotImplementedError, match="head channels above 512"):
        compute(inputs, "cpu")


def test_a_window_longer_than_the_sequence_is_full_attention() -> None:
    q, k, v = (torch.randn(1, 2, 33, 8) for _ in range(3))
    expected = hk.attention(q, k, v, is_causal=True)
    for w in (33, 1000, 2**30):
        torch.testing.assert_close(hk.local_attention(q, k, v, w), expected)
        out = hk.local_attention(q, k, v, w, exact_window=True, look_backward=2**30)
        torch.testing.assert_close(out, expected)


def test_memory_is_linear_in_the_length() -> None:
    """What autograd keeps: inputs, bias, out and lse. No bucket of keys is copied."""
    q, k, v = (torch.randn(1, 2, 640, 8, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 16, 32, requires_grad=True)
    saved: list[int] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        hk.local_attention(q, k, v, 16, attn_bias=bias, backend="cpu")
    assert sum(saved) == 4 * q.numel() + bias.numel() + 2 * 640
