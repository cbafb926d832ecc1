"""What hk.native_sparse_attention means, on every backend: examples, edges, invariances."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hierkernels as hk
from hierkernels.native import native
from hierkernels.ops.native_sparse_attention.call import PRESETS
from hierkernels.ops.native_sparse_attention.spec import NsaCase
from hierkernels.ops.native_sparse_attention.testing import Inputs, compute, make_inputs

BACKENDS = [
    "reference",
    pytest.param(
        "cpu", marks=pytest.mark.skipif(native() is None, reason="the compiled core is missing")
    ),
]
F64 = torch.float64


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=list(PRESETS))
def preset(request: pytest.FixtureRequest) -> str:
    return request.param


def case(preset: str, N: int = 40, **changes: Any) -> NsaCase:
    sizes = {"l": 8, "d": 4, "S": 8, "n": 3, "w": 6, "M": 0, "Hq": 4, "Hkv": 2, "Nk": N}
    sizes |= {"B": 2, "D": 8, "Dv": 8, "Nq": N} | changes
    return NsaCase(f"{preset}-{N}", preset, **sizes)


def gates(inputs: Inputs, *values: float) -> dict[str, Tensor]:
    return {"gates": torch.tensor(values, dtype=inputs.dtype).expand_as(inputs.gates)}


def call(inputs: Inputs, backend: str, **changes: Any) -> Tensor:
    names = ("q", "k", "v", "k_cmp", "v_cmp", "gates")
    tensors, options = inputs.arguments()
    arguments = {**dict(zip(names, tensors, strict=True)), **options, **changes}
    return hk.native_sparse_attention(**arguments, backend=backend)


def test_memory_tokens_alone(backend: str) -> None:
    """Fewer tokens than a window: the output of the compressed branch is the memory's."""
    inputs = make_inputs(case("seed", 3, M=1), F64)
    out = call(inputs, backend, **gates(inputs, 1, 0, 0))
    memory = inputs.v_cmp[:, :, :1].repeat_interleave(2, dim=1)
    torch.testing.assert_close(out, memory.expand_as(out), rtol=0, atol=1e-14)


def test_both_ways_sees_the_own_block(backend: str) -> None:
    """Two blocks, one to select: each query selects the other one and has its own beside it."""
    inputs = make_inputs(case("seed", 16, n=1, is_causal=False), F64)
    out = call(inputs, backend, **gates(inputs, 0, 1, 0))
    expected = hk.attention(inputs.q, inputs.k, inputs.v, backend="reference")
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_window(preset: str, backend: str) -> None:
    """6 keys with the query's own, or 6 before it and its own."""
    inputs = make_inputs(case(preset), F64)
    out = call(inputs, backend, **gates(inputs, 0, 0, 1))
    i = torch.arange(40)
    distance = i[:, None] - i
    mask = (distance >= 0) & (distance <= (5 if preset == "paper" else 6))
    expected = hk.attention(
        inputs.q, inputs.k_window, inputs.v_window, attn_mask=mask, backend="reference"
    )
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_gates_add_the_branches_up(preset: str, backend: str) -> None:
    inputs = make_inputs(case(preset), F64)
    out = call(inputs, backend)
    parts = [
        call(inputs, backend, **gates(inputs, *one)) for one in ((1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    expected = sum(
        gate * part for gate, part in zip(inputs.gates[..., None, :].unbind(-1), parts, strict=True)
    )
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["gates", "q"])
def test_second_derivatives(name: str) -> None:
    """Those of the gates are right; a kernel's own it refuses, instead of leaving a part out."""

    def second(backend: str | None) -> torch.Tensor:
        inputs = make_inputs(case("seed", 9), F64).requires_grad()
        out = inputs.run(backend)
        (grad,) = torch.autograd.grad(out.square().sum(), getattr(inputs, name), create_graph=True)
        return torch.autograd.grad(grad.sum(), inputs.v)[0]

    expected = second("reference")
    assert expected.any()
    if name == "gates" or native() is None:
        torch.testing.assert_close(second(None), expected, rtol=0, atol=1e-12)
    else:
        with pytest.raises(NotImplementedError, match="second derivative"):
            second(None)


def test_diff_topk_gives_the_scores_a_gradient(backend: str) -> None:
    """The value is the same; with it, the gradient is that of multiplying the selected keys."""
    plain = make_inputs(case("seed", 40), F64)
    with_p = make_inputs(case("seed", 40, use_diff_topk=True), F64)
    one, two = (
        compute(Inputs(**{**vars(i), **gates(i, 0, 1, 0)}), backend) for i in (plain, with_p)
    )
    torch.testing.assert_close(two["out"], one["out"], rtol=0, atol=1e-13)
    assert not one["dq_cmp"].any() and not one["dk_cmp"].any()
    assert two["dq_cmp"].any() and two["dk_cmp"].any()
    torch.testing.assert_close(two["dk"], one["dk"], rtol=0, atol=1e-13)


def test_compiles() -> None:
    inputs = make_inputs(case("seed", 40, M=1), torch.float32)
    eager = compute(inputs, None)
    tensors, options = inputs.requires_grad().arguments()
    torch._dynamo.reset()
    compiled = torch.compile(hk.native_sparse_attention, fullgraph=True, backend="aot_eager")
    out = compiled(*tensors, **options)
    torch.testing.assert_close(out, eager["out"])
    grads = torch.autograd.grad(out, tensors, inputs.dout)
    names = ("dq", "dk", "dv", "dk_cmp", "dv_cmp", "dgates")
    for name, grad in zip(names, grads, strict=True):
        torch.testing.assert_close(grad, eager[name])
    torch._dynamo.reset()


def test_autocast_and_explain() -> None:
    inputs = make_inputs(case("seed", 40), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = call(inputs, None)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), call(inputs, None), rtol=0.05, atol=0.05)
    tensors, options = inputs.arguments()
    choice = hk.explain("native_sparse_attention", *tensors, **options)
    assert choice.backend == ("reference" if native() is None else "cpu")
