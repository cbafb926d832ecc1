"""Inputs from a named case, and errors against the float64 oracle; used by tests and benchmarks.

The accuracy rule: error <= 2 x the error of the same formula in eager PyTorch at that dtype, plus
the rounding of each result's terms. Both the largest and the root-mean-square error obey it.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch

from hierkernels.key_range import KeyRange, Staircase
from hierkernels.native import kernels_of
from hierkernels.ops.attention import api, reference
from hierkernels.ops.attention.call import AttentionCall
from hierkernels.ops.attention.spec import Case, dtype_name

Results = dict[str, torch.Tensor]  # "out", "lse", "dq", "dk", "dv", "dbias"


@dataclass(frozen=True)
class Inputs:
    """The tensors of one case; the values depend on the case's name and the seed alone."""

    case: Case
    q: torch.Tensor  # (B, Hq, Nq, D)
    k: torch.Tensor  # (B, Hkv, Nk, D)
    v: torch.Tensor  # (B, Hkv, Nk, Dv)
    bias: torch.Tensor | None  # (B|1, Hq|1, Nq|1, Nk|1)
    mask: torch.Tensor | None  # (B|1, Hq|1, Nq|1, Nk|1) bool
    padding: torch.Tensor | None  # (B, Nk) bool
    dout: torch.Tensor  # (B, Hq, Nq, Dv), the gradient that backward starts from
    dlse: torch.Tensor | None  # (B, Hq, Nq), if the case has lse_grad
    dropout_seed: int

    @property
    def dtype(self) -> torch.dtype:
        return self.q.dtype

    def call(self) -> AttentionCall:
        """The case as every backend receives it."""
        case = self.case
        return api.make_call(
            self.q, self.k, self.v, attn_bias=self.bias, attn_mask=self.mask, scale=case.scale,
            key_padding_mask=self.padding, dropout_p=case.dropout_p, dropout_seed=self.dropout_seed,
            softcap=case.softcap, key_range=case.visible_range,
        )  # fmt: skip

    def run(self, backend: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) of a backend, through the public operator."""
        return api.run(self.call(), backend)

    def differentiable(self) -> dict[str, torch.Tensor]:
        """The inputs that have a gradient, by the name of it."""
        tensors = {"dq": self.q, "dk": self.k, "dv": self.v}
        return tensors if self.bias is None else tensors | {"dbias": self.bias}

    def requires_grad(self) -> Inputs:
        """The same values as fresh leaves that require gradients; strides are kept."""
        bias = None if self.bias is None else self.bias.detach().requires_grad_()
        q, k, v = (t.detach().requires_grad_() for t in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v, bias=bias)

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another dtype."""
        bias = None if self.bias is None else self.bias.to(dtype)
        lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        dlse = None if self.dlse is None else self.dlse.to(lse_dtype)
        q, k, v, dout = (t.to(dtype) for t in (self.q, self.k, self.v, self.dout))
        return replace(self, q=q, k=k, v=v, bias=bias, dout=dout, dlse=dlse)

    def thin(self, start: int, step: int) -> Inputs:
        """The problem of the queries start, start + step, ... alone: an oracle for long sequences.

        Its out, lse and dq are rows [start::step] of the whole problem's; its dk, dv and dbias are
        those of the whole problem if dout and dlse are zero at all other queries.
        Raises ValueError for dropout, whose mask depends on the query's index.
        """
        if self.case.dropout_p:
            raise ValueError("a thinned problem would draw another dropout mask")
        rows = slice(start, None, step)

        def cut(t: torch.Tensor | None) -> torch.Tensor | None:
            return t if t is None or t.shape[2] == 1 else t[:, :, rows]

        q, dout = self.q[:, :, rows], self.dout[:, :, rows]
        lo, hi = (_every_nth(bound, start, step) for bound in self.case.visible_range)
        case = replace(self.case, Nq=q.shape[2], key_range=KeyRange(lo, hi))
        dlse = None if self.dlse is None else self.dlse[:, :, rows]
        return replace(
            self, case=case, q=q, bias=cut(self.bias), mask=cut(self.mask), dout=dout, dlse=dlse
        )


