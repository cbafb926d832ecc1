"""What a compiled core was built from, so that one that does not fit is noticed.

setup.py compiles stamp() into the core; hierkernels.native compares it when it loads the core. This
file imports nothing of the package, as setup.py runs it before there is a PyTorch.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

REBUILD = "build it with: python setup.py build_ext --inplace"


def _digest(files: list[Path], root: Path) -> str:
    together = hashlib.sha256()
    for file in sorted(files):
        together.update(f"{file.relative_to(root).as_posix()}\0".encode())
        together.update(file.read_bytes().replace(b"\r\n", b"\n"))
    return together.hexdigest()[:16]


def stamp(version: str, csrc: Path) -> str:
    """The package's version, and digests of what Python calls and of all sources in csrc."""
    files = [f for f in csrc.rglob("*") if f.suffix in (".h", ".inl", ".cpp", ".cu")]
    interface = [f for f in files if f.stem.startswith("bindings")]
    return f"{version} {_digest(interface, csrc)} {_digest(files, csrc)}"


def misfit(built_from: str | None, version: str, csrc: Path) -> str:
    """Why Python must not call a core with that stamp; empty if it may.

    A core without a stamp was built before there were any. Without sources, as in an installed
    package, which brings its core along, the versions are compared.
    """
    built_version, *digests = (built_from or "").split() or [""]
    if built_version != version:
        return f"the compiled core is of version {built_version or 'unknown'}, not {version}"
    if csrc.is_dir() and digests[:1] != stamp(version, csrc).split()[1:2]:
        return "the compiled core is of other sources, whose functions differ"
    return ""


def is_stale(built_from: str | None, version: str, csrc: Path) -> bool:
    """There are sources, and the core was built from other ones."""
    return csrc.is_dir() and built_from != stamp(version, csrc)
