"""hk.selected_attention on the Triton backend, interpreted on the CPU, against the float64 oracle.

A query takes the interpreter about 10 ms in each direction, so cases have some dozens of them; its
tiles are small too (triton_configs.INTERPRETER), and chunks of the key-major backward hold 32 rows.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from hierkernels.ops.selected_attention import api, reference, triton_launch
from hierkernels.ops.selected_attention import triton as backend
from hierkernels.ops.selected_attention.spec import Case, dtype_name
from hierkernels.ops.selected_attention.testing import (
    Inputs,
    check_accuracy,
    make_inputs,
    make_standard,
)
from hierkernels.testing import compute, poisoned_memory
from hierkernels.triton_common.device import target_of

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def _case(
    name: str, B: int = 1, H: int = 2, N: int = 17, D: int = 16, S: int = 4, n: int = 3, **options
) -> Case:
    Hkv, Nk, Dv = options.pop("Hkv", 1), options.pop("Nk", N), options.pop("Dv", D)
    return Case(name, B, H, Hkv, N, Nk, D, Dv, S, n, **options)


LENGTHS = (
    (_case("n1", 2, N=1), F32),
    (_case("n15", N=15), F32),
    (_case("n63", N=63, H=1, S=16, n=1), BF16),
    (_case("n65", H=1, N=65, S=16, n=1), F32),
    (_case("q9-k507", N=9, Nk=507, S=64, n=3), F32),
    (_case("q1-k70-decode", 3, 4, 1, Nk=70, S=16), F16),
    (_case("q12-k5-before-all-keys", N=12, Nk=5), F32),
    (_case("no-queries", N=0, Nk=9), F32),
    (_case("no-keys", N=5, Nk=0), F32),
    (_case("no-batch", B=0), F32),
)

GROUPS = (
    (_case("g1-hkv2", Hkv=2), F32),
    (_case("g3", H=6, N=13, Hkv=2), F32),
    (_case("g4-bf16", H=4), BF16),
    (_case("g6", H=6), F32),
    (_case("g16-bf16", H=16), BF16),
    (_case("g20", H=20, N=14), F32),
    (_case("g128", H=128, N=3), F32),
    (_case("g2-per-head", 1, 4, 9, Hkv=2, per_head=True), F32),
    (_case("g3-per-head-own-bf16", H=3, N=13, per_head=True, own=True, pattern="any"), BF16),
)

# The forward's tiles hold 32 keys, those of dq 16: several blocks, one, or a part of one.
BLOCKS = (
    (_case("b1", H=1, S=1, n=5), F32),
    (_case("b3", S=3, n=4), F32),
    (_case("b16-bf16", N=30, S=16, H=1), BF16),
    (_case("b20", N=30, S=20, H=1), F32),
    (_case("b32", N=3, Nk=140, S=32), F32),
    (_case("b64", N=3, Nk=200, S=64), BF16),
    (_case("b300-beyond-all-keys", N=12, S=300, n=2), F32),
    (_case("named-0-own", n=0, own=True), F32),
    (_case("named-0", n=0), F32),
    (_case("named-1", n=1), F32),
    (_case("named-9-any", n=9, pattern="any"), F32),
)

PATTERNS = (
    (_case("any-full", pattern="any", is_causal=False), F32),
    (_case("any-full-q7-k40", N=7, Nk=40, pattern="any", is_causal=False), F32),
    (_case("holes", pattern="holes", n=5), F32),
    (_case("first-in-the-future", pattern="future"), F32),
    (_case("first-in-the-future-own", pattern="future", own=True), F32),
    (_case("none", pattern="none", lse_grad=True), F32),
    (_case("none-own", pattern="none", own=True), F32),
    (_case("twice", pattern="twice", n=6), F32),
    (_case("twice-own", pattern="twice", n=5, own=True), F32),
    (_case("all-in-any-order", pattern="all", n=6), F32),
    (_case("same-block", H=1, N=40, n=1, pattern="same"), F32),  # two chunks of the backward
    (_case("same-block-g3-bf16", N=30, H=3, n=1, pattern="same"), BF16),
    (_case("own-full", N=12, own=True, is_causal=False), F32),
)

MODIFIERS = (
    (_case("weights", weights=True), F32),
    (_case("weights-bf16", weights=True), BF16),
    (_case("weights-own-b20", N=25, S=20, weights=True, own=True, pattern="any"), F32),
    (_case("weights-twice", n=4, weights=True, pattern="twice", own=True), F32),
    (_case("weights-holes-per-head", n=4, weights=True, pattern="holes", per_head=True), F32),
    (_case("weights-same", N=40, H=1, n=1, S=8, weights=True, pattern="same"), F32),
    (_case("d1", D=1), F32),
    (_case("d40-dv8", D=40, Dv=8), BF16),
    (_case("d24-dv130", N=9, D=24, Dv=130), F32),
    (_case("lse-grad-none-seen", N=12, Nk=8, lse_grad=True, pattern="holes", n=2), F32),
    (_case("scale-negative", scale=-0.2), BF16),
    (_case("logits-x100", gain=100.0), F32),
    (_case("bnhd", 2, 4, 9, Hkv=2, layout="bnhd"), F32),
    (_case("packed-projection", 2, 4, 9, Hkv=2, layout="packed"), BF16),
    (_case("unaligned", D=18, layout="unaligned"), F32),
    (_case("broadcast-heads", H=4, Hkv=2, N=9, layout="broadcast"), F32),
    (
        _case(
            "everything", 2, 6, 9, 24, 5, 4, Hkv=2, Nk=30, Dv=40, pattern="any", weights=True,
            own=True, lse_grad=True, layout="bnhd",
        ),
        F32,
    ),
)  # fmt: skip


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"selected_attention-triton-{dtype_name(dtype)}-{case.name}")
        for case, dtype in LENGTHS + GROUPS + BLOCKS + PATTERNS + MODIFIERS
    ],
)
def test_accuracy(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    with poisoned_memory():
        results = compute(inputs, "triton")
    check_accuracy(inputs, results)


def _forward(inputs: Inputs, **changes: object) -> torch.Tensor:
    return replace(inputs, **changes).run("triton")[0]


def test_backward_follows_any_forward() -> None:
    inputs = make_inputs(_case("saved", lse_grad=True, weights=True, own=True), F32)
    call, names, standard = inputs.call(), ("dq", "dk", "dv", "dweights"), make_standard(inputs)
    for first, second in ((reference, backend), (backend, reference)):
        out, lse = first.forward(call)
        gradients = second.backward(call, out, lse, inputs.dout, inputs.dlse, True)
        standard.check(dict(zip(names, gradients, strict=True)))


def test_indices_out_of_range_count_as_none() -> None:
    """Unchecked, no value makes a kernel read elsewhere: the results are those of -1."""
    inputs = make_inputs(_case("range", pattern="holes", n=4), F32)
    wild = torch.tensor([-(2**63), -2, 5, 2**31 - 1, 2**32, 2**63 - 1])
    holes = inputs.indices < 0
    drawn = wild[torch.arange(holes.sum()) % len(wild)]
    bad = replace(inputs, indices=inputs.indices.masked_scatter(holes, drawn))
    results = []
    for some in (inputs, bad):
        call = some.call()
        out, lse = api.run(call, "triton", check_indices=False)
        results.append((out, lse, *backend.backward(call, out, lse, some.dout, None, False)[:3]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_int32_indices_of_any_strides() -> None:
    inputs = make_inputs(_case("strides", B=2, n=4), F32)
    turned = inputs.indices.int().permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    assert torch.equal(_forward(inputs, indices=turned), _forward(inputs))


def test_a_block_of_all_queries_is_split() -> None:
    """Its chunks are the work of several programs, none of which has more than its share."""
    inputs = make_inputs(_case("split", N=90, H=1, S=1, n=1, pattern="same"), F32)
    call = inputs.call()
    target = target_of(call.q, True)
    launch, lists, _ = triton_launch.plan_lists(call)
    launch.run()
    inverse = triton_launch.inverse_of(call, target, lists)
    assert inverse.items.chunk == 32
    assert (inverse.items.item_block == 0).sum() == 3
    assert inverse.rows[: inverse.starts[1]].tolist() == list(range(90))


def test_results_are_bitwise_repeatable() -> None:
    inputs = make_inputs(_case("repeat", H=1, N=34, n=1, pattern="same", weights=True), F32)
    first, second = compute(inputs, "triton"), compute(inputs, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_offsets_beyond_32_bits() -> None:
    """Tokens 2**26 elements apart: the offset of token 33 exceeds 2**31 (memory is not touched)."""
    inputs = make_inputs(_case("far", H=1, N=36, S=8, n=5, pattern="all"), BF16)
    memory = torch.empty(36 * 2**26, dtype=BF16)
    far = memory.as_strided(inputs.k.shape, (0, 0, 2**26, 1))
    far.copy_(inputs.k)
    results = compute(replace(inputs, q=far, k=far, v=far), "triton")
    check_accuracy(replace(inputs, q=inputs.k, v=inputs.k), results)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(_case("refused"), torch.float64)
    with pytest.raises(NotImplementedError, match="float64 is not one of"):
        inputs.run("triton")
    wide = make_inputs(_case("refused", D=257, H=129), F32).call()
    assert len(backend.supports(wide)) == 3
    many = torch.empty(2**15, 1, 2**15, 16, device="meta").expand(-1, 2, -1, -1)
    indices = torch.empty(2**15, 1, 2**15, 1, dtype=torch.int32, device="meta")
    long = replace(wide, q=many, k=many[:, :1], v=many[:, :1], indices=indices)
    assert [text for text in backend.supports(long) if "beyond 32 bits" in text]
    monkeypatch.setattr(backend, "INTERPRETED", False)
    assert [text for text in backend.supports(inputs.to(F32).call()) if "needs a GPU" in text]
