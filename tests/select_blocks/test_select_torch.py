"""hk.select_blocks and hk.compressed_attention under what PyTorch does to operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import hierkernels as hk
from hierkernels.native import native
from hierkernels.ops.select_blocks.spec import CORRECTNESS
from hierkernels.ops.select_blocks.testing import make_inputs

OP = torch.ops.hierkernels.select_blocks.default
BACKEND = "reference" if native() is None else "cpu"
CASES = {case.name: case for case in CORRECTNESS}
PAPER = {"num_selected": 4, "block_size": 8, "stride": 4, "first_end": 7, "window_size": 8}
SEED = {"num_selected": 2, "block_size": 8, "stride": 4, "first_end": 3, "scoring": "logit"}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name", ["g3-hkv2", "forced-paper", "not-shared", "offset", "logit-g3-hkv2", "select0", "n0"]
)
def test_opcheck(name: str) -> None:
    call = make_inputs(CASES[name], torch.float32).call()
    torch.library.opcheck(OP, (*call.arguments(), BACKEND))


def _tensors(n: int, grad: bool = True) -> tuple[torch.Tensor, ...]:
    shapes = (2, 4, n, 8), (2, 2, n // 4, 8), (2, 2, n // 4, 8)
    return tuple(torch.randn(shape, requires_grad=grad) for shape in shapes)


def _paper(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = hk.compressed_attention(
        q, k, v, stride=4, first_end=7, return_lse=True, backend=BACKEND
    )
    chosen = hk.select_blocks(q, k, lse=lse, num_local=1, backend=BACKEND, **PAPER)
    return out + lse.clamp(min=-9)[..., None], chosen


def _seed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    chosen, p = hk.select_blocks(
        q, k, strict=True, return_probabilities=True, backend=BACKEND, **SEED
    )
    return p, chosen


@pytest.mark.parametrize(
    ("function", "lengths"), [(_paper, (40, 53)), (_seed, (40,))], ids=["paper", "seed"]
)
def test_compile_fullgraph(
    function: Callable[..., tuple[torch.Tensor, torch.Tensor]], lengths: tuple[int, ...]
) -> None:
    """One graph for several lengths; the formula of probabilities, in PyTorch, for one."""
    dynamic = len(lengths) > 1
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in lengths:
        leaves = _tensors(n)
        out, chosen = compiled(*leaves)
        expected, expected_chosen = function(*leaves)
        assert torch.equal(chosen, expected_chosen)
        torch.testing.assert_close(out, expected)
        grads = torch.autograd.grad(out.sum(), leaves[:2])
        torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), leaves[:2]))


def test_export() -> None:
    class Module(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
            return _paper(q, k, v)

    leaves = _tensors(40, grad=False)
    exported = torch.export.export(Module(), leaves)
    again = exported.module()(*leaves)
    for actual, expected in zip(again, _paper(*leaves), strict=True):
        torch.testing.assert_close(actual, expected)


def test_indices_have_no_gradient() -> None:
    q, k, _ = _tensors(40)
    chosen = hk.select_blocks(q, k, **SEED, backend=BACKEND)
    assert chosen.dtype == torch.int32 and not chosen.requires_grad
    # Through the dispatcher, too.
    with torch.autograd.profiler.profile():
        assert not hk.select_blocks(q, k, **SEED, backend=BACKEND).requires_grad


@pytest.mark.parametrize("backend", sorted({"reference", BACKEND}))
def test_autocast(backend: str) -> None:
    q, k, v = _tensors(40, grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        chosen, p = hk.select_blocks(q, k, **SEED, return_probabilities=True, backend=backend)
        out = hk.compressed_attention(q, k, v, stride=4, first_end=7, backend=backend)
    low = [t.bfloat16() for t in (q, k, v)]
    expected = hk.select_blocks(*low[:2], **SEED, return_probabilities=True, backend=backend)
    assert torch.equal(chosen, expected[0]) and torch.equal(p, expected[1])
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, hk.compressed_attention(*low, stride=4, first_end=7, backend=backend))


def test_second_derivatives_of_the_reference() -> None:
    leaves = tuple(t.detach().double()[:, :, :9].requires_grad_() for t in _tensors(40))

    def f(*tensors: torch.Tensor) -> torch.Tensor:
        return hk.compressed_attention(
            *tensors, stride=1, first_end=1, num_memory=1, backend="reference"
        )[:1, :2, :5]

    small = tuple(t.detach()[:1, :, :5, :2].clone().requires_grad_() for t in leaves)
    assert torch.autograd.gradgradcheck(f, small)
