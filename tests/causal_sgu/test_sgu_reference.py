"""The reference of hk.causal_sgu against loops over its formula and against the seed's layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

import hierkernels as hk
from hierkernels.ops.causal_sgu import reference
from hierkernels.ops.causal_sgu.call import ACTIVATIONS
from hierkernels.ops.causal_sgu.spec import ALL_DTYPES, CORRECTNESS, Case, dtype_name
from hierkernels.ops.causal_sgu.testing import (
    Inputs,
    compute,
    make_inputs,
    make_standard,
)

F64 = torch.float64
_ACTIVATIONS = {None: torch.nn.Identity(), "relu": F.relu, "gelu": F.gelu, "silu": F.silu}
_ACTIVATIONS |= {"tanh": torch.tanh, "sigmoid": torch.sigmoid}


def _by_loops(x: Inputs) -> torch.Tensor:
    """The formula of the docstring, one product at a time."""
    case = x.case
    out = torch.empty_like(x.gate, memory_format=torch.contiguous_format)
    for i in range(case.N):
        for c in range(case.C):
            h = c // (case.C // case.H)
            if case.window is None:
                row, first = i, 0
            else:
                row, first = i % case.window, (i // case.window - 1) * case.window
            z = x.bias[h, row].expand(case.B).clone()
            for j in range(max(first, 0), i + 1):
                z += x.weight[h, row, j - first] * x.gate[:, j, c]
            if x.gate_residual is not None:
                z += x.gate_residual[:, i, c]
            out[:, i, c] = _ACTIVATIONS[case.activation](z) * x.residual[:, i, c]
    return out


def _global_of_seed(x: Inputs) -> torch.Tensor:
    """CausalSGU after its LayerNorm, by the masked einsum."""
    n, h = x.case.N, x.case.H
    weight, bias = x.weight[:, :n, :n].nan_to_num(), x.bias[:, :n]
    weight = weight * ~torch.ones(n, n, dtype=torch.bool).triu(1)
    gate = rearrange(x.gate, "b n (h d) -> b h n d", h=h)
    gate = torch.einsum("bhnd,hmn->bhmd", gate, weight)
    gate = rearrange(gate + rearrange(bias, "h n -> () h n ()"), "b h n d -> b n (h d)")
    if x.gate_residual is not None:
        gate = gate + x.gate_residual
    return _ACTIVATIONS[x.case.activation](gate) * x.residual


def _windowed_of_seed(x: Inputs) -> torch.Tensor:
    """CausalLocalSGU after its LayerNorm."""
    n, h, w = x.case.N, x.case.H, x.case.window
    gate = F.pad(x.gate, (0, 0, 0, -n % w))
    gate = rearrange(gate, "b (w n) d -> b w n d", n=w)
    gate = F.pad(gate, (0, 0, 0, 0, 1, 0))
    gate = torch.cat((gate[:, :-1], gate[:, 1:]), dim=2)
    weight = x.weight.nan_to_num() * ~torch.ones(w, 2 * w, dtype=torch.bool).triu(w + 1)
    gate = rearrange(gate, "b w n (h d) -> b w h n d", h=h)
    gate = torch.einsum("bwhnd,hmn->bwhmd", gate, weight)
    gate = gate + rearrange(x.bias, "h n -> () () h n ()")
    gate = rearrange(rearrange(gate, "b w h n d -> b w n (h d)"), "b w n d -> b (w n) d")[:, :n]
    if x.gate_residual is not None:
        gate = gate + x.gate_residual
    return _ACTIVATIONS[x.case.activation](gate) * x.residual


def _seed(x: Inputs) -> torch.Tensor:
    return _global_of_seed(x) if x.case.window is None else _windowed_of_seed(x)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS[1:]])
@pytest.mark.parametrize("n, window", [(7, None), (7, 3), (6, 3), (4, 9)])
def test_formula(n: int, window: int | None, activation: str | None) -> None:
    case = Case(
        "loops", 2, n, 4, 2, S=n + 2, window=window, activation=activation, gate_residual=True
    )
    x = make_inputs(case, F64)
    torch.testing.assert_close(compute(x, "reference", False)["out"], _by_loops(x))


@pytest.mark.parametrize("case", CORRECTNESS, ids=lambda case: case.name)
def test_seed(case: Case) -> None:
    x = make_inputs(case, F64).requires_grad()
    expected = _seed(x)
    leaves = x.differentiable()
    grads = torch.autograd.grad(expected, list(leaves.values()), x.dout)
    results = compute(x, "reference")
    torch.testing.assert_close(results["out"], expected.detach())
    for name, grad in zip(leaves, grads, strict=True):
        torch.testing.assert_close(results[name], grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CORRECTNESS, ids=lambda case: case.name)
def test_backward_formula_is_the_gradient(case: Case) -> None:
    # What kernels follow, against autograd of the definition; through the operator.
    x = make_inputs(case, F64)
    expected = compute(x, "reference")
    with torch.no_grad():
        out, z = reference.forward(x.call(), True)
        grads = reference.backward(x.call(), z, x.dout, (True,) * 5)
    torch.testing.assert_close(out, expected["out"])
    names = ("dresidual", "dgate", "dweight", "dbias", "dgate_residual")
    for name, grad in zip(names, grads, strict=True):
        if name in expected:
            torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=dtype_name)
def test_dtypes(dtype: torch.dtype) -> None:
    case = Case("dtypes", 2, 9, 6, 2, mixed=True, gate_residual=True, activation="silu")
    for name, t in compute(make_inputs(case, dtype), "reference").items():
        assert t.dtype == (case.weight_dtype(dtype) if name in ("dweight", "dbias") else dtype)


@pytest.mark.parametrize("window", [None, 4])
def test_what_weighs_the_future_is_never_read(window: int | None) -> None:
    # make_inputs fills it with NaN; here, also what lies beyond the tokens.
    case = Case("future", 2, 9, 6, 2, S=12, window=window)
    x = make_inputs(case, F64)
    assert x.weight.isnan().any()
    results, unseen = compute(x, "reference"), make_standard(x).unseen
    assert all(t.isfinite().all() for t in results.values())
    assert unseen["dweight"].any() and not results["dweight"][unseen["dweight"]].any()
    weight = x.weight.masked_fill(unseen["dweight"], float("nan"))
    again = compute(replace(x, weight=weight), "reference")
    assert all(torch.equal(again[name], results[name]) for name in results)


def test_causality() -> None:
    for window in (None, 3):
        x = make_inputs(Case("causal", 1, 10, 4, 2, window=window), F64)
        before = compute(x, "reference", False)["out"]
        gate = x.gate.clone()
        gate[:, 6] += 1
        after = compute(replace(x, gate=gate), "reference", False)["out"]
        changed = (before != after).any(-1).any(0)
        last = 10 if window is None else 9  # bucket 2 = tokens 6, 7, 8; bucket 3 sees it, too
        assert not changed[:6].any() and changed[6:last].all()


def test_second_derivative() -> None:
    x = make_inputs(Case("second", 1, 5, 4, 2, activation="tanh"), F64).requires_grad()
    leaves = (x.residual, x.gate, x.weight.detach().nan_to_num().requires_grad_(), x.bias)

    def f(*tensors: torch.Tensor) -> torch.Tensor:
        return hk.causal_sgu(*tensors, activation="tanh", backend="reference")

    assert torch.autograd.gradgradcheck(f, leaves)
