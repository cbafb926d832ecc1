"""Writes gelu_tables.h: polynomials of the normal distribution's tail and of GELU's slope.

    python csrc/cpu/gelu_tables.py

With Q(m) = P(X > m) for a standard normal X, GELU(-m) = -m Q(m), and its slope there is
S(m) = Q(m) - m phi(m); on the other side of 0 both are 1 less that. An interval is as wide as a
step, around a multiple of it, and a polynomial in the distance from there, in steps, passes through
the function at the interval's Chebyshev points. The last interval of a table is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

# What a register of 16 floats looks up, or two of them, and the step that takes it past m = 5.8.
TABLES = {
    # name: (function, intervals, step, degree)
    "NormalTail": ("tail", 32, 0.2, 4),
    "GeluSlope": ("slope", 32, 0.2, 5),
    "ShortNormalTail": ("tail", 16, 0.4, 3),
    "ShortGeluSlope": ("slope", 16, 0.4, 3),
}


def tail(m: float) -> float:
    """Q(m)."""
    return 0.5 * math.erfc(m * math.sqrt(0.5))


def slope(m: float) -> float:
    """S(m)."""
    return tail(m) - m * math.exp(-0.5 * m * m) / math.sqrt(2 * math.pi)


def interpolate(f: Callable[[float], float], degree: int) -> list[float]:
    """Coefficients, constant first, of the polynomial through f at Chebyshev points around 0."""
    count = degree + 1
    points = [0.5 * math.cos(math.pi * (i + 0.5) / count) for i in range(count)]
    divided = [f(x) for x in points]
    for order in range(1, count):
        for i in range(degree, order - 1, -1):
            divided[i] = (divided[i] - divided[i - 1]) / (points[i] - points[i - order])
    result = [0.0] * count
    for i in range(degree, -1, -1):  # result * (x - points[i]) + divided[i]
        shifted = [0.0, *result[:-1]]
        result = [s - points[i] * r for s, r in zip(shifted, result, strict=True)]
        result[0] += divided[i]
    return result


def coefficients(function: str, intervals: int, step: float, degree: int) -> list[list[float]]:
    """A row for each power, constant first, of a number for each interval."""
    f = {"tail": tail, "slope": slope}[function]
    columns = [
        interpolate(lambda t, middle=k: f(step * (middle + t)), degree)  # type: ignore[misc]
        for k in range(intervals - 1)
    ]
    return [[*row, 0.0] for row in zip(*columns, strict=True)]


def table_source(name: str) -> str:
    """The struct of one table."""
    function, intervals, step, degree = TABLES[name]
    lines = [
        f"struct {name}Table {{",
        f"  static constexpr float kPerStep = {1 / step:.9e}f;",
        f"  static constexpr int kIntervals = {intervals}, kDegree = {degree};",
        "  alignas(64) static constexpr float kTerms[kDegree + 1][kIntervals] = {",
    ]
    for row in coefficients(function, intervals, step, degree):
        numbers = [f"{x:.9e}f" for x in row]
        groups = [", ".join(numbers[i : i + 6]) for i in range(0, intervals, 6)]
        lines.append("      {" + ",\n       ".join(groups) + "},")
    return "\n".join([*lines, "  };", "};"])


def source() -> str:
    """The whole header."""
    head = [
        "// Written by gelu_tables.py, which says what these are (part of simd_math.h).",
        "#pragma once",
        "",
        "namespace hierkernels {",
        "namespace HK_ISA {",
        "namespace {",
        "",
    ]
    tail_lines = [
        "",
        "}  // namespace",
        "}  // namespace HK_ISA",
        "}  // namespace hierkernels",
        "",
    ]
    return "\n".join([*head, "\n".join(table_source(name) for name in TABLES), *tail_lines])


if __name__ == "__main__":
    Path(__file__).with_suffix(".h").write_text(source())
