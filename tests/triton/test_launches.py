"""From a call to its launches on a GPU that is not there: devices, streams, how often is compiled.

No kernel is compiled or run here; fake_gpu.py records what would be.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
from fake_gpu import FakeGPU, fake_mode, forget, install
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import hierkernels as hk
from hierkernels.ops.attention import aot as attention_cases
from hierkernels.ops.attention import api as attention
from hierkernels.ops.attention import triton as attention_backend
from hierkernels.ops.causal_sgu import aot as sgu_cases
from hierkernels.ops.causal_sgu import api as sgu
from hierkernels.ops.causal_sgu import triton as sgu_backend
from hierkernels.ops.gelu import api as gelu
from hierkernels.ops.gelu import triton as gelu_backend
from hierkernels.ops.native_sparse_attention import gated_sum as sum_of_branches
from hierkernels.ops.native_sparse_attention import triton_gated_sum as gated_sum
from hierkernels.ops.rms_norm import triton as norm_backend
from hierkernels.ops.rms_norm.call import NormCall
from hierkernels.ops.rotary import api as rotary
from hierkernels.ops.rotary import triton as rotary_backend
from hierkernels.ops.select_blocks import aot as select_cases
from hierkernels.ops.selected_attention import aot as selected_cases
from hierkernels.triton_common import device

if triton.knobs.runtime.interpret:
    pytest.skip("interpreted kernels are not launched", allow_module_level=True)

BF16 = torch.bfloat16


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGPU]:
    forget()
    yield install(monkeypatch)
    forget()


def _empty(*shape: int, index: int = 0, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=f"cuda:{index}")


# ---- every operator, forward and backward ----


def _attention(
    N: int = 64, Nk: int | None = None, index: int = 0, backward: bool = True, **options: Any
) -> None:
    q = _empty(2, 4, N, 64, index=index)
    k, v = (_empty(2, 4, Nk or N, 64, index=index) for _ in "kv")
    call = attention.make_call(q, k, v, **{"is_causal": True, **options})
    out, lse = attention_backend.forward(call)
    if backward:
        attention_backend.backward(call, out, lse, out, lse, call.bias is not None)


def _sgu(N: int = 64, index: int = 0, window: int | None = None) -> None:
    gate, residual = (_empty(2, N, 128, index=index) for _ in range(2))
    rows = (window, 2 * window) if window else (512, 512)
    weight = _empty(2, *rows, index=index)
    bias = _empty(2, rows[0], index=index)
    call = sgu.make_call(residual, gate, weight, bias, window=window, activation="gelu")
    out, z = sgu_backend.forward(call, True)
    sgu_backend.backward(call, z, out, (True,) * 5)


def _norm(N: int = 64, index: int = 0, layer: bool = False, C: int = 512) -> None:
    x, weight = _empty(2, N, C, index=index), _empty(C, index=index)
    call = NormCall(x, weight, weight if layer else None, 1e-6, False, 1, BF16)
    out, *saved = norm_backend.forward(call)
    norm_backend.backward(call, *saved, out, (True, True))


def _layer_norm(N: int = 64, index: int = 0) -> None:
    _norm(N, index, layer=True)


def _long_norm(N: int = 64, index: int = 0) -> None:
    _norm(N, index, layer=True, C=10000)


def _gelu(N: int = 64, index: int = 0) -> None:
    call = gelu.make_call(_empty(2, N, 512, index=index), "halves")
    gelu_backend.backward(call, *gelu_backend.forward(call))


def _rotary(N: int = 64, index: int = 0) -> None:
    x = _empty(2, 4, N, 64, index=index)
    tables = (_empty(N, 32, index=index, dtype=torch.float32) for _ in range(2))
    rotary_backend.forward(rotary.make_call(x, *tables))


def _gated_sum(N: int = 64, index: int = 0) -> None:
    parts = tuple(_empty(2, 4, N, 64, index=index) for _ in range(3))
    gates = _empty(2, 4, N, 3, index=index)
    out = gated_sum.forward(gates, parts)
    gated_sum.backward(gates, parts, out)


OPERATORS: dict[str, Callable[..., None]] = {
    "attention": _attention,
    "causal_sgu": _sgu,
    "gelu": _gelu,
    "layer_norm": _layer_norm,
    "long_norm": _long_norm,
    "rms_norm": _norm,
    "rotary": _rotary,
    "gated_sum": _gated_sum,
}


@pytest.mark.parametrize("op", OPERATORS)
def test_launches_go_to_the_device_and_stream_of_the_tensors(op: str, gpu: FakeGPU) -> None:
    """The second of two devices while the first is current; each has a stream of its own."""
    gpu.streams = {0: 17, 1: 23}
    with fake_mode():
        for _ in range(2):  # compiled, then found again
            OPERATORS[op](index=1)
    assert gpu.launched and {(x.device, x.stream) for x in gpu.launched} == {(1, 23)}
    assert gpu.current == 0
    gpu.launched.clear()
    with fake_mode():
        OPERATORS[op]()
    assert {(x.device, x.stream) for x in gpu.launched} == {(0, 17)}
    assert {x.grid[1:] for x in gpu.launched} == {(1, 1)}  # y and z end at 65535


@pytest.mark.parametrize("op", OPERATORS)
def test_a_launch_that_is_found_again_is_the_same(op: str, gpu: FakeGPU) -> None:
    with fake_mode():
        OPERATORS[op]()
        first, compiled = gpu.launched[:], len(gpu.compiled)
        gpu.launched.clear()
        OPERATORS[op]()
    assert len(gpu.compiled) == compiled == len({x.kernel for x in first})

    def described(value: Any) -> Any:
        return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else value

    for a, b in zip(first, gpu.launched, strict=True):
        assert (a.kernel, a.grid) == (b.kernel, b.grid)
        assert list(map(described, a.values)) == list(map(described, b.values))


def test_another_alignment_is_another_kernel(gpu: FakeGPU) -> None:
    """An address that is no multiple of 16 must not meet a kernel compiled for one that is."""
    with fake_mode():
        q = _empty(1, 1, 64, 64)
        odd = torch.empty(64 * 64 + 1, dtype=BF16, device="cuda:0")[1:].view(1, 1, 64, 64)
        for x in (q, odd, q, odd):
            attention_backend.forward(attention.make_call(x, q, q))
    assert len(gpu.compiled) == 2
    assert len(gpu.launched) == 4


# ---- how often is compiled ----

# Each kernel is compiled once over these lengths, and again where a stride is a length that is a
# multiple of 16 and one that is not: the gates (B, H, N, 3) have two such strides.
LENGTHS = [*range(129, 165), 512, 1000, 1024, 4095]


@pytest.mark.parametrize(("op", "most"), [
    ("attention", 1), ("causal_sgu", 2), ("gelu", 1), ("layer_norm", 1), ("rms_norm", 1),
    ("long_norm", 1), ("rotary", 1), ("gated_sum", 3),
])  # fmt: skip
def test_lengths_are_no_compile_time_numbers(op: str, most: int, gpu: FakeGPU) -> None:
    lengths = [n for n in LENGTHS if op != "causal_sgu" or n <= 512]
    with fake_mode():
        for n in lengths:
            OPERATORS[op](n)
    counts = {name: gpu.compiled.count(name) for name in gpu.compiled}
    assert max(counts.values()) <= most, counts


@pytest.mark.parametrize("options", ["", "padding", "bias", "mask", "window"])
def test_a_growing_cache_compiles_next_to_nothing(options: str, gpu: FakeGPU) -> None:
    """Decoding, one query and 65 to 400 keys: two kernels where a stride is the length."""
    with fake_mode():
        for n in range(65, 400):
            given: dict[str, Any] = {
                "padding": {"key_padding_mask": _empty(2, n, dtype=torch.bool)},
                "bias": {"attn_bias": _empty(4, 1, n)},
                "mask": {"attn_mask": _empty(2, 1, 1, n, dtype=torch.bool)},
                "window": {"window_size": (64, 0)},
            }.get(options, {})
            _attention(1, n, backward=False, **given)
    assert len(gpu.compiled) <= (2 if options in ("padding", "bias", "mask") else 1)
    assert len(gpu.launched) == 335


def test_remembered_launches_are_bounded(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    from hierkernels.triton_common import launch

    monkeypatch.setattr(launch, "_MOST", 10)
    with fake_mode():
        for n in range(65, 100):
            _attention(1, n, backward=False)
            assert len(launch._compiled) <= 10
    assert len(gpu.launched) == 35


# ---- nothing waits for the device ----


class _Transfers(TorchDispatchMode):
    """Copies between the host and a device, which no CUDA graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in (*args, out) if isinstance(t, torch.Tensor)]
        if len({t.device.type for t in tensors}) > 1:
            self.found.append(str(func))
        return out


