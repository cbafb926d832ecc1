"""Installing without a compiler leaves a package of pure Python that works."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in", "hierkernels", "python_models")


def _run(
    arguments: list[str], folder: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built with HIERKERNELS_BUILD_CPU=0, from a copy of the sources without csrc."""
    folder = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        elif source.exists():
            shutil.copy(source, folder / name)
    if not (folder / "README.md").exists():
        (folder / "README.md").write_text("hierkernels\n")
    options = ["--no-build-isolation", "--no-deps", "--no-index", "-w", "dist", "."]
    built = _run(["-m", "pip", "wheel", *options], folder, HIERKERNELS_BUILD_CPU="0")
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (folder / "dist").glob("hierkernels-*.whl")
    return wheel


def test_wheel_without_the_core_holds_every_module(pure_wheel: Path) -> None:
    names = set(zipfile.ZipFile(pure_wheel).namelist())
    for package in ("hierkernels", "python_models"):
        for module in (ROOT / package).rglob("*.py"):
            assert module.relative_to(ROOT).as_posix() in names
    assert not [name for name in names if name.endswith(".so")]
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "csrc"))]


def test_wheel_without_the_core_computes(pure_wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(pure_wheel).extractall(tmp_path)
    code = (
        "import torch, hierkernels as hk;"
        "q = torch.randn(1, 2, 5, 4, requires_grad=True);"
        "hk.attention(q, q, q, is_causal=True).sum().backward();"
        "choice = hk.explain('attention', q, q, q);"
        "print(hk.__file__); print(choice)"
    )
    found = _run(["-c", code], tmp_path, PYTHONPATH=str(tmp_path))
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith(str(tmp_path))  # not the checkout
    assert "backend: reference" in found.stdout
    assert "cpu: the compiled kernels are missing: No module named 'hierkernels._native'" in (
        found.stdout
    )


@pytest.mark.parametrize("name", ["HIERKERNELS_BUILD_CPU", "HIERKERNELS_BUILD_CUDA"])
def test_bad_build_setting_is_named(name: str, tmp_path: Path) -> None:
    command = ["setup.py", "build_ext", "-b", str(tmp_path / "lib"), "-t", str(tmp_path / "tmp")]
    found = _run(command, ROOT, **{name: "yes"})
    assert found.returncode != 0
    assert f"{name} must be auto, 0 or 1, got 'yes'" in found.stderr


def test_required_compiler_that_is_missing_is_an_error(tmp_path: Path) -> None:
    command = ["setup.py", "build_ext", "-b", str(tmp_path / "lib"), "-t", str(tmp_path / "tmp")]
    found = _run(
        command, ROOT, HIERKERNELS_BUILD_CPU="1", CXX="no-such-compiler", PATH=str(tmp_path)
    )
    assert found.returncode != 0
    assert "HIERKERNELS_BUILD_CPU=1, but none of no-such-compiler, g++" in found.stderr