def _every_nth(bound: Staircase, start: int, step: int) -> Staircase:
    """The staircase i -> bound(start + step i)."""
    if step % bound.step:
        raise ValueError(f"step must be a multiple of the staircase's {bound.step}, got {step}")
    offset = bound.offset + (start + bound.shift) // bound.step * bound.rise
    return Staircase(0, 1, step // bound.step * bound.rise, offset, bound.floor)


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> Inputs:
    """Normally distributed tensors for a case, drawn on the CPU, so equal on every device."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()) + seed)
    precise = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, gain: float = 1.0) -> torch.Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=precise)
        return (drawn * gain).to(dtype).to(device)

    q, k, v = (
        normal(case.B, case.Hq, case.Nq, case.D, gain=case.gain),
        normal(case.B, case.Hkv, case.Nk, case.D),
        normal(case.B, case.Hkv, case.Nk, case.Dv),
    )
    q, k, v = lay_out(q, k, v, case.layout)
    bias = normal(*case.broadcast_shape(case.bias)) if case.bias else None
    mask = _mask(case, generator).to(device) if case.mask else None
    padding = _padding(case, generator).to(device) if case.padding else None
    dout = normal(case.B, case.Hq, case.Nq, case.Dv)
    dlse = None
    if case.lse_grad:
        shape = (case.B, case.Hq, case.Nq)
        dlse = torch.randn(shape, generator=generator, dtype=precise).to(device)
    return Inputs(case, q, k, v, bias, mask, padding, dout, dlse, dropout_seed=0x1234567890ABCDEF)


def lay_out(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same values in the memory order that a case names."""
    if layout == "bhnd":
        return q, k, v
    if layout == "bnhd":
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
        return q, k, v
    if layout == "channels":
        q, k, v = (t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v))
        return q, k, v
    if layout == "unaligned":
        q, k, v = (torch.nn.functional.pad(t, (1, 0))[..., 1:] for t in (q, k, v))
        return q, k, v
    if layout == "packed":
        sizes = [t.shape[1] * t.shape[3] for t in (q, k, v)]
        flat = torch.cat([t.transpose(1, 2).flatten(2) for t in (q, k, v)], dim=-1)
        parts = flat.split(sizes, dim=-1)
        q, k, v = (
            part.unflatten(-1, (t.shape[1], t.shape[3])).transpose(1, 2)
            for part, t in zip(parts, (q, k, v), strict=True)
        )
        return q, k, v
    if layout == "broadcast":
        return q, k[:, :1].expand_as(k), v[:, :1].expand_as(v)
    raise ValueError(f"unknown layout {layout!r}")


def _mask(case: Case, generator: torch.Generator) -> torch.Tensor:
    shape = case.broadcast_shape(case.mask)
    if case.mask_pattern == "random":
        return torch.rand(shape, generator=generator) >= 0.3
    mask = torch.ones(shape, dtype=torch.bool)
    if case.mask_pattern == "leading":
        mask[..., :128] = False
    elif case.mask_pattern == "rows":
        mask[:, :, ::3] = False
    else:
        raise ValueError(f"unknown mask_pattern {case.mask_pattern!r}")
    return mask


def _padding(case: Case, generator: torch.Generator) -> torch.Tensor:
    if case.padding == "random":
        return torch.rand((case.B, case.Nk), generator=generator) >= 0.3
    lengths = [math.ceil(case.Nk * (1 - b / case.B)) for b in range(case.B)]
    if case.padding == "empty":
        lengths[-1] = 0
    real = torch.arange(case.Nk)[None, :] < torch.tensor(lengths)[:, None]
    if case.padding == "left":
        return real.flip(1)
    if case.padding in ("right", "empty"):
        return real
    raise ValueError(f"unknown padding {case.padding!r}")


class OpInputs(Protocol):
    """The inputs of an attention op: what computing its results and gradients takes."""

    @property
    def dout(self) -> torch.Tensor: ...
    @property
    def dlse(self) -> torch.Tensor | None: ...
    def to(self, dtype: torch.dtype) -> Any: ...
    def requires_grad(self) -> Any: ...
    def differentiable(self) -> dict[str, torch.Tensor]: ...
    def run(self, backend: str | None) -> tuple[torch.Tensor, torch.Tensor]: ...


def compute(inputs: OpInputs, backend: str | None, gradients: bool = True) -> Results:
    """out and lse of a backend, and the gradients of sum(out dout) + sum(lse dlse), detached."""
    if not gradients:
        with torch.no_grad():
            out, lse = inputs.run(backend)
        return {"out": out, "lse": lse}
    inputs = inputs.requires_grad()
    out, lse = inputs.run(backend)
    return {"out": out.detach(), "lse": lse.detach(), **differentiate(inputs, out, lse)}


def differentiate(inputs: OpInputs, out: torch.Tensor, lse: torch.Tensor | None) -> Results:
    """The gradients of sum(out dout) + sum(lse dlse); lse may be None if there is no dlse."""
    outputs, seeds = [out], [inputs.dout.to(out.dtype)]
    if inputs.dlse is not None:
        assert lse is not None, "the case has a gradient of lse"
        outputs.append(lse)
        seeds.append(inputs.dlse.to(lse.dtype))
    wanted = inputs.differentiable()
    grads = torch.autograd.grad(outputs, list(wanted.values()), seeds)
    return dict(zip(wanted, grads, strict=True))


