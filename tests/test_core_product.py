"""The compiled core's products of matrices against float64, and linear layers that use them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F

from hierkernels import products
from hierkernels.native import native
from hierkernels.testing import poisoned_memory, threads

CORE = native()
ISAS = CORE.cpu_isas() if CORE else []
FLOAT, BFLOAT = torch.float32, torch.bfloat16
# How operands and result are stored, and what is multiplied.
TYPES = [(FLOAT, FLOAT, FLOAT, FLOAT)] + [
    (a, b, out, BFLOAT) for a in (FLOAT, BFLOAT) for b in (FLOAT, BFLOAT) for out in (FLOAT, BFLOAT)
]
# Around vectors (16), panels (64), six rows, tasks (96 rows), passes (768 words), rounds (2048
# columns).
SIZES = [
    (1, 1, 1),
    (5, 3, 15),
    (6, 31, 16),
    (7, 32, 17),
    (97, 33, 64),
    (200, 770, 65),
    (98, 1600, 130),
    (13, 3, 2050),
    (300, 8, 40),
]


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set that has products, in use."""
    level = getattr(request, "param", "avx512bf16")
    if level not in ISAS:
        pytest.skip(f"this machine, or this build, has no {level}")
    before = CORE.cpu_isa()
    CORE.set_cpu_isa(level)
    yield level
    CORE.set_cpu_isa(before)


def check(
    got: Sequence[torch.Tensor], eager: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]
) -> None:
    """At most twice PyTorch's error, and a rounding of the largest."""
    for g, e, t in zip(got, eager, exact, strict=True):
        assert g.shape == t.shape and g.dtype == e.dtype
        error, allowed = (g - t).abs().max(), 2 * (e - t).abs().max()
        assert error <= allowed + torch.finfo(g.dtype).eps * t.abs().max()


def stored(t: torch.Tensor, transposed: bool) -> torch.Tensor:
    """t, with its first or its last stride 1."""
    return t.mT.contiguous().mT if transposed else t


@pytest.mark.parametrize("layout", [(a, b) for a in (False, True) for b in (False, True)], ids=str)
@pytest.mark.parametrize(
    "isa, types",
    [("avx512", TYPES[0]), *(("avx512bf16", types) for types in TYPES)],
    ids=lambda x: x if isinstance(x, str) else "-".join(str(t)[6:] for t in x),
    indirect=["isa"],
)
def test_products(isa: str, types: tuple[torch.dtype, ...], layout: tuple[bool, bool]) -> None:
    """At most twice the error of PyTorch's own product of these types, and a rounding."""
    *storage, result, dtype = types
    assert CORE.has_product(dtype == BFLOAT)
    for m, k, n in SIZES:
        shapes = (m, k), (k, n)
        a, b = (
            stored(torch.randn(shape).to(kind), transposed)
            for shape, kind, transposed in zip(shapes, storage, layout, strict=True)
        )
        bias = torch.randn(n) if n % 2 else None
        addend = torch.randn(m, n + 3).to(result)[:, 2 : n + 2] if m % 2 else None
        out, sums = torch.full((m, n), torch.nan, dtype=result), torch.full((m,), torch.nan)
        with poisoned_memory(), threads(3):
            CORE.product(a, b, bias, addend, dtype == BFLOAT, out, sums)
        offset = torch.zeros(n) if bias is None else bias
        exact = a.to(dtype).double() @ b.to(dtype).double() + offset
        eager = (a.to(dtype) @ b.to(dtype) + offset.to(dtype)).to(result)
        if addend is not None:
            exact, eager = exact + addend.double(), eager + addend
        check([out], [eager], [exact])
        terms = a.to(dtype).double()
        size = terms.abs().sum(1).max() * torch.finfo(FLOAT).eps
        assert (sums - terms.sum(1)).abs().max() <= 4 * size, (m, k, n)


def test_rows_apart(isa: str) -> None:
    """Operands and results that are parts of larger tensors; what lies between stays as it is."""
    whole, weight = torch.randn(30, 50), torch.randn(40, 90)
    out = torch.full((30, 100), 7.0)
    CORE.product(whole[:, 4:24], weight[3:23, 5:70], None, None, False, out[:, 8:73], None)
    torch.testing.assert_close(out[:, 8:73], whole[:, 4:24] @ weight[3:23, 5:70])
    assert (out[:, :8] == 7).all() and (out[:, 73:] == 7).all()


def test_nothing_to_multiply(isa: str) -> None:
    """Without terms there is the bias; without rows or columns nothing is touched."""
    bias, out = torch.randn(4), torch.full((3, 4), torch.nan)
    CORE.product(torch.empty(3, 0), torch.empty(0, 4), bias, None, False, out, None)
    assert torch.equal(out, bias.expand(3, 4))
    for m, n in ((0, 4), (3, 0)):
        a, b = torch.ones(m, 2), torch.ones(2, n)
        CORE.product(a, b, None, None, False, torch.empty(m, n), None)


