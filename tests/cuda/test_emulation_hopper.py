"""The emulation of sm_90a: tensor copies, mbarriers and wgmma, as the PTX ISA has them.

The formulas here are written from the PTX ISA, not from the emulation.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

SEEDS = range(1, 9)


def _allow(emulation: ModuleType, *tensors: torch.Tensor) -> None:
    for t in tensors:
        last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
        emulation.allow(t.data_ptr(), (last + 1) * t.itemsize)


# ---- tensor copies ----


def _copy(
    emulation: ModuleType, source: torch.Tensor, box: list[int], at: list[int]
) -> torch.Tensor:
    """The copied box as rows of 64 numbers, the swizzle undone; dimensions outermost first."""
    rows = torch.Size(box).numel() // 64
    out = torch.zeros(rows, 8, 8, dtype=torch.int16)
    _allow(emulation, source, out)
    assert emulation.probe_tensor_copy(
        source.data_ptr(), [*source.shape][::-1], [*source.stride()][::-1], box[::-1], at[::-1],
        out.data_ptr(),
    )  # fmt: skip
    # 128-byte swizzle: 16 bytes number c of row r lie where number c ^ (r % 8) would.
    row, chunk = torch.arange(rows)[:, None], torch.arange(8)
    return out[row, chunk ^ (row % 8)].view(box)


def _window(source: torch.Tensor, box: list[int], at: list[int]) -> torch.Tensor:
    """source[at : at + box] in each dimension, zero outside."""
    padded = source
    for d, (size, first) in enumerate(zip(box, at, strict=True)):
        index = torch.arange(first, first + size)
        inside = (index >= 0) & (index < source.shape[d])
        padded = padded.index_select(d, index.clamp(0, source.shape[d] - 1))
        padded = padded * inside.view([-1 if e == d else 1 for e in range(source.ndim)])
    return padded


@pytest.mark.parametrize(
    ("shape", "box", "at"),
    [
        ((100, 64), [64, 64], [0, 0]),
        ((100, 64), [64, 64], [60, 0]),  # rows that are not there
        ((20, 128), [16, 64], [3, 64]),  # the second half of the columns
        ((20, 128), [16, 64], [-2, 96]),  # columns and rows before and behind
        ((3, 40, 64), [2, 32, 64], [2, 20, 0]),
        ((2, 9, 4, 128), [1, 8, 4, 64], [1, 4, 0, 64]),
        ((2, 9, 3, 40), [2, 8, 2, 64], [0, 1, 2, 0]),
    ],
    ids=lambda x: "x".join(map(str, x)),
)
def test_tensor_copy(
    emulation: ModuleType, shape: tuple[int, ...], box: list[int], at: list[int]
) -> None:
    source = torch.randint(1, 30000, shape, dtype=torch.int16)
    assert torch.equal(_copy(emulation, source, box, at), _window(source, box, at))
    strided = torch.zeros(*shape[:-1], shape[-1] + 8, dtype=torch.int16)[..., : shape[-1]]
    strided.copy_(source)
    assert torch.equal(_copy(emulation, strided, box, at), _window(source, box, at))


@pytest.mark.parametrize(
    ("stride", "offset"),
    [([64, 1], 1), ([68, 1], 0), ([0, 1], 0), ([2**39, 1], 0)],
    ids=["address", "stride-of-8-bytes", "broadcast", "stride-of-2^40-bytes"],
)
def test_what_tensor_copies_cannot_take(
    emulation: ModuleType, stride: list[int], offset: int
) -> None:
    data = torch.zeros(8 * 72, dtype=torch.int16)
    address = data.data_ptr() + 2 * offset
    at = [0, 0]
    assert not emulation.probe_tensor_copy(address, [64, 8], stride[::-1], [64, 8], at, 0)


def test_a_copy_from_outside_of_the_tensors_is_reported(emulation: ModuleType) -> None:
    source, out = torch.zeros(64, 64, dtype=torch.int16), torch.zeros(64, 64, dtype=torch.int16)
    _allow(emulation, source[:63], out)
    with pytest.raises(RuntimeError, match=r"tensor_copy, .*in no tensor of the call"):
        emulation.probe_tensor_copy(
            source.data_ptr(), [64, 64], [1, 64], [64, 64], [0, 0], out.data_ptr()
        )


# ---- products ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("registers", [False, True], ids=["a-shared", "a-registers"])
@pytest.mark.parametrize("transposed", [False, True], ids=["b-rows", "b-columns"])
@pytest.mark.parametrize("n", [64, 128])
def test_wgmma(
    emulation: ModuleType, dtype: torch.dtype, registers: bool, transposed: bool, n: int
) -> None:
    # Small integers: products and sums are exact in every type.
    a, b = (torch.randint(-9, 10, s).to(dtype) for s in ((64, 64), (64, n)))
    c, out = torch.randint(-9, 10, (64, n)).float(), torch.full((64, n), torch.nan)
    given = b if transposed else b.mT.contiguous()
    _allow(emulation, a, given, c, out)
    emulation.probe_product(
        a.data_ptr(), given.data_ptr(), c.data_ptr(), out.data_ptr(),
        n, dtype == torch.float16, transposed, registers,
    )  # fmt: skip
    assert torch.equal(out, c + a.float() @ b.float())


# ---- registers ----


def test_registers_that_warpgroups_give_and_take(emulation: ModuleType) -> None:
    emulation.probe_registers(emulation.RegisterFault.none)
    for fault, words in (
        ("too_many", "more registers than there are"),
        ("one_warp", "not the same"),
    ):
        with pytest.raises(RuntimeError, match=f"registers, .*setmaxnreg: {words}"):
            emulation.probe_registers(getattr(emulation.RegisterFault, fault))


# ---- a pipeline, right and with planted faults ----


def _pipeline(emulation: ModuleType, fault: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(result, expected): seven tiles through two stages."""
    a, b = (torch.randint(-9, 10, s).bfloat16() for s in ((64, 64), (7, 64, 64)))
    out = torch.full((64, 64), torch.nan)
    _allow(emulation, a, b, out)
    emulation.probe_tensor_pipeline(
        getattr(emulation.HopperFault, fault), a.data_ptr(), b.data_ptr(), out.data_ptr(), len(b)
    )
    return out, (a.float() @ b.float().mT).sum(0)


