"""Bytes to train on: any file or folder as one memory-mapped array, its split and its windows.

The default corpus is the Python source of the running interpreter's standard library: about 12 MB
of real text that is on every machine.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Left out of the default corpus, because distributions of Python differ in which of them they ship.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class CorpusError(ValueError):
    """The corpus is missing, empty or too short."""


@dataclass(frozen=True)
class Corpus:
    """A memory-mapped ``uint8`` array, cut in two: the first 90% to train on, the rest held out."""

    path: Path
    train: np.ndarray
    held_out: np.ndarray

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        pattern: str = "*",
        cache_dir: str | os.PathLike[str] | None = None,
        window: int = 1,
        train_share: float = 0.9,
    ) -> Corpus:
        """Maps the bytes of a file, of the files in a folder, or of the standard library.

        A folder is joined once, in the order of the sorted relative names, into a file of
        ``cache_dir``; a change of any of its files makes another one.

        Args:
            path: file or folder; None takes ``*.py`` of the standard library, without its tests.
            pattern: which names of a folder to read, at any depth; hidden ones never.
            cache_dir: folder of joined files; None is ``hierkernels`` in the user's cache folder.
            window: bytes that a training example needs; both parts must hold one.
            train_share: part of the bytes to train on.

        Raises:
            CorpusError: no such path, no bytes in it, or fewer than a window on either side.
        """
        if not 0 < train_share < 1:
            raise ValueError(f"train_share must lie between 0 and 1, got {train_share}")
        if window < 1:
            raise ValueError(f"window must be at least 1 byte, got {window}")
        if path is None:
            root = Path(sysconfig.get_path("stdlib"))
            files = [f for f in _files(root, "*.py") if not _NOT_LIBRARY & set(f.parts[:-1])]
        else:
            root = Path(path)
            if not root.exists():
                raise CorpusError(f"corpus {root} does not exist")
            files = _files(root, pattern) if root.is_dir() else []
        if root.is_dir():
            source = f"the files {pattern if path is not None else '*.py'} of {root}"
            if not files:
                raise CorpusError(f"corpus: there are no files {pattern} in {root}")
            root = _join(root, files, Path(cache_dir) if cache_dir else default_cache_dir())
        else:
            source = str(root)
        size = root.stat().st_size
        if size == 0:  # an empty file cannot be mapped
            raise CorpusError(f"corpus {source} is empty")
        cut = int(size * train_share)
        if min(cut, size - cut) < window:
            raise CorpusError(
                f"corpus {source} is too short: of its {size} bytes {cut} are to train on and "
                f"{size - cut} held out, and a window needs {window}"
            )
        data = np.memmap(root, dtype=np.uint8, mode="r")
        return cls(root, data[:cut], data[cut:])


def default_cache_dir() -> Path:
    """``hierkernels`` in XDG_CACHE_HOME, which is ``~/.cache`` if it is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hierkernels"


def random_batch(
    data: np.ndarray, *, batch_size: int, window: int, generator: torch.Generator
) -> Tensor:
    """Windows that begin anywhere, all places equally likely: ``(batch_size, window)``, int64."""
    starts = torch.randint(len(data) - window + 1, (batch_size,), generator=generator)
    return _windows(data, starts.numpy(), window)


def evaluation_batches(
    data: np.ndarray, *, batch_size: int, window: int, limit: int
) -> Iterator[Tensor]:
    """The same ``limit`` windows at every call (or as many as fit), spread evenly, not overlapping.

    Yields ``(batch_size or fewer, window)``, int64.
    """
    count = min(limit, len(data) // window)
    starts = np.arange(count) * (len(data) - window) // max(count - 1, 1)
    for first in range(0, count, batch_size):
        yield _windows(data, starts[first : first + batch_size], window)


def _windows(data: np.ndarray, starts: np.ndarray, window: int) -> Tensor:
    return torch.from_numpy(data[starts[:, None] + np.arange(window)].astype(np.int64))


def _files(root: Path, pattern: str) -> list[Path]:
    """Relative paths of the files under root, sorted by their parts so that every system agrees."""
    found = (file.relative_to(root) for file in root.rglob(pattern) if file.is_file())
    return sorted(
        (file for file in found if not any(part.startswith(".") for part in file.parts)),
        key=lambda file: file.parts,
    )


def _join(root: Path, files: list[Path], cache_dir: Path) -> Path:
    key = hashlib.sha256()
    for file in files:
        status = (root / file).stat()
        key.update(f"{file.as_posix()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    joined = cache_dir / f"corpus-{key.hexdigest()[:16]}.bin"
    if not joined.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        # Renamed when complete: another process may be looking for it.
        with tempfile.NamedTemporaryFile(dir=cache_dir, delete=False) as partial:
            try:
                for file in files:
                    partial.write((root / file).read_bytes())
                partial.close()
                os.replace(partial.name, joined)
            except BaseException:
                partial.close()
                Path(partial.name).unlink(missing_ok=True)
                raise
    return joined
