"""What the ahead-of-time reports say of a kernel, read from code with planted faults."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from hierkernels.triton_common.resources import (
    _loops,
    accesses,
    products_of_32_bits,
    programs_that_fit,
)

PTX = """
    @%p1 ld.global.b16 { %rs1 }, [ %rd1 + 0 ];
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd2 + 0 ];
    ld.global.L1::evict_last.L2::cache_hint.v2.b32 { %r1, %r2 }, [ %rd2 + 0 ], %rd9;
    st.global.v4.b32 [ %rd3 + 0 ], { %r1, %r2, %r3, %r4 };
    st.global.b8 [ %rd3 + 0 ], { %r1 };
    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd4 + 0 ], 0x10, %r5;
    cp.async.ca.shared.global [ %r1 + 0 ], [ %rd4 + 0 ], 4;
    ld.shared.b16 %rs1, [ %r1 ];
"""


def test_accesses() -> None:
    found = accesses(PTX)
    assert found.loads == {2: 1, 16: 1, 8: 1}
    assert found.stores == {16: 1, 1: 1}
    assert found.copies == {16: 1, 4: 1}
    assert found.narrow == 2


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "programs"),
    [
        (90, 128, 0, 8, 2),  # 65536 registers / (256 threads x 128)
        (90, 129, 0, 8, 1),  # given out by 256 a warp: 136 a thread
        (90, 32, 0, 4, 16),  # 64 warps
        (90, 32, 100 * 1024, 4, 2),  # 228 KiB
        (90, 32, 113 * 1024, 4, 2),
        (90, 32, 114 * 1024, 4, 1),  # with the KiB of its own
        (86, 32, 0, 1, 16),
        (80, 255, 40 * 1024, 4, 2),
    ],
)
def test_programs_that_fit(
    arch: int, registers: int, shared: int, warps: int, programs: int
) -> None:
    assert programs_that_fit(arch, registers, shared, warps) == programs


def _ttir(first: str, second: str) -> str:
    """Rows and a stride, the one times the other, as the offset of a load."""
    return f"""
  tt.func public @kernel(%x: !tt.ptr<f32> loc("x"(#loc)), %n: i32 loc("n"(#loc))) {{
    %c = arith.constant 64 : i32 loc(#loc1)
    %pid = tt.get_program_id x : i32 loc(#loc2)
    %wide = arith.extsi %pid : i32 to i64 loc(#loc3)
    %stride = arith.extsi %n : i32 to i64 loc(#loc3)
    %at = arith.muli {first}, {second} loc(#loc4)
    %ptr = tt.addptr %x, %at : !tt.ptr<f32>, i32 loc(#loc5)
#loc4 = loc("at"(#loc9))
"""


def test_products_of_32_bits() -> None:
    assert products_of_32_bits(_ttir("%pid", "%n : i32")) == {"at"}
    hinted = "%n {tt.divisibility = dense<16> : tensor<1xi32>} : i32"
    assert products_of_32_bits(_ttir("%pid", hinted)) == {"at"}
    assert not products_of_32_bits(_ttir("%pid", "%c : i32"))  # tiles: the tensor's own length
    assert not products_of_32_bits(_ttir("%wide", "%stride : i64"))
    assert not products_of_32_bits(_ttir("%wide", hinted.replace("%n", "%stride")[:-3] + "i64"))
    assert not products_of_32_bits(_ttir("%pid", "%n : i32").replace("tt.addptr", "tt.other"))


def test_loops() -> None:
    sass = [".L_x_0:", "IADD ;", ".L_x_1:", "FMUL ;", "@P0 BRA `(.L_x_1) ;", "EXIT ;",
            "BRA `(.L_x_9) ;", ".L_x_9:"]  # fmt: skip
    assert _loops(sass) == sass[2:5]
