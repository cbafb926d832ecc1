"""The hierarchies of a HierarchicalTransformer: one value a hierarchy of each argument, checked."""

from __future__ import annotations

from dataclasses import dataclass

from python_models.arguments import check_integer


@dataclass(frozen=True)
class Hierarchy:
    """One stream of compressed tokens.

    Attributes:
        factor: c, the tokens that one compressed token is made of.
        stride: s, the places from one to the next.
        dim: channels.
        window: keys before its own that a query sees; None for all, 0 for no attention.
        dim_head, heads, ff_mult: of its layers.
    """

    factor: int
    stride: int
    dim: int
    window: int | None
    dim_head: int
    heads: int
    ff_mult: float

    @property
    def classes(self) -> int:
        """Rows from one compressed token to the next one of disjoint tokens."""
        return self.factor // self.stride


def make_hierarchies(
    *,
    seq_len: int,
    hierarchies: int | tuple[int, ...],
    hierarchical_stride: int | tuple[int, ...],
    dim: int | tuple[int, ...],
    window_sizes: int | tuple[int | None, ...] | None,
    dim_head: int | tuple[int, ...],
    heads: int | tuple[int, ...],
    ff_mult: float | tuple[float, ...],
) -> tuple[Hierarchy, ...]:
    """The arguments of the model, one entry a hierarchy.

    Raises:
        TypeError, ValueError: a value of another type or out of range, a tuple of another length.
    """
    factors = hierarchies if isinstance(hierarchies, tuple) else (hierarchies,)
    _check_powers_of_two("hierarchies", factors)
    if not factors or len(set(factors)) < len(factors):
        raise ValueError(f"hierarchies must be one or more, all different, got {hierarchies}")
    count = len(factors)
    strides = _one_each("hierarchical_stride", hierarchical_stride, count)
    _check_powers_of_two("hierarchical_stride", strides)
    if any(s > c for s, c in zip(strides, factors, strict=True)):
        raise ValueError(
            "hierarchical_stride must be at most the factor of its hierarchy, "
            f"got {strides} for hierarchies = {factors}"
        )
    windows = _one_each("window_sizes", window_sizes, count)
    for window in windows:
        if window is not None:
            check_integer("window_sizes", window, minimum=0)
    dims = _one_each("dim", dim, count)
    dim_heads = _one_each("dim_head", dim_head, count)
    head_counts = _one_each("heads", heads, count)
    for name, values, minimum in (
        ("dim", dims, 2),  # token shift halves them
        ("dim_head", dim_heads, 2),
        ("heads", head_counts, 1),
    ):
        for value in values:
            check_integer(name, value, minimum=minimum)
    if any(value % 2 for value in dim_heads):
        raise ValueError(f"dim_head must be even for rotary positions, got {dim_head}")
    ff_mults = _one_each("ff_mult", ff_mult, count)
    for channels, mult in zip(dims, ff_mults, strict=True):
        if type(mult) not in (int, float):
            raise TypeError(f"ff_mult must be a number, got {mult!r}")
        if not 1 <= mult * channels < float("inf"):
            raise ValueError(f"ff_mult must leave a channel of dim = {dim}, got {ff_mult}")
    return tuple(
        Hierarchy(
            factor=factors[i],
            stride=strides[i],
            dim=dims[i],
            # A window over the whole sequence is none.
            window=_limit(windows[i], seq_len // factors[i]),
            dim_head=dim_heads[i],
            heads=head_counts[i],
            ff_mult=ff_mults[i],
        )
        for i in range(count)
    )


def _limit(window: int | None, length: int) -> int | None:
    return None if window is None or window > length else window


def _one_each(name: str, value: object, count: int) -> tuple:
    if isinstance(value, list):
        raise TypeError(f"{name} must be one value or a tuple, got the list {value}")
    values = value if isinstance(value, tuple) else (value,) * count
    if len(values) != count:
        raise ValueError(
            f"{name} must be one value or a tuple of {count}, as many as hierarchies, got {value}"
        )
    return values


def _check_powers_of_two(name: str, values: tuple[int, ...]) -> None:
    for value in values:
        check_integer(name, value, minimum=1)
        if value & (value - 1):
            raise ValueError(f"{name} must be powers of two, got {value}")
