"""Ways that the CPU kernels take for some shapes, dtypes and strides alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import hierkernels as hk
from hierkernels.native import native, native_error
from hierkernels.ops.attention.spec import Case
from hierkernels.testing import (
    check_accuracy,
    compute,
    make_inputs,
    make_standard,
    poisoned_memory,
    threads,
)

if native() is None:
    pytest.skip(f"the compiled core is missing: {native_error()}", allow_module_level=True)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def _case(name: str, H: int = 2, N: int = 700, **options) -> Case:
    Hkv, Nk = options.pop("Hkv", H), options.pop("Nk", N)
    return Case(name, options.pop("B", 1), H, Hkv, N, Nk, 64, options.pop("Dv", 64), **options)


# Every 16 rows see few keys, so bfloat16 takes them in one step, out of a ring of packed keys.
NARROW = (
    _case("window-64", is_causal=True, window=(64, None)),
    _case("window-past-and-future", window=(100, 20)),
    _case("window-of-one", window=(0, 0)),
    _case("keys-packed-by-all-threads", H=3, window=(150, 0)),
    _case("group", H=6, Hkv=2, N=300, window=(30, 10)),
    _case("rows-see-nothing", N=500, Nk=200, window=(20, 0)),
    _case("channels", N=300, Dv=40, window=(70, 0), lse_grad=True),
    _case("logits-x100", N=300, is_causal=True, window=(64, None), gain=100.0),
)


@pytest.mark.parametrize("dtype", (F32, BF16), ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", NARROW, ids=str)
def test_narrow_windows(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    with threads(2), poisoned_memory():
        results = compute(inputs, "cpu")
    check_accuracy(inputs, results, make_standard(inputs))


def _gradients(dtype: torch.dtype, N: int, bias: torch.Tensor, **options) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    q, k, v, dout = (torch.randn(2, 3, N, 40, generator=generator).to(dtype) for _ in range(4))
    inputs = [t.requires_grad_() for t in (q, k, v, bias)]
    with threads(2), poisoned_memory():
        out = hk.attention(*inputs[:3], attn_bias=bias, is_causal=True, backend="cpu", **options)
        return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


@pytest.mark.parametrize("softcap", (None, 10.0), ids=("plain", "softcap"))
@pytest.mark.parametrize("N", (9, 70, 300))
@pytest.mark.parametrize("bias_dtype", (BF16, F16), ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("dtype", (F32, F16, BF16), ids=lambda dtype: str(dtype)[6:])
def test_a_narrow_bias_is_as_good_as_a_wide_one(
    dtype: torch.dtype, bias_dtype: torch.dtype, N: int, softcap: float | None
) -> None:
    # The gradient of a bias for each pair is stored in the type of the bias, never in a wider one.
    bias = torch.randn(2, 3, N, N).to(bias_dtype)
    narrow = _gradients(dtype, N, bias, softcap=softcap)
    wide = _gradients(dtype, N, bias.float(), softcap=softcap)
    assert narrow[-1].dtype == bias_dtype
    wide[-1] = wide[-1].to(bias_dtype)
    for actual, expected in zip(narrow, wide, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("N", (9, 70, 300))
@pytest.mark.parametrize("dtype", (F32, BF16), ids=lambda dtype: str(dtype)[6:])
def test_strides_of_bias_and_masks(dtype: torch.dtype, N: int) -> None:
    case = _case("strides", 3, N, B=2, bias="bhqk", mask="bhqk", padding="random", is_causal=True)
    inputs = make_inputs(case, dtype)
    assert inputs.bias is not None and inputs.mask is not None and inputs.padding is not None
    strided = replace(
        inputs,
        bias=inputs.bias.mT.contiguous().mT,
        mask=inputs.mask.mT.contiguous().mT,
        padding=torch.stack((inputs.padding, ~inputs.padding), -1)[..., 0],
    )
    standard = make_standard(inputs)
    for some in (inputs, replace(inputs, mask=strided.mask, padding=strided.padding), strided):
        with threads(2), poisoned_memory():
            results = compute(some, "cpu")
        check_accuracy(some, results, standard)
