"""Plain CPU calls go round the dispatcher; whatever watches operators still sees every one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import hierkernels as hk
from hierkernels.eager import is_unwatched

FORWARD = torch.ops.hierkernels.attention_forward.default
BACKWARD = torch.ops.hierkernels.attention_backward.default


def _qkv(**options: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = torch.randn(3, 1, 2, 5, 8, **options).unbind()
    return q, k, v


def _inference_tensor() -> torch.Tensor:
    with torch.inference_mode():
        return torch.randn(2)


@pytest.mark.parametrize(
    "context",
    [torch.enable_grad, torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")],
    ids=["grad", "no_grad", "inference", "autocast"],
)
def test_plain_tensors(context: Callable[[], AbstractContextManager]) -> None:
    x = torch.randn(2, 3)
    with context():
        for t in (x, x.T, x + 1, torch.nn.Parameter(x), x.bool(), _inference_tensor()):
            assert is_unwatched((t, None, t))


def _fake_gpu_tensor() -> torch.Tensor:
    """Looks like one of a CUDA device, which nothing may initialise on its account."""
    with FakeTensorMode():
        return torch.empty(2, device="cuda:0")


SPECIAL: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "negated": torch._neg_view,
    "zero": lambda x: torch._efficientzerotensor(x.shape),
    "sparse": lambda x: x.to_sparse(),
    "meta": lambda x: x.to("meta"),
    "fake": lambda x: FakeTensorMode().from_tensor(x),
    "fake-gpu": lambda x: _fake_gpu_tensor(),
    "subclass": lambda x: torch.nested.nested_tensor([x], layout=torch.jagged),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_special_tensors(kind: str) -> None:
    x = torch.randn(2, 3)
    assert not is_unwatched((x, None, SPECIAL[kind](x)))


def test_lazily_negated_inputs_are_negated() -> None:
    q, k, v = _qkv()
    expected = hk.attention(-q, k, -v)
    assert torch.equal(hk.attention(torch._neg_view(q), k, torch._neg_view(v)), expected)


def test_fake_inputs_give_fake_outputs() -> None:
    mode = FakeTensorMode()
    q, k, v = (mode.from_tensor(t) for t in _qkv())
    out, lse = hk.attention(q, k, v, return_lse=True)
    assert isinstance(out, FakeTensor) and isinstance(lse, FakeTensor)


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_see_forward_and_backward() -> None:
    q, k, v = _qkv(requires_grad=True)
    with _Seen() as seen:
        hk.attention(q, k, v).sum().backward()
    assert FORWARD in seen.operators and BACKWARD in seen.operators
    with torch.no_grad(), _Seen() as seen:
        hk.attention(q, k, v)
    assert FORWARD in seen.operators


def test_a_mode_round_the_backward_alone_sees_it() -> None:
    q, k, v = _qkv(requires_grad=True)
    out = hk.attention(q, k, v).sum()
    with _Seen() as seen:
        out.backward()
    assert BACKWARD in seen.operators


def test_function_modes_see_the_operator() -> None:
    seen = []

    class Seen(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Seen():
        hk.attention(*_qkv())
    assert FORWARD in seen


def test_the_profiler_names_the_operator() -> None:
    with torch.profiler.profile() as profiler:
        hk.attention(*_qkv())
    assert "hierkernels::attention_forward" in {event.key for event in profiler.key_averages()}


def test_tracers_record_the_operator() -> None:
    graph = make_fx(lambda q, k, v: hk.attention(q, k, v))(*_qkv()).graph
    assert FORWARD in {node.target for node in graph.nodes}


def test_saved_tensors_go_through_hooks() -> None:
    q, k, v = _qkv(requires_grad=True)
    expected = torch.autograd.grad(hk.attention(q, k, v).sum(), (q, k, v))
    packed = []

    def pack(t: torch.Tensor) -> int:
        packed.append(t.detach().clone())
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: packed[i]):
        out = hk.attention(q, k, v)
    assert len(packed) >= 5  # q, k, v, out, lse
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    for grad, wanted in zip(grads, expected, strict=True):
        assert torch.equal(grad, wanted)


def test_a_batch_of_output_gradients() -> None:
    # The backward alone runs under vmap: its tensors are batched there.
    q, k, v = _qkv(requires_grad=True)
    out = hk.attention(q, k, v)
    douts = torch.randn(3, *out.shape)
    batched = torch.autograd.grad(out, (q, k, v), douts, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(out, (q, k, v), dout, retain_graph=True) for dout in douts]
    for grads, wanted in zip(batched, zip(*single, strict=True), strict=True):
        torch.testing.assert_close(grads, torch.stack(wanted))


def test_the_gating_unit_goes_round_the_dispatcher_as_well() -> None:
    inputs = [torch.randn(shape) for shape in ((2, 5, 8), (2, 5, 8), (2, 5, 5), (2, 5))]
    for t in inputs:
        t.requires_grad_()

    def run() -> tuple[torch.Tensor, ...]:
        out = hk.causal_sgu(*inputs, activation="gelu")
        return out, *torch.autograd.grad(out.sum(), inputs)

    plain = run()
    with _Seen() as seen:
        watched = run()
    operators = torch.ops.hierkernels
    assert operators.causal_sgu_forward.default in seen.operators
    assert operators.causal_sgu_backward.default in seen.operators
    for a, b in zip(plain, watched, strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(hk.causal_sgu(*inputs, activation="gelu"), plain[0])
