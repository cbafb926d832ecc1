"""Few rows and many keys, as in decoding on a GPU: in how many parts the keys are worth being cut.

A program that owns rows would read all their keys alone while most multiprocessors have nothing to
do. So each takes a part of the keys and leaves a record for each row, and a second kernel adds the
records up. How many parts there are follows from shapes and from the device, never from data.

Source: T. Dao, D. Haziza, F. Massa, G. Sizov, "Flash-Decoding for long-context inference", 2023.
"""

from __future__ import annotations

# Programs that a multiprocessor holds at least: one alone does not ask for all that memory gives.
RESIDENT = 2
# A record is written and read once, 8 Dv bytes. So many keys for each row, of 2 (D + Dv) bytes,
# take eight times as many.
KEYS_OF_ROW = 16
LEAST_KEYS = 128  # that are worth a program
FEWEST = 4  # fewer parts gain no more than the launch of a second kernel takes
MOST = 128


def count_parts(multiprocessors: int, programs: int, rows: int, keys: int) -> int:
    """In how many parts the keys of each of these programs are worth being cut, 1 for none.

    rows: that a program owns, keys: that these see.
    """
    least = max(LEAST_KEYS, KEYS_OF_ROW * rows)
    parts = min(RESIDENT * multiprocessors // programs, keys // least, MOST)
    return parts if parts >= FEWEST else 1
