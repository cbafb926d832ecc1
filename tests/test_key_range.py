"""Key ranges against masks written from first principles, one (query, key) pair at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hierkernels import KeyRange, Staircase

# Nq = Nk, Nq < Nk (decoding), Nq > Nk (the first queries see nothing), and the empty ones.
LENGTHS = [(7, 7), (3, 8), (8, 3), (1, 5), (0, 4), (4, 0), (1, 1), (23, 23)]

Sees = Callable[[int, int, int, int], bool]  # (i, j, Nq, Nk): does query i see key j?


def _causal(i: int, j: int, nq: int, nk: int) -> bool:
    return nk - 1 - j >= nq - 1 - i  # at least as many keys after j as queries after i


def _window(left: int | None, right: int | None) -> Sees:
    def sees(i: int, j: int, nq: int, nk: int) -> bool:
        distance = (nq - 1 - i) - (nk - 1 - j)  # of key j beyond the query's own key
        return (left is None or distance >= -left) and (right is None or distance <= right)

    return sees


def _bucketed(w: int, back: int, forward: int, is_causal: bool) -> Sees:
    def sees(i: int, j: int, nq: int, nk: int) -> bool:
        buckets = j // w - i // w
        return -back <= buckets <= forward and not (is_causal and j > i)

    return sees


def _exact(w: int, back: int, forward: int, is_causal: bool) -> Sees:
    def sees(i: int, j: int, nq: int, nk: int) -> bool:
        return i - back * w <= j <= (i if is_causal else i + forward * w)

    return sees


def _compressed(first_end: int, stride: int, memory: int, strict: bool) -> Sees:
    def sees(i: int, j: int, nq: int, nk: int) -> bool:
        if j < memory:
            return True
        end = first_end + (j - memory) * stride
        return end < i or (end == i and not strict)

    return sees


def _always(i: int, j: int, nq: int, nk: int) -> bool:
    return True


PATTERNS: dict[str, tuple[Callable[[int, int], KeyRange], Sees]] = {
    "full": (KeyRange.full, _always),
    "causal": (KeyRange.causal, _causal),
    "window-2-0": (lambda nq, nk: KeyRange.window(nq, nk, 2, 0), _window(2, 0)),
    "window-1-3": (lambda nq, nk: KeyRange.window(nq, nk, 1, 3), _window(1, 3)),
    "window-none-1": (lambda nq, nk: KeyRange.window(nq, nk, None, 1), _window(None, 1)),
    "window-2-none": (lambda nq, nk: KeyRange.window(nq, nk, 2, None), _window(2, None)),
    "window-none": (lambda nq, nk: KeyRange.window(nq, nk, None, None), _always),
    "bucketed": (lambda nq, nk: KeyRange.bucketed(nk, 3), _bucketed(3, 1, 0, True)),
    "bucketed-back0": (
        lambda nq, nk: KeyRange.bucketed(nk, 4, look_backward=0),
        _bucketed(4, 0, 0, True),
    ),
    "bucketed-both-ways": (
        lambda nq, nk: KeyRange.bucketed(nk, 2, 2, 1, is_causal=False),
        _bucketed(2, 2, 1, False),
    ),
    "exact": (lambda nq, nk: KeyRange.bucketed(nk, 3, exact=True), _exact(3, 1, 0, True)),
    "exact-both-ways": (
        lambda nq, nk: KeyRange.bucketed(nk, 2, 1, 2, is_causal=False, exact=True),
        _exact(2, 1, 2, False),
    ),
    "compressed": (lambda nq, nk: KeyRange.compressed(3, 2), _compressed(3, 2, 0, False)),
    "compressed-memory": (
        lambda nq, nk: KeyRange.compressed(5, 4, num_memory=2),
        _compressed(5, 4, 2, False),
    ),
    "compressed-strict": (
        lambda nq, nk: KeyRange.compressed(1, 3, num_memory=1, strict=True),
        _compressed(1, 3, 1, True),
    ),
}


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_pattern_equals_its_definition(name: str, lengths: tuple[int, int]) -> None:
    make, sees = PATTERNS[name]
    nq, nk = lengths
    expected = [[sees(i, j, nq, nk) for j in range(nk)] for i in range(nq)]
    key_range = make(nq, nk)
    for form in (key_range, key_range.canonical()):
        assert form.mask(nq, nk).tolist() == expected
        assert form.mask(nq, nk).shape == (nq, nk)
        assert form.count_visible(nq, nk) == sum(map(sum, expected))


_staircases = st.builds(
    Staircase,
    shift=st.integers(-40, 40),
    step=st.integers(1, 9),
    rise=st.integers(0, 5),
    offset=st.integers(-40, 40),
    floor=st.integers(-3, 12),
)


def _bound(s: Staircase, i: int, n_keys: int) -> int:
    """The formula of the module's docstring, in Python's integers."""
    x = max((i + s.shift) // s.step * s.rise + s.offset, s.floor)
    return min(max(x, 0), n_keys)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(_staircases, st.integers(0, 30))
def test_canonical_is_the_same_bound(s: Staircase, n_keys: int) -> None:
    queries = range(25)
    expected = [_bound(s, i, n_keys) for i in queries]
    canonical = s.canonical()
    assert 0 <= canonical.shift < canonical.step and canonical.floor >= 0
    assert s.at(torch.arange(25), n_keys).tolist() == expected
    assert canonical.at(torch.arange(25), n_keys).tolist() == expected
    assert canonical.canonical() == canonical
    # What the kernels rely on: a numerator that is never negative, and a monotone bound.
    assert all(i + canonical.shift >= 0 for i in queries)
    assert expected == sorted(expected)
    assert [canonical.at_query(i, n_keys) for i in queries] == expected


@settings(derandomize=True, max_examples=100, deadline=None)
@given(_staircases, _staircases, st.integers(0, 20), st.integers(0, 20))
def test_mask_and_count_of_any_two_staircases(
    lo: Staircase, hi: Staircase, nq: int, nk: int
) -> None:
    key_range = KeyRange(lo, hi)
    expected = [[_bound(lo, i, nk) <= j < _bound(hi, i, nk) for j in range(nk)] for i in range(nq)]
    assert key_range.mask(nq, nk).tolist() == expected
    assert key_range.count_visible(nq, nk) == sum(map(sum, expected))
    assert KeyRange.from_ints(key_range.to_ints()) == key_range


def test_queries_that_see_a_key_are_a_range() -> None:
    # dK/dV loops over [first i with hi(i) > j, first i with lo(i) > j).
    for make, _ in PATTERNS.values():
        for nq, nk in LENGTHS:
            key_range = make(nq, nk)
            lo = [_bound(key_range.lo, i, nk) for i in range(nq)]
            hi = [_bound(key_range.hi, i, nk) for i in range(nq)]
            mask = key_range.mask(nq, nk)
            for j in range(nk):
                first = next((i for i in range(nq) if hi[i] > j), nq)
                last = next((i for i in range(nq) if lo[i] > j), nq)
                assert mask[:, j].nonzero().flatten().tolist() == list(range(first, last))


@pytest.mark.parametrize(
    "bad, message",
    [(Staircase(step=0), "step must be at least 1"), (Staircase(rise=-1), "rise must not be neg")],
    ids=["step", "rise"],
)
def test_impossible_staircases_are_refused(bad: Staircase, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KeyRange(bad, Staircase()).canonical()
