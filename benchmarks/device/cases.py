"""What is measured on a GPU: each op's cases and rows, the most important first, bfloat16.

The suites of benchmarks/suites with other cases and peers, and oracles for long sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from benchmarks.suite import Candidate, OpProblem, Problem, Suite, Unsupported
from benchmarks.suites import attention, causal_sgu, selected_attention
from hierkernels import testing
from hierkernels.ops.attention.spec import Case as AttentionCase
from hierkernels.ops.causal_sgu import reference as sgu_reference
from hierkernels.ops.causal_sgu.spec import Case as SguCase
from hierkernels.ops.native_sparse_attention import testing as nsa_testing
from hierkernels.ops.native_sparse_attention.spec import NsaCase
from hierkernels.ops.selected_attention.spec import Case as SelectedCase

BF16 = (torch.bfloat16,)
OURS = ("cuda", "triton")
JUDGED_QUERIES = 32  # of a long sequence, by an oracle that holds all their scores
CHECK_START = 7


class DeviceAttention(attention.AttentionSuite):
    """Causal, windowed, short attention and decoding: kernels of SDPA, and flex_attention."""

    peers: ClassVar = {
        "cudnn": "F.scaled_dot_product_attention, cuDNN",
        "flash": "F.scaled_dot_product_attention, flash",
        "flex": "flex_attention",
    }
    yardstick = "cudnn"
    memory = None
    sweeps = ()

    def problem(self, case: AttentionCase, dtype: torch.dtype, device: str) -> OpProblem:
        if case.Nq == 1:
            return self._decoding(case, dtype, device)
        if case.B > attention.CHECK_SEQUENCES or case.Nq <= 2 * JUDGED_QUERIES:
            return super().problem(case, dtype, device)
        inputs = self.inputs(case, dtype, device)
        step = case.Nq // JUDGED_QUERIES | 1  # odd: the queries fall on every place of a tile
        standard = testing.make_standard(inputs.thin(CHECK_START, step))
        return OpProblem(inputs, standard, {"out": 2, "dq": 2}, slice(CHECK_START, None, step))

    def _decoding(self, case: AttentionCase, dtype: torch.dtype, device: str) -> OpProblem:
        """Judged on some sequences, the last one among them."""
        inputs = self.inputs(case, dtype, device)
        step = -(-case.B * case.Hq * case.Nk // attention.CHECK_SCORES)
        some = slice((case.B - 1) % step, None, step)
        standard = testing.make_standard(attention.some_sequences(inputs, some))
        return OpProblem(inputs, standard, {"out": 0, "dq": 0, "dk": 0, "dv": 0}, some)

    def candidates(self, row: str, inputs: testing.Inputs, direction: str) -> Iterator[Candidate]:
        if row in ("cudnn", "flash"):
            if inputs.case.window:
                raise Unsupported("this kernel is not given masks")
            kernel = f"{row.upper()}_ATTENTION"
            attend = attention.with_kernel(attention.sdpa_function(inputs), kernel)
            yield Candidate(attend, inputs, "heads first")
            yield Candidate(attend, attention.tokens_first(inputs), "tokens first")
            if inputs.case.Hq != inputs.case.Hkv:  # for versions whose kernel has no groups
                yield Candidate(_repeated(kernel), inputs, "keys repeated")
        else:
            yield from super().candidates(row, inputs, direction)


def _repeated(kernel: str) -> attention.Function:
    """SDPA on keys and values that are copied for each head of a group."""

    def attend(i: testing.Inputs) -> torch.Tensor:
        k, v = (t.repeat_interleave(i.case.Hq // i.case.Hkv, 1) for t in (i.k, i.v))
        return torch.nn.functional.scaled_dot_product_attention(
            i.q, k, v, is_causal=i.case.visible < i.case.Nq * i.case.Nk, scale=i.case.scale
        )

    return attention.with_kernel(attend, kernel)


@dataclass(frozen=True)
class SguProblem(OpProblem):
    """A dense product gives the weights of the future gradients, too: there it is not judged."""

    def check(self, candidate: Candidate, direction: str) -> dict[str, float]:
        if candidate.label != "dense" or direction == "forward":
            return super().check(candidate, direction)

        def function(i: Any) -> torch.Tensor:
            return candidate.function(replace(i, weight=i.weight.tril()))

        return super().check(replace(candidate, function=function), direction)


class DeviceSgu(causal_sgu.CausalSguSuite):
    """The gating unit against masked einsum, and a dense product of cuBLAS without a mask."""

    peers: ClassVar = {
        "eager": "eager reference (masked einsum)",
        "dense": "dense cuBLAS, nothing masked",
    }
    memory = None
    sweeps = ()

    def problem(self, case: SguCase, dtype: torch.dtype, device: str) -> OpProblem:
        p = super().problem(case, dtype, device)
        return SguProblem(p.inputs, p.standard, p.dims, p.judged)

    def candidates(self, row: str, inputs: Any, direction: str) -> Iterator[Candidate]:
        if row != "dense":
            yield from super().candidates(row, inputs, direction)
        elif inputs.case.window:
            raise Unsupported("a window leaves nothing dense")
        else:
            yield Candidate(
                _dense_sgu, replace(inputs, weight=inputs.weight.tril().nan_to_num()), row
            )


def _dense_sgu(inputs: Any) -> torch.Tensor:
    """The whole matrix times the gate of each head; its upper part is 0, but is multiplied."""
    case, gate = inputs.case, inputs.gate
    B, N, C = gate.shape
    weight = inputs.weight[:, :N, :N].to(gate.dtype)
    mixed = weight @ gate.view(B, N, case.H, C // case.H).transpose(1, 2)
    mixed = mixed + inputs.bias[:, :N, None].to(gate.dtype)
    mixed = mixed.transpose(1, 2).reshape(B, N, C)
    if inputs.gate_residual is not None:
        mixed = mixed + inputs.gate_residual
    return sgu_reference.activate(case.activation or "none", mixed) * inputs.residual


class DeviceSelected(selected_attention.SelectedAttentionSuite):
    """Selected attention against the kernels of fla-core, where it can be imported."""

    peers: ClassVar = {"fla": "fla-core"}
    yardstick = "fla"
    memory = None
    sweeps = ()

    def candidates(self, row: str, inputs: Any, direction: str) -> Iterator[Candidate]:
        if row == "fla":
            yield _fla(inputs)
        else:
            yield from super().candidates(row, inputs, direction)


def _fla(inputs: Any) -> Candidate:
    """fla's parallel_nsa with the blocks given and no other branch; tokens before heads."""
    try:
        from fla.ops.nsa.parallel import parallel_nsa
    except ImportError as error:
        raise Unsupported(f"fla-core cannot be imported: {error}") from error
    case = inputs.case
    indices = inputs.indices.transpose(1, 2).contiguous()

    def attend(i: Any) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in (i.q, i.k, i.v))
        out = parallel_nsa(
            q, k, v, block_indices=indices, block_counts=case.n, block_size=case.S,
            scale=case.D**-0.5,
        )  # fmt: skip
        return out.transpose(1, 2)

    return Candidate(attend, attention.tokens_first(inputs))


