"""The acceptance cases of native sparse attention: a name, inputs, what must hold of them.

Every backend's tests run through the one table CASES. The operators' own tables (spec.py) vary
shapes and options and ask for accuracy; here it is the places where implementations go wrong, and
what the definition says of them. Cases are small, since interpreters and emulators run them too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from hierkernels import testing
from hierkernels.ops.attention.spec import ALL_DTYPES
from hierkernels.ops.attention.spec import Case as AttentionCase
from hierkernels.ops.native_sparse_attention import testing as nsa
from hierkernels.ops.native_sparse_attention.spec import CORRECTNESS, NsaCase
from hierkernels.ops.select_blocks import testing as select
from hierkernels.ops.select_blocks.spec import SelectCase
from hierkernels.ops.selected_attention import testing as selected
from hierkernels.ops.selected_attention.spec import Case as SelectedCase

RUNS = 20
_BY_NAME = {case.name: case for case in CORRECTNESS}
_BY_TOKEN = ("q", "k", "v", "q_cmp", "k_window", "v_window", "gates")
_COMPRESSED, _SELECTED = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)  # gates of one branch alone


@dataclass(frozen=True)
class Acceptance:
    """One case. `holds(inputs, backend)` raises AssertionError where the backend is wrong."""

    name: str
    inputs: Callable[[torch.dtype], Any]
    holds: Callable[[Any, str], None]
    dtypes: tuple[torch.dtype, ...] = ALL_DTYPES
    interpreted: bool = True  # False: an interpreter would take minutes

    def check(self, backend: str, dtype: torch.dtype) -> None:
        """Runs the case on a backend, in memory that holds NaN where nothing was written."""
        with testing.poisoned_memory():
            self.holds(self.inputs(dtype), backend)

    def __str__(self) -> str:
        return self.name


# -------------------------------------------------------------------------------------------------
# What must hold.


def accurate(inputs: nsa.Inputs, backend: str) -> None:
    """out and every gradient obey the accuracy rule, given the blocks that the backend chooses."""
    nsa.check_accuracy(inputs, backend)


def accurate_forward(inputs: nsa.Inputs, backend: str) -> None:
    """out obeys the accuracy rule: an interpreter takes minutes for the gradients."""
    nsa.check_accuracy(inputs, backend, gradients=False)


def is_dense_attention(inputs: nsa.Inputs | selected.Inputs, backend: str) -> None:
    """The selected branch is dense causal attention, with its gradients."""
    module: Any = selected
    if isinstance(inputs, nsa.Inputs):
        module, inputs = nsa, _gated(inputs, _SELECTED)
    found, case = module.compute(inputs, backend), inputs.case
    shape = (case.B, case.Hq, case.Hkv, case.Nq, case.Nk, case.D, case.Dv)
    dense = testing.Inputs(
        AttentionCase(case.name, *shape, is_causal=True), inputs.q, inputs.k, inputs.v,
        None, None, None, inputs.dout, None, 0,
    )  # fmt: skip
    standard = testing.make_standard(dense)
    standard.check({name: found[name] for name in ("out", "dq", "dk", "dv")})


def sees_the_first_window(inputs: nsa.Inputs, backend: str) -> None:
    """Before the first window has ended there is nothing to see, then its value and nothing else.

    The paper's ends at position l - 1 and is seen from there; the seed's is padded on the left,
    ends at d - 1 and is seen by the next query.
    """
    case = inputs.case
    first = case.first_end + case.definition.strict
    out = nsa.compute(_gated(inputs, _COMPRESSED), backend, gradients=False)["out"]
    assert not out[:, :, :first].any()
    value = inputs.v_cmp[:, :, :1].repeat_interleave(case.Hq // case.Hkv, dim=1)
    seen = out[:, :, first : first + case.d]
    assert torch.equal(seen, value.expand_as(seen)) if seen.numel() else case.Nq <= first
    nsa.check_accuracy(inputs, backend)


def is_without(
    drop: Callable[[torch.Tensor, selected.Inputs], torch.Tensor],
) -> Callable[[selected.Inputs, str], None]:
    """Results are those of the oracle for the indices that `drop` leaves."""

    def holds(inputs: selected.Inputs, backend: str) -> None:
        left = drop(inputs.indices, inputs)
        case = replace(inputs.case, n=left.shape[-1])
        standard = selected.make_standard(replace(inputs, case=case, indices=left))
        standard.check(selected.compute(inputs, backend))

    return holds


def first_half(indices: torch.Tensor, inputs: selected.Inputs) -> torch.Tensor:
    """Of indices that name all blocks twice."""
    half = indices.shape[-1] // 2
    assert torch.equal(indices[..., :half], indices[..., half:])
    return indices[..., :half]


def without_the_future(indices: torch.Tensor, inputs: selected.Inputs) -> torch.Tensor:
    """Blocks that begin after the query are none; there are some, in the first place."""
    queries, keys = inputs.q.shape[2], inputs.k.shape[2]
    position = torch.arange(queries)[:, None] + keys - queries
    future = indices * inputs.case.S > position
    assert future[..., 0].any()
    return indices.masked_fill(future, -1)


def ignores_none(inputs: selected.Inputs, backend: str) -> None:
    """A -1 in the first, the middle or the last place changes nothing but the sum's order."""
    standard = selected.make_standard(inputs)
    n = inputs.case.n
    for place in (0, n // 2, n):
        parts = inputs.indices[..., :place], inputs.indices[..., place:]
        none = torch.full_like(inputs.indices[..., :1], -1)
        named = torch.cat((parts[0], none, parts[1]), dim=-1)
        case = replace(inputs.case, n=n + 1)
        standard.check(selected.compute(replace(inputs, case=case, indices=named), backend))


def sees_nothing(inputs: selected.Inputs, backend: str) -> None:
    """out and all gradients are 0 and lse is -inf where no query has a block."""
    assert bool((inputs.indices == -1).all())
    found = selected.compute(inputs, backend)
    assert bool((found.pop("lse") == -math.inf).all())
    for name, value in found.items():
        assert not value.any(), name


def is_shared_by_all(inputs: nsa.Inputs, backend: str) -> None:
    """One block far above the others: every query that may selects it, and sums are right."""
    block, case = 2, inputs.case
    windows = slice(block * case.S // case.d + case.M, (block + 1) * case.S // case.d + case.M)
    k_cmp = torch.zeros_like(inputs.k_cmp)
    k_cmp[:, :, windows] = 40.0 if case.preset == "seed" else 4.0
    inputs = replace(inputs, k_cmp=k_cmp, q_cmp=torch.ones_like(inputs.q))
    indices = inputs.choose(backend)
    own = torch.arange(case.Nq)[:, None] // case.S
    may = (own > block).expand((*indices.shape[:3], 1))[..., 0]
    assert bool((indices == block).any(-1)[may].all())
    nsa.check_accuracy(inputs, backend)


def sums_what_all_share(inputs: selected.Inputs, backend: str) -> None:
    """dk and dv of a block that every query names, twice alike to the last bit."""
    first, second = (selected.compute(inputs, backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    selected.check_accuracy(inputs, first)


def ties_are_stable(inputs: select.Inputs, backend: str) -> None:
    """Equal keys: the lowest of the equal blocks, 20 times alike."""
    first = inputs.run(backend)
    select.check_selection(inputs, first)  # where scores are exact, the very indices
    assert all(torch.equal(inputs.run(backend), first) for _ in range(RUNS))


def chooses_the_lowest(inputs: select.Inputs, backend: str) -> None:
    """All keys equal: of the blocks with the same score the lowest, 20 times alike."""
    q, k = (t.mul(4).round().div(4) for t in (inputs.q, inputs.k))  # products are exact
    k, lse = k[:, :, :1].expand_as(k), None
    if inputs.lse is not None:
        lse = select.log_sum_exp(inputs.case, q, k).to(inputs.lse.dtype)
    inputs = replace(inputs, q=q, k=k, lse=lse)
    first = inputs.run(backend)
    # By probabilities, block 0 lacks half a window before it, and the last may not be complete.
    lowest = 0 if lse is None else 1
    n, last = inputs.case.n, (lowest + inputs.case.n + 1) * inputs.case.block
    expected = torch.arange(lowest, lowest + n, dtype=torch.int32)
    assert last < inputs.case.N
    assert bool((first[:, :, last:] == expected).all())
    assert all(torch.equal(inputs.run(backend), first) for _ in range(RUNS))


def forgets_the_future(inputs: nsa.Inputs, backend: str) -> None:
    """Other tokens from some position on leave all outputs before it as they are, bit for bit."""
    out = nsa.compute(inputs, backend, gradients=False)["out"]
    case = inputs.case
    for position in (1, case.S, case.Nq // 2 + 1, case.Nq - 1):
        # A window that ends at the position or later holds a changed token.
        whole = max(0, (position - 1 - case.first_end) // case.d + 1) + case.M
        first = dict.fromkeys(_BY_TOKEN, position) | {"k_cmp": whole, "v_cmp": whole}
        changed: dict[str, Any] = {name: getattr(inputs, name).clone() for name in first}
        for name, begin in first.items():
            changed[name][:, :, begin:] += 1.0
        again = nsa.compute(replace(inputs, **changed), backend, gradients=False)["out"]
        assert torch.equal(again[:, :, :position], out[:, :, :position]), position
        assert not torch.equal(again[:, :, position:], out[:, :, position:]), position


def decodes(inputs: nsa.Inputs, backend: str) -> None:
    """Token by token, with the windows that have ended by then, it gives what all at once does."""
    case, steps = inputs.case, []
    standard = nsa.make_standard(inputs, backend, gradients=False)
    standard.check(nsa.compute(inputs, backend, gradients=False))
    for position in range(case.Nq):
        new, seen = slice(position, position + 1), slice(0, position + 1)
        windows = slice(0, max(0, (position - case.first_end) // case.d + 1) + case.M)
        cuts = {"q": new, "q_cmp": new, "gates": new, "dout": new, "k_cmp": windows}
        cuts |= {"v_cmp": windows, "k": seen, "v": seen, "k_window": seen, "v_window": seen}
        cut: dict[str, Any] = {name: getattr(inputs, name)[:, :, at] for name, at in cuts.items()}
        one = replace(inputs, case=replace(case, Nq=1, Nk=position + 1), **cut)
        steps.append(nsa.compute(one, backend, gradients=False)["out"])
    standard.check({"out": torch.cat(steps, dim=2)})


def has_the_numerical_gradient(inputs: nsa.Inputs, backend: str) -> None:
    """gradcheck, for the backends that compute in float64."""
    leaves = inputs.requires_grad().differentiable()
    names = [name[1:] for name in leaves]

    def f(*tensors: torch.Tensor) -> torch.Tensor:
        changes: dict[str, Any] = dict(zip(names, tensors, strict=True))
        return replace(inputs, **changes).run(backend)

    assert torch.autograd.gradcheck(f, tuple(leaves.values()))


def chooses(expected: dict[int, list[int]]) -> Callable[[select.Inputs, str], None]:
    """The indices of some queries, computed by hand."""

    def holds(inputs: select.Inputs, backend: str) -> None:
        chosen = inputs.run(backend)[0, 0].tolist()
        assert {i: chosen[i] for i in expected} == expected

    return holds


# -------------------------------------------------------------------------------------------------
# The inputs.


def _gated(inputs: nsa.Inputs, gates: tuple[float, ...]) -> nsa.Inputs:
    values = torch.tensor(gates, dtype=inputs.dtype)
    return replace(inputs, gates=values.expand_as(inputs.gates).contiguous())


def _nsa(preset: str, N: int, **options: Any) -> Callable[[torch.dtype], nsa.Inputs]:
    """Windows of 8 tokens every 4, blocks of 8, three of them; the package's memory token."""
    sizes = {"l": 8, "d": 4, "S": 8, "n": 3, "w": 6, "M": int(preset == "seed"), "B": 1}
    sizes |= {"Hq": 2, "Hkv": 1, "Nq": N, "Nk": N, "D": 16, "Dv": 16}
    case = NsaCase(f"acceptance-{preset}-{N}", preset, **(sizes | options))
    return lambda dtype: nsa.make_inputs(case, dtype)


def _selected(
    name: str, N: int, n: int, **options: Any
) -> Callable[[torch.dtype], selected.Inputs]:
    """Blocks of 4 keys, two heads that share the choice."""
    case = SelectedCase(f"acceptance-{name}", 1, 2, 1, N, N, 16, 16, 4, n, **options)
    return lambda dtype: selected.make_inputs(case, dtype)


def _select(scoring: str, N: int, **options: Any) -> Callable[[torch.dtype], select.Inputs]:
    padded = scoring == "logit"
    case = SelectCase(
        f"acceptance-{scoring}", 1, 2, 1, N, 16, 8, 4, 4, 3, scoring, padded, **options
    )
    return lambda dtype: select.make_inputs(case, dtype)


def _by_hand(scoring: str, n: int, terms: list[float]) -> Callable[[torch.dtype], select.Inputs]:
    """One channel, d = 4, l = 8, S = 16: queries are 1, and keys are such that a window's
    probability, or its logit, is the one that is listed."""
    padded = scoring == "logit"
    N = 4 * len(terms) + (1 if padded else 4)
    case = SelectCase(
        f"by-hand-{scoring}", 1, 1, 1, N, 1, 8, 4, 16, n, scoring, padded, scale=1.0
    )  # fmt: skip

    def make(dtype: torch.dtype) -> select.Inputs:
        inputs = select.make_inputs(case, dtype)
        values = torch.tensor(terms, dtype=torch.float64)
        k = (values if padded else values.log()).to(dtype)[None, None, :, None]
        lse = None if inputs.lse is None else torch.zeros_like(inputs.lse)
        assert k.shape == inputs.k.shape
        return replace(inputs, q=torch.ones_like(inputs.q), k=k, lse=lse)

    return make


# -------------------------------------------------------------------------------------------------
# The table.

# Windows end at 7, 11, ..., 63; those of block j are 4 j - 1 ... 4 j + 3, counted 1 2 2 2 1 times.
# Position 63 sees all. Block 0: 2 (.01 + .01 + .05) + .30 = .44; 1: .30 + 2 (.01 + .01 + .02) + .01
# = .39; 2: .01 + 2 (.10 + .12 + .02) + .3 = .79; 3: .3 + 2 (.2 + .05 + .04) = .88. Position 39 sees
# the windows 0 ... 8, of which block 2 has .01 + 2 * .10 = .21; block 3 lies in its future. At 16
# the blocks 0 and 1 have begun.
_PROBABILITIES = [
    0.01, 0.01, 0.05, 0.30, 0.01, 0.01, 0.02, 0.01, 0.10, 0.12, 0.02, 0.3, 0.2, 0.05, 0.04,
]  # fmt: skip
_BY_PROBABILITY = {63: [2, 3], 39: [0, 1], 31: [0, 1], 16: [0, 1], 15: [0, -1], 6: [0, -1]}
# Four windows make a block; means 2, 5, 2 and -40: a tie, and 3 is below the least probability. A
# block may be chosen once its last window has ended before the query, which is at 15, 31, 47, 63.
_LOGITS = [0.0, 4.0, 6.0, -2.0, 5.0, 5.0, 3.0, 7.0, 2.0, 2.0, 2.0, 2.0, -30.0, -50.0, -40.0, -40.0]
_BY_LOGIT = {15: [-1, -1], 16: [0, -1], 31: [0, -1], 32: [0, 1], 48: [0, 1], 64: [0, 1]}


def _lengths() -> Iterator[Acceptance]:
    for preset in ("paper", "seed"):
        # Fewer tokens than a window; one token; around blocks; primes.
        for N in (7, 1, 15, 63, 65):
            yield Acceptance(f"{preset}-n{N}", _nsa(preset, N), accurate)
        many = _nsa(preset, 507, S=32, Hq=1)
        yield Acceptance(f"{preset}-n507", many, accurate_forward)
        yield Acceptance(f"{preset}-n507-gradients", many, accurate, interpreted=False)
        newest = _nsa(preset, 507, S=32, Hq=1, Nq=33, D=8, Dv=8)
        yield Acceptance(f"{preset}-n507-newest-queries", newest, accurate)
        for N in (1, 15, 65):
            inputs = _nsa(preset, N, n=max(-(-N // 8), 3))
            yield Acceptance(f"{preset}-all-blocks-n{N}", inputs, is_dense_attention)
        for N in (7, 8, 9):  # the last position is l - 2, l - 1, l
            inputs = _nsa(preset, N, M=0)
            yield Acceptance(f"{preset}-last-at-{N - 1}", inputs, sees_the_first_window)


def _choices() -> Iterator[Acceptance]:
    every = _selected("all", 21, 6, pattern="all")
    yield Acceptance("all-blocks-in-any-order", every, is_dense_attention)
    twice = _selected("twice", 21, 6, pattern="twice")
    yield Acceptance("duplicates", twice, is_without(first_half))
    yield Acceptance("none-first-middle-last", _selected("sparse", 21, 3), ignores_none)
    future = _selected("future", 21, 3, pattern="future")
    yield Acceptance("first-in-the-future", future, is_without(without_the_future))
    yield Acceptance("no-block", _selected("none", 21, 3, pattern="none"), sees_nothing)
    same = _selected("same", 37, 1, pattern="same")
    yield Acceptance("one-block-for-all", same, sums_what_all_share)
    for preset in ("paper", "seed"):
        inputs = _nsa(preset, 45, n=4 if preset == "paper" else 1)
        yield Acceptance(f"{preset}-one-block-for-all", inputs, is_shared_by_all)
    by_probability = _by_hand("probability", 2, _PROBABILITIES)
    yield Acceptance("by-hand-probability", by_probability, chooses(_BY_PROBABILITY))
    yield Acceptance("by-hand-logit", _by_hand("logit", 2, _LOGITS), chooses(_BY_LOGIT))
    for scoring in ("probability", "logit"):
        yield Acceptance(f"ties-{scoring}", _select(scoring, 40, ties=True), ties_are_stable)
        yield Acceptance(f"equal-keys-{scoring}", _select(scoring, 30), chooses_the_lowest)


def _invariances() -> Iterator[Acceptance]:
    for preset in ("paper", "seed"):
        large = _BY_NAME[f"{preset}-logits-x100"]
        inputs = partial(nsa.make_inputs, large)
        yield Acceptance(large.name, inputs, accurate, large.dtypes)
        yield Acceptance(f"{preset}-future", _nsa(preset, 27), forgets_the_future)
        yield Acceptance(f"{preset}-decoding", _nsa(preset, 27), decodes)
        small = _nsa(preset, 21, D=4, Dv=4)
        yield Acceptance(f"{preset}-gradcheck", small, has_the_numerical_gradient, (torch.float64,))
    for group in (1, 2, 3, 4, 6, 16, 20):
        preset = "paper" if group % 2 else "seed"
        yield Acceptance(f"{preset}-g{group}", _nsa(preset, 17, Hq=group), accurate)


CASES: tuple[Acceptance, ...] = (*_lengths(), *_choices(), *_invariances())