@pytest.mark.parametrize("op", OPERATORS)
def test_nothing_waits_for_the_device(op: str, gpu: FakeGPU) -> None:
    """A fake tensor has no value to wait for: .item() and sizes that depend on data raise."""
    with fake_mode(), _Transfers() as transfers:
        OPERATORS[op]()
    assert not transfers.found


@pytest.mark.parametrize("module", [attention_cases, sgu_cases, select_cases, selected_cases])
def test_plans_wait_for_nothing(module: Any, gpu: FakeGPU) -> None:
    with fake_mode(), _Transfers() as transfers:
        for case in module.CASES:
            for launch in module.plan(case, device.target_of(_empty(1), False), "cuda:0"):
                launch.run()
    assert gpu.launched and not transfers.found


def test_dropout_takes_a_seed_without_a_transfer(gpu: FakeGPU) -> None:
    with fake_mode(), _Transfers() as transfers:
        _attention(dropout_p=0.1, dropout_seed=7)
        _attention(dropout_p=0.1)
    assert not transfers.found


def _compiled(q: torch.Tensor) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    N, D = q.shape[2:]
    weight, table = q.new_empty(D), q.new_empty(N, D // 2, dtype=torch.float32)
    mix, rows = q.new_empty(1, N, N), q.new_empty(1, N)
    return {
        "attention": lambda x: hk.attention(x, x, x, is_causal=True, backend="triton"),
        "local_attention": lambda x: hk.local_attention(x, x, x, 16, backend="triton"),
        "causal_sgu": lambda x: hk.causal_sgu(
            x.flatten(0, 1), x.flatten(0, 1), mix, rows, backend="triton"
        ),
        "rms_norm": lambda x: hk.rms_norm(x.flatten(0, 1), weight, backend="triton"),
        "rotary": lambda x: hk.rotary(x, table, table, backend="triton"),
    }


@pytest.mark.parametrize("op", sorted(_compiled(torch.empty(1, 1, 2, 2))))
def test_compiles_to_one_graph(op: str, gpu: FakeGPU) -> None:
    """torch.compile(fullgraph=True) of GPU tensors meets an operator, and launches nothing."""
    graphs: list[list[str]] = []

    def note(module: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append([str(node.target) for node in module.graph.nodes])
        return module.forward

    mode = FakeTensorMode()
    with mode:
        q = _empty(2, 4, 64, 64)
        f = _compiled(q)[op]
    with tracing(TracingContext(mode)):
        out = torch.compile(f, fullgraph=True, backend=note)(q)
    assert out.device.type == "cuda"
    assert len(graphs) == 1 and not gpu.launched
    assert sum("hierkernels" in target for target in graphs[0]) == 1


def test_a_traced_gated_sum_is_of_operations_that_can_be_traced(gpu: FakeGPU) -> None:
    with fake_mode():
        parts = tuple(_empty(2, 4, 8, 64) for _ in range(3))
        out = sum_of_branches.gated_sum(_empty(2, 4, 8, 3), parts, None)
    assert out.shape == parts[0].shape
    assert not gpu.launched


# ---- which devices ----


@pytest.mark.parametrize(
    ("properties", "reason"),
    [
        ({"capability": (7, 5), "shared": 64 * 1024, "name": "Tesla T4"}, "Tesla T4 has the"),
        ({"capability": (8, 9), "shared": 48 * 1024}, "49152 bytes of shared memory, 101376 are"),
        ({"hip": "6.2"}, "for AMD devices"),
    ],
    ids=["t4", "little-shared-memory", "rocm"],
)
def test_refusals(properties: dict, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, **properties)
    with fake_mode():
        q = _empty(1, 2, 8, 16)
        found = attention_backend.supports(attention.make_call(q, q, q)), gated_sum.reasons(q)
    for reasons in found:
        assert [text for text in reasons if reason in text]


@pytest.mark.parametrize(
    ("capability", "shared", "family"),
    [
        ((8, 0), 163, "sm_80"),
        ((8, 6), 99, "sm_86"),
        ((8, 9), 99, "sm_86"),
        ((9, 0), 227, "sm_90"),
        ((9, 0), 128, "sm_86"),
        ((10, 0), 227, "sm_100"),
        ((10, 3), 227, "sm_100"),
        ((12, 0), 99, "sm_86"),
    ],
)
def test_families(
    capability: tuple[int, int], shared: int, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what a program may have of the device's shared memory, as well."""
    install(monkeypatch, capability=capability, shared=shared * 1024, name="GPU")
    with fake_mode():
        assert device.target_of(_empty(1), False) == device.Target(family, "tf32", "GPU", 132)


def test_the_gating_unit_reads_the_tables_of_its_device(
    gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    from hierkernels.ops.causal_sgu import triton_launch

    def choose(target: device.Target, kernel: str, bucket: str, heuristic: Any) -> Any:
        seen.append(target.device)
        return heuristic

    monkeypatch.setattr(triton_launch, "choose", choose)
    with fake_mode():
        _sgu()
    assert set(seen) == {"NVIDIA H100"}


# ---- the work of the host ----


def _calls_in(f: Callable[[], Any]) -> int:
    """Python and C functions that f calls."""
    count = 0

    def note(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        f()
    finally:
        sys.setprofile(None)
    return count


def test_a_launch_takes_little_work(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of functions from hk.attention to the launch: 60 microseconds would be about 600.

    On CPU tensors, which take the way that plain tensors of a GPU take.
    """
    target = device._gpu_target(0, "tf32")
    monkeypatch.setattr(attention_backend, "device_reasons", lambda *_: [])
    monkeypatch.setattr(attention_backend, "target_of", lambda *_: target)
    q, k, v = torch.randn(3, 1, 8, 128, 64, dtype=BF16).unbind()

    def run() -> None:
        hk.attention(q, k, v, is_causal=True, backend="triton")

    run()
    assert _calls_in(run) < 400
    assert len(gpu.launched) == 2