@dataclass(frozen=True)
class NsaProblem(Problem):
    """Judged on the last queries, each backend with the blocks that it chooses."""

    inputs: nsa_testing.Inputs
    queries: int

    def last(self) -> nsa_testing.Inputs:
        """The problem of the last queries alone."""
        i, rows = self.inputs, slice(-self.queries, None)
        return replace(
            i,
            case=replace(i.case, Nq=self.queries),
            q=i.q[:, :, rows],
            gates=i.gates[:, :, rows],
            q_cmp=None if i.q_cmp is None else i.q_cmp[:, :, rows],
            dout=i.dout[:, :, rows],
        )

    def check(self, candidate: Candidate, direction: str) -> dict[str, float]:
        backward, by_query = direction == "backward", {"out", "dq", "dq_cmp", "dgates"}
        standard = nsa_testing.make_standard(self.last(), candidate.label, backward)
        inputs = candidate.inputs
        if backward:
            dout = torch.zeros_like(inputs.dout)
            dout[:, :, -self.queries :] = inputs.dout[:, :, -self.queries :]
            inputs = replace(inputs, dout=dout)
        found = nsa_testing.compute(inputs, candidate.label, backward)
        parts = {n: t[:, :, -self.queries :] if n in by_query else t for n, t in found.items()}
        return {name: error.largest for name, error in standard.check(parts).items()}

    def bind(self, candidate: Candidate, direction: str) -> Any:
        return OpProblem(self.inputs, None, {}).bind(candidate, direction)  # type: ignore[arg-type]


class DeviceNsa(Suite):
    """hk.native_sparse_attention at the sizes of its paper: all three branches and the choice."""

    name = "native_sparse_attention"
    peers: ClassVar = {}
    yardstick = "triton"

    def inputs(self, case: NsaCase, dtype: torch.dtype, device: str) -> nsa_testing.Inputs:
        return nsa_testing.make_inputs(case, dtype, device)

    def problem(self, case: NsaCase, dtype: torch.dtype, device: str) -> NsaProblem:
        return NsaProblem(self.inputs(case, dtype, device), min(case.Nq, JUDGED_QUERIES))

    def shape(self, case: NsaCase) -> list[int]:
        return [case.B, case.Hq, case.Hkv, case.Nq, case.Nk, case.D, case.Dv]

    def candidates(self, row: str, inputs: Any, direction: str) -> Iterator[Candidate]:
        yield Candidate(lambda i: i.run(row), inputs, row)


@dataclass(frozen=True)
class Entry:
    """A case and its rows."""

    suite: Suite
    case: Any
    rows: tuple[str, ...]
    seconds: float  # of all directions, roughly: drawing inputs, compiling, checking, timing
    directions: tuple[str, ...] = ("forward", "backward")

    @property
    def name(self) -> str:
        return f"{self.suite.name}/{self.case.name}"


ATTENTION, SGU, SELECTED, NSA = DeviceAttention(), DeviceSgu(), DeviceSelected(), DeviceNsa()
SUITES: Sequence[Suite] = (ATTENTION, SGU, SELECTED, NSA)
HEADS, KV_HEADS = 64, 8


