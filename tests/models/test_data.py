"""The corpus: which bytes, in which order, how they are split and cut into windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from python_models.data import Corpus, CorpusError, evaluation_batches, random_batch


def test_a_file_is_mapped_where_it_lies(tmp_path: Path) -> None:
    file = tmp_path / "text"
    content = bytes(range(256)) * 5
    file.write_bytes(content)
    corpus = Corpus.open(file, window=10, cache_dir=tmp_path / "cache")
    assert isinstance(corpus.train, np.memmap)
    assert len(corpus.train) == len(content) * 9 // 10
    assert bytes(corpus.train) + bytes(corpus.held_out) == content
    assert corpus.path == file
    assert not (tmp_path / "cache").exists()


def test_a_folder_is_joined_in_order_once(tmp_path: Path) -> None:
    root, cache = tmp_path / "root", tmp_path / "cache"
    for name, text in {
        "b.txt": "second",
        "a/z.txt": "first",
        "c.md": "other",
        ".git/d.txt": "hidden",
        ".e.txt": "hidden",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    corpus = Corpus.open(root, pattern="*.txt", cache_dir=cache)
    assert bytes(corpus.train) + bytes(corpus.held_out) == b"firstsecond"
    written = corpus.path.stat().st_mtime_ns
    assert Corpus.open(root, pattern="*.txt", cache_dir=cache).path == corpus.path
    assert corpus.path.stat().st_mtime_ns == written
    (root / "b.txt").write_text("changed!")
    changed = Corpus.open(root, pattern="*.txt", cache_dir=cache)
    assert bytes(changed.train) + bytes(changed.held_out) == b"firstchanged!"
    assert sorted(cache.iterdir()) == sorted([corpus.path, changed.path])  # nothing half-written


def test_the_default_is_the_standard_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    corpus = Corpus.open(window=512)
    assert corpus.path.parent == tmp_path / "hierkernels"
    assert len(corpus.train) > 4_000_000
    text = bytes(corpus.train)
    assert b"def namedtuple(" in text
    assert b"class TestCase(" in bytes(corpus.held_out)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: root / "missing", "missing does not exist"),
        (lambda root: _file(root / "empty", 0), "empty is empty"),
        (lambda root: _file(root / "short", 99), "short is too short: of its 99 bytes 89"),
        (lambda root: root, r"there are no files \* in"),
        (lambda root: _file(root / "folder" / "empty", 0).parent, "is empty"),
    ],
    ids=["missing", "empty", "short", "empty-folder", "folder-of-empty-files"],
)
def test_corpus_refuses(make: object, words: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(CorpusError, match=words):
        Corpus.open(make(root), window=11, cache_dir=tmp_path / "cache")


def _file(path: Path, size: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x" * size)
    return path


def test_random_windows() -> None:
    data = np.arange(50, dtype=np.uint8)

    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return random_batch(data, batch_size=400, window=47, generator=generator)

    batch = draw(0)
    assert batch.shape == (400, 47)
    assert batch.dtype == torch.int64
    assert torch.equal(batch - batch[:, :1], torch.arange(47).expand(400, 47))
    assert set(batch[:, 0].tolist()) == {0, 1, 2, 3}  # the first and the last place included
    assert torch.equal(batch, draw(0))
    assert not torch.equal(batch, draw(1))


def test_evaluation_windows_are_spread_and_fixed() -> None:
    data = np.arange(100, dtype=np.uint8)
    batches = list(evaluation_batches(data, batch_size=2, window=10, limit=3))
    assert [batch[:, 0].tolist() for batch in batches] == [[0, 45], [90]]
    everything = torch.cat(list(evaluation_batches(data, batch_size=4, window=10, limit=99)))
    assert torch.equal(everything.flatten(), torch.arange(100))
    (single,) = evaluation_batches(data, batch_size=4, window=60, limit=9)
    assert single.shape == (1, 60)
