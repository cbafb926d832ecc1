"""What decoding launches and allocates on a GPU that is not there, and how often it compiles."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
from fake_gpu import FakeGPU, fake_mode, forget, install
from torch.utils._python_dispatch import TorchDispatchMode

from hierkernels.ops.attention import api as attention
from hierkernels.ops.attention import triton as attention_backend
from hierkernels.ops.selected_attention import api as selected
from hierkernels.ops.selected_attention import triton as selected_backend

if triton.knobs.runtime.interpret:
    pytest.skip("interpreted kernels are not launched", allow_module_level=True)

FORWARD, COMBINE = "_attention_forward_kernel", "_attention_combine_kernel"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGPU]:
    forget()
    yield install(monkeypatch)
    forget()


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda:0")


def _decode(B: int, Hkv: int, Nk: int, cache: torch.Tensor, n: int = 1, **options) -> None:
    """n queries of 8 heads for each key/value head, against Nk keys of a cache with room."""
    q = _empty(B, 8 * Hkv, n, 128)
    k = cache[:B, :Hkv, :Nk]
    call = attention.make_call(q, k, k, **{"is_causal": True, **options})
    attention_backend.forward(call)


class _Allocations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "empty" in str(func)
        return func(*args, **(kwargs or {}))


def _allocations(B: int, Nk: int) -> int:
    with fake_mode():
        q, k = _empty(B, 8, 1, 128), _empty(B, 1, Nk, 128)
        call = attention.make_call(q, k, k, is_causal=True)
        with _Allocations() as allocations:
            attention_backend.forward(call)
    return allocations.count


def test_one_more_launch_and_one_more_allocation(gpu: FakeGPU) -> None:
    plain = _allocations(300, 8192)
    assert [x.kernel for x in gpu.launched] == [FORWARD]
    gpu.launched.clear()
    assert _allocations(4, 8192) == plain + 1 == 3
    assert [x.kernel for x in gpu.launched] == [FORWARD, COMBINE]
    forward, combine = (x.grid for x in gpu.launched)
    # 264 programs are what 132 multiprocessors hold; rows of 8192 keys are worth 64 parts.
    assert forward == (4 * 64, 1, 1)
    assert combine == (4 * 8, 1, 1)


@pytest.mark.parametrize("options", ["causal", "window", "padding", "speculative"])
def test_a_growing_cache_is_compiled_once(options: str, gpu: FakeGPU) -> None:
    """From few keys to many: the kernels without parts, with parts, and the one that adds."""
    with fake_mode():
        cache = _empty(2, 2, 40000, 128)
        for Nk in [*range(450, 600), *range(8150, 8250), 12345, 39999]:
            given = {
                "window": {"window_size": (4095, 0)},
                "padding": {"key_padding_mask": _empty(2, 40000, dtype=torch.bool)[:, :Nk]},
            }.get(options, {})
            _decode(2, 2, Nk, cache, 5 if options == "speculative" else 1, **given)
    assert sorted(gpu.compiled) == [COMBINE, FORWARD, FORWARD]
    assert {x.kernel for x in gpu.launched} == {COMBINE, FORWARD}


def test_a_window_is_cut_not_the_cache(gpu: FakeGPU) -> None:
    with fake_mode():
        cache = _empty(1, 1, 40000, 128)
        _decode(1, 1, 40000, cache, window_size=(2047, 0))
        _decode(1, 1, 40000, cache, window_size=(255, 0))
        _decode(1, 1, 2048, cache)
    assert [x.grid[0] for x in gpu.launched] == [16, 8, 1, 16, 8]


def test_selected_blocks(gpu: FakeGPU) -> None:
    """The paper's shapes: 16 blocks of 64 keys are four parts of 256 keys for 16 heads."""
    with fake_mode():
        k = _empty(1, 4, 32768, 128)
        indices = _empty(1, 4, 1, 16, dtype=torch.int32)
        call = selected.make_call(_empty(1, 64, 1, 128), k, k, indices, block_size=64)
        selected_backend.forward(call)
    launched = {x.kernel: x.grid[0] for x in gpu.launched}
    assert len(gpu.launched) == 3
    assert launched["_selected_attention_forward_kernel"] == 4 * 4
    assert launched[COMBINE] == 64