def oracle(inputs: OpInputs, gradients: bool = True) -> Results:
    """The reference in float64, on the values that the inputs have."""
    return compute(inputs.to(torch.float64), "reference", gradients)


@torch.no_grad()
def term_sizes(
    inputs: Inputs, expected: Mapping[str, torch.Tensor], power: int
) -> dict[str, torch.Tensor]:
    """For each result, the size of the terms it is summed from: (sum |term|^power)^(1 / power).

    power 2 is what rounding each term once can move the sum by, in units of eps: independent errors
    add in quadrature. power 1 bounds what the order of the summation can.
    """
    call = inputs.to(torch.float64).call()
    _, biased = reference._scores(call)
    group = call.group

    def size(t: torch.Tensor) -> torch.Tensor:
        return t.to(torch.float64).abs() ** power

    def per_kv_head(t: torch.Tensor) -> torch.Tensor:
        return t.unflatten(1, (-1, group)).sum(2)

    p = size(reference._probabilities(biased, expected["lse"].to(torch.float64)))
    keep = size(torch.ones((), device=p.device))
    if call.dropout_p:
        keep = size(reference.dropout_keep(call) / (1 - call.dropout_p))
    k, v = (size(t.repeat_interleave(group, dim=1)) for t in (call.k, call.v))
    q, do, scale = size(call.q), size(inputs.dout), size(torch.tensor(call.scale))
    largest_score = biased.nan_to_num(neginf=0.0).abs().amax(-1) if biased.shape[-1] else 0.0
    # lse = maximum + log of a sum: either may be the larger term.
    largest_lse = expected["lse"].to(torch.float64).nan_to_num(neginf=0.0).abs()
    largest = torch.maximum(torch.as_tensor(largest_score).to(largest_lse), largest_lse)
    sizes = {"out": (p * keep) @ v, "lse": size(largest)}
    if "dq" in expected:
        delta = (size(expected["out"]) * do).sum(-1, keepdim=True)
        if inputs.dlse is not None:
            delta = delta + size(inputs.dlse)[..., None]
        ds = p * ((do @ v.mT) * keep + delta)
        sizes["dq"] = (ds @ k) * scale
        sizes["dk"] = per_kv_head(ds.mT @ q) * scale
        sizes["dv"] = per_kv_head((p * keep).mT @ do)
        if inputs.bias is not None:
            sizes["dbias"] = reference.bias_gradient(call, ds)
    return {name: t ** (1 / power) for name, t in sizes.items()}


@torch.no_grad()
def unseen(inputs: Inputs) -> Results:
    """Bool, where a result is exactly 0: queries that see no key, keys that no query sees."""
    call = inputs.call()
    _, biased = reference._scores(call)
    seen = biased > -math.inf
    no_key = ~seen.any(-1)[..., None]
    no_query = ~seen.any(-2).unflatten(1, (-1, call.group)).any(2)[..., None]
    hidden = {"out": no_key, "dq": no_key, "dk": no_query, "dv": no_query}
    if inputs.bias is not None:
        hidden["dbias"] = reference.bias_gradient(call, seen.to(torch.float32)) == 0
    return hidden


@dataclass(frozen=True)
class Errors:
    """Differences from the oracle; infinite where one is NaN or infinite and the other is not."""

    largest: float
    rms: float


def error(actual: torch.Tensor, expected: torch.Tensor) -> Errors:
    """Largest and root-mean-square difference; equal infinities differ by 0."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if actual.numel() == 0:
        return Errors(0.0, 0.0)
    a, e = actual.detach().to(torch.float64), expected.to(torch.float64)
    difference = torch.where(a == e, 0.0, (a - e).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    return Errors(difference.max().item(), _rms(difference))


def _rms(t: torch.Tensor) -> float:
    return t.square().mean().sqrt().item() if t.numel() else 0.0


@dataclass(frozen=True)
class Standard:
    """What a case's results are judged by: the oracle, and the errors that are allowed."""

    expected: Results  # float64
    allowed: dict[str, Errors]
    unseen: Results  # bool: where a result must be exactly 0

    def check(self, results: Mapping[str, torch.Tensor]) -> dict[str, Errors]:
        """The errors of the results; AssertionError names each result that breaks the rule."""
        found, failures = {}, []
        for name, actual in results.items():
            found[name] = error(actual, self.expected[name])
            for kind in ("largest", "rms"):
                value, most = getattr(found[name], kind), getattr(self.allowed[name], kind)
                if not value <= most:
                    failures.append(f"{name}: {kind} error {value:.3g}, allowed {most:.3g}")
            if name in self.unseen and bool((actual.detach() * self.unseen[name] != 0).any()):
                failures.append(f"{name}: not exactly 0 where nothing is seen")
        if failures:
            raise AssertionError("; ".join(failures))
        return found


