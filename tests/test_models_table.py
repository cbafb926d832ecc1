"""The table of docs/MODELS.md is that of its result file."""

import json
import re

from benchmarks.machine import ROOT
from benchmarks.models import DOCUMENT, OPTIONS, table, updated


def test_the_table_is_that_of_the_result_file() -> None:
    text = DOCUMENT.read_text()
    found = re.search(r"<!-- compared: (\S+) -->", text)
    assert found, "docs/MODELS.md has no '<!-- compared: FILE -->'"
    result = json.loads((ROOT / "benchmarks" / "results" / found[1]).read_text())
    assert updated(text, found[1], result) == text, "run: python -m benchmarks.models"
    assert list(result["models"]) == list(OPTIONS)


def test_what_failed_has_a_dash() -> None:
    entry = {
        "parameters": 2_000_000,
        "bytes_per_step": 2048,
        "steps": 7,
        "held_out_bits_per_byte": 2.5,
        "step_seconds": {"fused": 0.5, "reference": 1.0},
        "memory": {"fused": 3 * 2**20, "reference": 2**22, "original": "ValueError: no"},
        "sample": {"fused": 100.0, "reference": 50.0, "original": None},
    }
    row = table({"models": {"one": entry}}).splitlines()[-1]
    assert row == "| one | 2.00 M | 2.500 | 4.1 | 2.00x | - | 3 | 4 | - | 100 | - |"