def test_the_right_pipeline_passes_under_every_seed(emulation: ModuleType) -> None:
    for seed in range(1, 25):
        emulation.set_options(seed=seed)
        out, expected = _pipeline(emulation, "none")
        assert torch.equal(out, expected)


# Reported by the detector; without it, by a wrong result or an error in more than half of the runs.
FAULTS = {
    "wrong_parity": "race|nothing wrote|not been waited for|deadlock|middle of a phase|comes twice",
    "no_full_wait": "race|nothing wrote",
    "no_empty_wait": "race|deadlock|more than the 1 arrivals|on its way",
    "early_release": "race",
    "no_product_wait": "race|deadlock",
    "wrong_swizzle": "",
    "few_bytes": "race|deadlock|not been waited for|middle of a phase|on its way",
    "many_bytes": "deadlock.*mbarrier",
}
# No other order of threads makes these wrong: only a report shows them.
REPORTED = {
    "no_product_fence": "wgmma without a wgmma.fence",
    "no_init_fence": "no fence.mbarrier_init",
    "no_proxy_fence": "without fence.proxy.async",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_show_without_the_detector(emulation: ModuleType, fault: str) -> None:
    wrong = 0
    for seed in SEEDS:
        emulation.set_options(seed=seed, races=False)
        try:
            out, expected = _pipeline(emulation, fault)
            wrong += not torch.equal(out, expected)
        except RuntimeError:
            wrong += 1
    assert wrong > len(SEEDS) // 2


@pytest.mark.parametrize("fault", [f for f in (FAULTS | REPORTED) if f != "wrong_swizzle"])
def test_planted_faults_are_reported(emulation: ModuleType, fault: str) -> None:
    for seed in SEEDS:
        emulation.set_options(seed=seed)
        with pytest.raises(RuntimeError, match=(FAULTS | REPORTED)[fault]):
            _pipeline(emulation, fault)
