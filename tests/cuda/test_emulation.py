"""The emulation itself: instructions as the PTX ISA has them, and planted faults that must show.

The formulas here are written from the PTX ISA's tables, not from the emulation.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

SEEDS = range(1, 9)


def _words(emulation: ModuleType, name: str, out: torch.Tensor, **given: torch.Tensor) -> None:
    """Runs one warp on the words of its lanes; out is written."""
    for t in (out, *given.values()):
        emulation.allow(t.data_ptr(), t.nbytes)
    addresses = [given[n].data_ptr() if n in given else 0 for n in "abc"]
    emulation.probe_words(name, *addresses, out.data_ptr())


# ---- instructions ----


def test_ldmatrix(emulation: ModuleType) -> None:
    matrices = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    for name, source in (("ldmatrix", matrices), ("ldmatrix_trans", matrices.mT)):
        out = torch.zeros(32, 4, dtype=torch.int32)
        _words(emulation, name, out, a=matrices)
        lane = torch.arange(32)
        row, column = lane // 4, lane % 4 * 2
        for m in range(4):
            pairs = torch.stack((source[m, row, column], source[m, row, column + 1]), -1)
            assert torch.equal(out[:, m].contiguous().view(torch.int16).view(32, 2), pairs)


def _a_fragments(a: torch.Tensor, per_word: int) -> torch.Tensor:
    """(32, 4 words) of a (16, K) operand."""
    lane, half = torch.arange(32), a.shape[1] // 2
    g, t = lane // 4, lane % 4 * per_word
    words = [
        torch.stack([a[g + rows, t + columns + e] for e in range(per_word)], -1)
        for columns in (0, half)
        for rows in (0, 8)
    ]
    return torch.stack(words, 1).contiguous()


def _b_fragments(b: torch.Tensor, per_word: int) -> torch.Tensor:
    """(32, 2 words) of a (K, 8) operand."""
    lane, half = torch.arange(32), b.shape[0] // 2
    g, t = lane // 4, lane % 4 * per_word
    words = [torch.stack([b[t + rows + e, g] for e in range(per_word)], -1) for rows in (0, half)]
    return torch.stack(words, 1).contiguous()


def _c_fragments(c: torch.Tensor) -> torch.Tensor:
    """(32, 4) of a (16, 8) accumulator."""
    lane = torch.arange(32)
    g, t = lane // 4, lane % 4 * 2
    return torch.stack([c[g, t], c[g, t + 1], c[g + 8, t], c[g + 8, t + 1]], 1).contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_mma(emulation: ModuleType, dtype: torch.dtype) -> None:
    per_word = 4 // dtype.itemsize
    depth = 8 * per_word
    # Small integers: products and sums are exact in every type.
    a, b = (torch.randint(-9, 10, s).to(dtype) for s in ((16, depth), (depth, 8)))
    c = torch.randint(-9, 10, (16, 8)).float()
    out = torch.zeros(32, 4)
    name = f"mma_{str(dtype).removeprefix('torch.')}"
    fragments = _a_fragments(a, per_word), _b_fragments(b, per_word)
    _words(emulation, name, out, a=fragments[0], b=fragments[1], c=_c_fragments(c))
    assert torch.equal(out, _c_fragments(c + a.float() @ b.float()))


def test_mma_sums_are_cut_not_rounded(emulation: ModuleType) -> None:
    """1 + 1.5 ulp is rounded up to 1 + 2 ulp, but cut to 1 + ulp, as tensor cores may do."""
    a, b = torch.zeros(16, 16), torch.zeros(16, 8)
    a[0, 0], b[0, 0] = 1.5 * 2.0**-23, 1.0
    c = torch.ones(16, 8)
    out = torch.zeros(32, 4)
    a, b = _a_fragments(a.bfloat16(), 2), _b_fragments(b.bfloat16(), 2)
    _words(emulation, "mma_bfloat16", out, a=a, b=b, c=_c_fragments(c))
    assert out[0, 0].item() == 1 + 2.0**-23


def test_shuffles_and_votes(emulation: ModuleType) -> None:
    out = torch.zeros(64, 7, dtype=torch.int32)
    _words(emulation, "warp", out)

    def votes(holds: Callable[[int], bool], lanes: range) -> int:
        bits = sum(1 << lane for lane in lanes if holds(lane))
        return bits - 2**32 if bits >= 2**31 else bits

    for thread, found in enumerate(out.tolist()):
        lane = thread % 32
        expected = [
            sum(n * n for n in range(32)),
            lane - 3 if lane % 16 >= 3 else lane,
            lane + 5 if lane % 8 < 3 else lane,
            lane // 16 * 16 + 7,
            votes(lambda n: n % 3 == 0, range(32)),
            votes(lambda n: n % 2 == 1, range(16))
            if lane < 16
            else votes(lambda n: n % 5 == 0, range(16, 32)),
            1,
        ]
        assert found == expected


def test_conversions(emulation: ModuleType) -> None:
    special = [0.0, 1.0, -2.5, 65504.0, 65519.9, 65520.0, 1e6, 3e38, 6e-8, 2.9e-8, 6.1e-5, 1e-40]
    numbers = torch.cat((torch.tensor(special), torch.randn(64 - len(special)) * 8))
    out = torch.zeros(64, 6, dtype=torch.int32)
    _words(emulation, "convert", out, c=numbers)
    for column, dtype in ((0, torch.bfloat16), (1, torch.float16)):
        pair = torch.stack((numbers, -numbers), -1).to(dtype)
        assert torch.equal(out[:, column], pair.view(torch.int32)[:, 0])
        assert torch.equal(out[:, 4 + column].view(torch.float32), pair[:, 0].float())
    tf32 = out[:, 2].contiguous().view(torch.float32)
    assert not (out[:, 2] & 0x1FFF).any()
    assert ((tf32 - numbers).abs() <= numbers.abs().clamp(min=2.0**-126) * 2.0**-11).all()
    powers = torch.exp2(numbers)
    powers[powers < torch.finfo(torch.float32).tiny] = 0
    torch.testing.assert_close(out[:, 3].contiguous().view(torch.float32), powers)


# ---- kernels, right and with planted faults ----


def _transpose(emulation: ModuleType, fault: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(result, expected) of the transposing kernel."""
    source, out = torch.randn(64, 64), torch.full((64, 64), torch.nan)
    for t in (source, out):
        emulation.allow(t.data_ptr(), t.nbytes)
    emulation.probe_transpose(getattr(emulation.Fault, fault), source.data_ptr(), out.data_ptr())
    return out, source.mT