def judge(
    inputs: Any,
    gradients: bool,
    oracle: Callable[[Any, bool], Results],
    compute: Callable[[Any, str, bool], Results],
    term_sizes: Callable[[Results, int], Results],
    unseen: Results,
) -> Standard:
    """The oracle and the allowed errors of an op's inputs.

    Allowed: 2 x eager's error + eps of the dtype x its terms rounded once + eps of the accumulator
    (float32, float64 for float64) x the bound of another order of summation. In float64, eager is
    the oracle, so its error is taken to be that of float32, scaled by the ratio of the two eps; and
    as the oracle then rounds as coarsely as what it judges, its own error comes on top (3 x).

    Args:
        oracle: the results in float64.
        compute: the results of a backend.
        term_sizes: of the oracle's results, the size of the terms that each is a sum of: the
            root of the sum of their squares (power 2), or the sum (power 1).
    """
    expected = oracle(inputs, gradients)
    low, low_expected, ratio, times = inputs, expected, 1.0, 2
    if inputs.dtype == torch.float64:
        low, ratio, times = inputs.to(torch.float32), 2.0**-29, 3
        low_expected = oracle(low, gradients)
    accumulator = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    rounded, summed = (term_sizes(expected, power) for power in (2, 1))
    allowed = {}
    for name, eager in compute(low, "reference", gradients).items():
        found = error(eager, low_expected[name])
        eps = torch.finfo(accumulator if name == "lse" else inputs.dtype).eps
        terms = eps * rounded[name] + torch.finfo(accumulator).eps * summed[name]
        allowed[name] = Errors(
            times * ratio * found.largest + (terms.max().item() if terms.numel() else 0.0),
            times * ratio * found.rms + _rms(terms),
        )
    return Standard(expected, allowed, unseen)


def make_standard(inputs: Inputs, gradients: bool = True) -> Standard:
    """What results of attention are judged by."""
    return judge(
        inputs,
        gradients,
        oracle,
        compute,
        lambda expected, power: term_sizes(inputs, expected, power),
        unseen(inputs),
    )


def check_accuracy(
    inputs: Inputs, results: Mapping[str, torch.Tensor], standard: Standard | None = None
) -> dict[str, Errors]:
    """Errors of a backend's results (any of out, lse, dq, dk, dv, dbias) against the oracle.

    Raises AssertionError if one exceeds 2 x the error of eager PyTorch at that dtype plus a
    rounding term. `standard` may be given where several backends are held to the same one.
    """
    gradients = any(name.startswith("d") for name in results)
    return (standard or make_standard(inputs, gradients)).check(results)


@contextlib.contextmanager
def threads(n: int = 2) -> Iterator[None]:
    """As many threads for the kernels; two share the work even where the machine has one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, PyTorch's new memory (empty, new_empty, ...) is NaN, or the largest integer.

    A kernel that leaves part of an output unwritten, or adds to it, then shows.
    """
    before = torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


class NamedCase(Protocol):
    """What the cases of all ops have."""

    @property
    def name(self) -> str: ...

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]: ...


AnyCase = TypeVar("AnyCase", bound=NamedCase)


def case_ids(
    cases: Sequence[AnyCase], dtypes: Sequence[torch.dtype]
) -> list[tuple[str, AnyCase, torch.dtype]]:
    """(id, case, dtype) for each case and each of the dtypes it has; id = dtype-case."""
    return [
        (f"{dtype_name(dtype)}-{case.name}", case, dtype)
        for case in cases
        for dtype in dtypes
        if dtype in case.dtypes
    ]


def level_ids(
    op: str,
    levels: Sequence[str],
    dtypes: Sequence[torch.dtype],
    names: Callable[[torch.dtype], Sequence[str]],
) -> list[tuple[str, str, str, torch.dtype]]:
    """(id, level, case, dtype) of the instruction sets below the best, which is the last one.

    A level whose kernels for a dtype are those of the best is left out. `names`: the cases of a
    dtype.
    """
    return [
        (f"{op}-{level}-{dtype_name(dtype)}-{name}", level, name, dtype)
        for level in levels[:-1]
        for dtype in dtypes
        if kernels_of(level, dtype) != kernels_of(levels[-1], dtype)
        for name in names(dtype)
    ]