def test_levels_without_products() -> None:
    """They say so, rather than computing by another's instructions."""
    if not ISAS:
        pytest.skip("no compiled core")
    before = CORE.cpu_isa()
    try:
        for level in {"generic", "avx2", "amx"} & set(ISAS):
            CORE.set_cpu_isa(level)
            assert not CORE.has_product(False)
            with pytest.raises(RuntimeError, match="no product"):
                CORE.product(*(torch.ones(2, 2),) * 2, None, None, False, torch.ones(2, 2), None)
    finally:
        CORE.set_cpu_isa(before)


@pytest.fixture
def core_calls(isa: str, monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """What the core was asked to multiply, at a level whose linear layers use it."""
    seen = []
    product = products._core_product

    def counting(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, *args, **more):
        seen.append(dtype)
        return product(a, b, dtype, *args, **more)

    monkeypatch.setattr(products, "_core_product", counting)
    return seen


def linear_then_sum(x, weight, bias=None, residual=None) -> torch.Tensor:
    """What products.linear stands for."""
    out = F.linear(x, weight, bias)
    return out if residual is None else out + residual


@pytest.mark.parametrize("residual", [None, FLOAT, BFLOAT], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("autocast, kind", [(False, FLOAT), (True, FLOAT), (True, BFLOAT)], ids=str)
def test_linear(
    autocast: bool,
    kind: torch.dtype,
    bias: bool,
    residual: torch.dtype | None,
    core_calls: list[torch.dtype],
) -> None:
    """Results and gradients: at most twice the error of PyTorch's, and a rounding of each."""
    x, weight = torch.randn(3, 100, 70).to(kind), torch.randn(50, 70)
    offset = torch.randn(50) if bias else None
    added = None if residual is None else torch.randn(50, 3, 100).movedim(0, -1).to(residual)
    dout = torch.randn(50, 3, 100).movedim(0, -1)  # not contiguous
    used = BFLOAT if autocast else FLOAT

    def run(function, double: bool = False) -> list[torch.Tensor]:
        leaves = [None if t is None else t.clone() for t in (x, weight, offset, added)]
        if double:
            leaves = [t.to(used).double() for t in leaves[:2]] + [
                None if t is None else t.double() for t in leaves[2:]
            ]
        leaves = [None if t is None else t.requires_grad_() for t in leaves]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and not double):
            out = function(*leaves)
        grad = dout.to(used).to(out.dtype)
        return [out, *torch.autograd.grad(out, [t for t in leaves if t is not None], grad)]

    exact, eager = run(linear_then_sum, double=True), run(linear_then_sum)
    got = run(products.linear)
    assert core_calls == [used] * 3
    check(got, eager, exact)


def test_residual_of_another_shape(core_calls: list[torch.dtype]) -> None:
    """It is broadcast as by a sum, or refused as by one."""
    x, weight, row = torch.randn(300, 8), torch.randn(4, 8), torch.randn(4)
    torch.testing.assert_close(products.linear(x, weight, None, row), F.linear(x, weight) + row)
    with pytest.raises(RuntimeError, match="must match the size"):
        products.linear(x, weight, None, torch.ones(300, 5))
    assert core_calls


def test_only_the_gradients_that_are_wanted(core_calls: list[torch.dtype]) -> None:
    x, weight = torch.randn(256, 3), torch.randn(5, 3)
    bias = torch.randn(5, requires_grad=True)
    products.linear(x, weight, bias).sum().backward()
    assert len(core_calls) == 1
    torch.testing.assert_close(bias.grad, torch.full((5,), 256.0))
    weight.requires_grad_()
    products.linear(x, weight).sum().backward()
    assert len(core_calls) == 3
    torch.testing.assert_close(weight.grad, x.sum(0).expand(5, 3))


def test_gradients_of_gradients(core_calls: list[torch.dtype]) -> None:
    x, weight = torch.randn(256, 2), torch.randn(4, 2)

    def run(function, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
        out = function(*leaves).square().sum()
        first = torch.autograd.grad(out, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    check(run(products.linear, FLOAT), run(F.linear, FLOAT), run(F.linear, torch.float64))
    assert len(core_calls) == 3  # forward, and the last backward, of which no graph is wanted


def test_few_rows_and_other_types_go_elsewhere(core_calls: list[torch.dtype]) -> None:
    weight = torch.randn(4, 8)
    products.linear(torch.randn(products._ROWS - 1, 8), weight)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        x = torch.randn(300, 8, dtype=dtype)
        assert torch.equal(products.linear(x, weight.to(dtype)), F.linear(x, weight.to(dtype)))
    with torch.autocast("cpu", torch.float16):
        products.linear(torch.randn(300, 8), weight)
    with pytest.raises(RuntimeError, match="same dtype"):
        products.linear(torch.randn(300, 8).bfloat16(), weight)
    assert not core_calls