def _pipeline(emulation: ModuleType, fault: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(result, expected) of the summing kernel, on more tiles than its stages."""
    source, out = torch.randint(-9, 9, (7, 1024)).float(), torch.full((1024,), torch.nan)
    for t in (source, out):
        emulation.allow(t.data_ptr(), t.nbytes)
    emulation.probe_pipeline(
        getattr(emulation.Fault, fault), source.data_ptr(), out.data_ptr(), len(source)
    )
    return out, source.sum(0)


@pytest.mark.parametrize("run", [_transpose, _pipeline])
def test_right_kernels_pass_under_every_seed(emulation: ModuleType, run: Callable) -> None:
    for seed in range(1, 33):
        emulation.set_options(seed=seed)
        out, expected = run(emulation, "none")
        assert torch.equal(out, expected)


FAULTS = [
    (_transpose, "no_barrier", "race|which nothing wrote"),
    (_transpose, "unwritten", "which nothing wrote"),
    (_pipeline, "no_barrier", "race|which nothing wrote"),
    (_pipeline, "no_second_barrier", "race"),
    (_pipeline, "no_wait", "race"),
]
_IDS = [f"{run.__name__.strip('_')}-{fault}" for run, fault, _ in FAULTS]


@pytest.mark.parametrize(("run", "fault", "message"), FAULTS, ids=_IDS)
def test_planted_faults_show_as_wrong_results(
    emulation: ModuleType, run: Callable, fault: str, message: str
) -> None:
    """Without the detector: random order, poison and late copies alone make the result wrong."""
    wrong = 0
    for seed in SEEDS:
        emulation.set_options(seed=seed, races=False)
        out, expected = run(emulation, fault)
        wrong += not torch.equal(out, expected)
    assert wrong > len(SEEDS) // 2


@pytest.mark.parametrize(("run", "fault", "message"), FAULTS, ids=_IDS)
def test_planted_faults_are_reported(
    emulation: ModuleType, run: Callable, fault: str, message: str
) -> None:
    for seed in SEEDS:
        emulation.set_options(seed=seed)
        with pytest.raises(RuntimeError, match=message):
            run(emulation, fault)


def test_shared_memory_out_of_bounds_is_reported(emulation: ModuleType) -> None:
    with pytest.raises(RuntimeError, match=r"transpose, block \(0, 0, 0\), thread .*out of bounds"):
        _transpose(emulation, "out_of_bounds")


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (
            "barrier_not_reached",
            r"deadlock.*\[__syncthreads: 32, first 0\].*\[ended: 32, first 32\]",
        ),
        ("lane_missing", "deadlock.*shuffle: 62"),
        ("divergence", "divergence: (shuffle|vote) here"),
        ("copy_not_awaited", "cp.async not waited for"),
        ("unaligned_copy", "not a multiple of 16"),
        ("global_out_of_bounds", "store of 4 bytes of global memory"),
        ("unordered_within_warp", "race|which nothing wrote"),
    ],
)
def test_misuse_is_reported(emulation: ModuleType, misuse: str, message: str) -> None:
    data = torch.zeros(64)
    emulation.allow(data.data_ptr(), data.nbytes)
    for seed in SEEDS:
        emulation.set_options(seed=seed)
        with pytest.raises(RuntimeError, match=message):
            emulation.probe_misuse(getattr(emulation.Misuse, misuse), data.data_ptr())
