"""In how many parts the keys of few rows are cut."""

from __future__ import annotations

import pytest

from hierkernels.key_parts import count_parts


@pytest.mark.parametrize(
    ("programs", "rows", "keys", "expected"),
    [
        (1, 1, 511, 1),  # fewer than four parts of 128 keys
        (1, 1, 512, 4),
        (8, 8, 8192, 33),  # 264 programs are resident
        (8, 8, 65536, 33),
        (64, 8, 8192, 4),
        (67, 8, 8192, 1),
        (512, 8, 65536, 1),
        (1, 128, 8192, 4),  # 2048 keys for 128 rows
        (1, 128, 8191, 1),
        (1, 1, 10**6, 128),
        (1, 1, 0, 1),
    ],
)
def test_132_multiprocessors(programs: int, rows: int, keys: int, expected: int) -> None:
    assert count_parts(132, programs, rows, keys) == expected


def test_an_unknown_device_has_no_parts() -> None:
    assert count_parts(0, 1, 1, 10**6) == 1
