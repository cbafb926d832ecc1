"""Every Python snippet of the README runs, and computes what it says."""

import re
from pathlib import Path

import torch

from benchmarks import plots, readme, report

README = Path(__file__).resolve().parents[1] / "README.md"


def test_python_snippets_run_and_agree():
    torch.manual_seed(0)
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert snippets, "the README has no Python snippet"
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, str(README), "exec"), names)
    out, expected = names["out"], names["expected"]
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


def test_measured_tables_are_those_of_the_result_file():
    text = README.read_text()
    assert readme.updated(text) == text, "run: python -m benchmarks.readme"


def test_plots_can_be_drawn_from_their_result_files():
    places = readme.plots_of(README.read_text())
    assert places
    for name, result, image in places:
        drawn = {name for name, _ in plots.figures(report.load(result))}
        assert name in drawn, f"{result.name} has no plot {name}"
        assert image.stat().st_size > 0


def test_every_environment_variable_is_documented():
    sources = [*README.parent.glob("hierkernels/**/*.py"), README.parent / "setup.py"]
    sources += README.parent.glob("csrc/**/*.cpp")
    pattern = r"\bHIERKERNELS_(?!X86\b|CUDA\b|STAMP\b)[A-Z_]+\b"  # but for macros of csrc
    used = {name for source in sources for name in re.findall(pattern, source.read_text())}
    documented = set(re.findall(r"\bHIERKERNELS_[A-Z_]+\b", README.read_text()))
    assert used <= documented, f"not in the README: {sorted(used - documented)}"