def _attention(
    group: str, name: str, B: int, H: int, Hkv: int, N: int, D: int, **options: Any
) -> Any:
    return AttentionCase(
        f"{group}-{name}", B, H, Hkv, N, N, D, D, is_causal=True, group=group, dtypes=BF16,
        **options,
    )  # fmt: skip


def causal(N: int, D: int, heads: int = HEADS, kv_heads: int = KV_HEADS) -> AttentionCase:
    """Causal attention of one sequence."""
    return _attention("long", f"1x{heads}x{N}x{D}-kv{kv_heads}", 1, heads, kv_heads, N, D)


def _decoding(B: int, Nk: int, D: int = 128, group: int = 8) -> AttentionCase:
    """One query of `group` heads for each sequence, against a cache of Nk keys of one head."""
    name = f"decoding-{B}x{group}x{Nk}x{D}-kv1"
    return AttentionCase(
        name, B, group, 1, 1, Nk, D, D, is_causal=True, group="decoding", dtypes=BF16
    )


def _sgu(N: int, C: int) -> SguCase:
    return SguCase(f"global-4x{N}x{C}", 4, N, C, 4, mixed=True, dtypes=BF16, group="global")


def _selected(N: int, heads: int = 16, kv_heads: int = 1) -> SelectedCase:
    name = f"paper-1x{heads}x{N}x128-kv{kv_heads}-b64x16"
    return SelectedCase(
        name, 1, heads, kv_heads, N, N, 128, 128, 64, 16, dtypes=BF16, group="paper"
    )


def _nsa(N: int, heads: int = 64, kv_heads: int = 4) -> NsaCase:
    return NsaCase(
        f"paper-{N}", "paper", 1, heads, kv_heads, N, N, 128, 128, 32, 16, 64, 16, 512,
        group="nsa-paper", dtypes=BF16,
    )  # fmt: skip


def entries() -> list[Entry]:
    """All that is measured, the most important first: a shorter run leaves out the end."""
    forced, flex = (*OURS, "cudnn", "flash"), (*OURS, "cudnn", "flash", "flex")
    sgu = (*OURS, "eager", "dense")

    def decoding(B: int, Nk: int, rows: tuple[str, ...], seconds: float) -> Entry:
        return Entry(ATTENTION, _decoding(B, Nk), rows, seconds, ("forward",))

    short = _attention("short", "4096x16x17x64", 4096, 16, 16, 17, 64)
    window = _attention(
        "window", f"1x{HEADS}x16384x128-kv{KV_HEADS}-1024", 1, HEADS, KV_HEADS, 16384, 128,
        window=(1024, None),
    )  # fmt: skip
    return [
        Entry(ATTENTION, causal(16384, 128), forced, 25),
        Entry(ATTENTION, causal(8192, 64), flex, 45),
        Entry(ATTENTION, short, flex, 45),
        Entry(SGU, _sgu(2048, 1024), sgu, 20),
        Entry(SELECTED, _selected(32768), (*OURS, "fla"), 30),
        Entry(NSA, _nsa(65536), OURS, 60),
        decoding(16, 65536, flex, 16),
        decoding(1, 65536, flex, 12),
        decoding(64, 8192, forced, 6),
        decoding(1, 8192, forced, 5),
        Entry(ATTENTION, causal(8192, 128), flex, 45),
        Entry(ATTENTION, window, (*OURS, "flex"), 45),
        *(Entry(ATTENTION, causal(n, d), forced, 20) for n in (2048, 4096) for d in (128, 64)),
        Entry(ATTENTION, causal(16384, 64), forced, 20),
        Entry(SGU, _sgu(4096, 1024), sgu, 20),
        decoding(16, 8192, forced, 5),
        decoding(64, 65536, forced, 22),
        Entry(SELECTED, _selected(8192), (*OURS, "fla"), 25),
        Entry(ATTENTION, causal(32768, 128), forced, 40),
        Entry(ATTENTION, causal(32768, 64), forced, 30),
    ]  # fmt: skip


def tiny_entries() -> list[Entry]:
    """One small case of each kind, for a look at how rows are called where there is no GPU."""
    sizes = {"heads": 2, "kv_heads": 1}
    flex = (*OURS, "cudnn", "flash", "flex")
    window = _attention("window", "1x2x160x64-kv1-32", 1, 2, 1, 160, 64, window=(32, None))
    return [
        Entry(ATTENTION, causal(160, 64, **sizes), flex, 1),
        Entry(ATTENTION, _attention("short", "3x2x17x64", 3, 2, 2, 17, 64), flex, 1),
        Entry(ATTENTION, window, (*OURS, "flex"), 1),
        Entry(ATTENTION, _decoding(3, 200, 64, 2), flex, 1, ("forward",)),
        Entry(SGU, _sgu(24, 32), (*OURS, "eager", "dense"), 1),
        Entry(SELECTED, _selected(256, 4, 1), (*OURS, "fla"), 1),
        Entry(NSA, _nsa(192, 4, 1), OURS, 1),
    ]
