"""The change in speed since another revision: python -m benchmarks.compare BASE [-k TEXT].

The base is checked out into a temporary git worktree and built with this interpreter. Both
revisions then run the cases and the harness of the working tree, in two processes that take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import suite
from benchmarks.measure import groups, median

ROOT = Path(__file__).resolve().parent.parent
HARNESS = (
    "benchmarks",
    "hierkernels/testing.py",
    "hierkernels/ops/*/spec.py",
    "hierkernels/ops/*/testing.py",
)


class Worker:
    """A process that times the revision in a folder."""

    def __init__(self, root: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request. Raises RuntimeError if the process has ended."""
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker in {self.process.args} ended: see its message above")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


@contextlib.contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A built checkout of the revision, with the working tree's harness; removed in the end."""
    with tempfile.TemporaryDirectory(prefix="hierkernels-base-") as folder:
        path = Path(folder) / "base"
        add = ["git", "worktree", "add", "--detach", str(path), revision]
        subprocess.run(add, cwd=ROOT, check=True, capture_output=True)
        try:
            print(f"building {revision}", flush=True)
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            subprocess.run(build, cwd=path, check=True, stdout=subprocess.DEVNULL)
            for source in (source for name in HARNESS for source in ROOT.glob(name)):
                target = path / source.relative_to(ROOT)
                if source.is_dir():
                    shutil.rmtree(target, ignore_errors=True)
                    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
                elif target.parent.exists():  # else the base does not have the op
                    shutil.copyfile(source, target)
            yield path
        finally:
            remove = ["git", "worktree", "remove", "--force", str(path)]
            subprocess.run(remove, cwd=ROOT, check=True)


def compare(base: Worker, here: Worker, request: dict[str, str], rounds: int) -> str:
    """One row: both times, the change, and the spread of the change from round to round."""
    workers = {"base": base, "here": here}
    prepared = {name: worker.ask(**request) for name, worker in workers.items()}
    if skips := [
        f"{name}: {answer['skip']}" for name, answer in prepared.items() if "skip" in answer
    ]:
        return "skipped, " + "; ".join(skips)
    loops = max(answer["loops"] for answer in prepared.values())
    samples: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name in random.sample(list(workers), 2):
            samples[name].append(workers[name].ask(loops=loops)["seconds"])
    before, after = (median(samples[name]) for name in workers)
    changes = sorted(b / a - 1 for a, b in zip(samples["base"], samples["here"], strict=True))
    quarter, three_quarters = changes[rounds // 4], changes[-1 - rounds // 4]
    return (
        f"{before * 1e3:10.4g}{after * 1e3:10.4g}{after / before - 1:+9.1%}"
        f"   {quarter:+.1%} to {three_quarters:+.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", help="git revision to compare the working tree with")
    parser.add_argument("-k", default="", metavar="TEXT", help="only rows whose name contains TEXT")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each revision")
    parser.add_argument("--full", action="store_true", help="all cases, not the quick set")
    arguments = parser.parse_args()
    keys = ("op", "case", "dtype", "direction")
    rows = [
        dict(zip(keys, group.key, strict=True)) for group in groups(arguments.full, suite.names())
    ]
    rows = [row for row in rows if arguments.k in "-".join(row.values())]
    if not rows:
        parser.error(f"no row's name contains {arguments.k!r}")
    if arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {arguments.rounds}")
    known = ["git", "rev-parse", "--verify", "--quiet", f"{arguments.base}^{{commit}}"]
    if subprocess.run(known, cwd=ROOT, capture_output=True).returncode:
        parser.error(f"{arguments.base!r} is not a commit of this repository")
    width = max(len("-".join(row.values())) for row in rows)
    with worktree(arguments.base) as path:
        base, here = Worker(path), Worker(ROOT)
        try:
            print(f"{'row':{width}}{'base ms':>10}{'here ms':>10}{'change':>9}   middle half")
            for row in rows:
                line = compare(base, here, row, arguments.rounds)
                print(f"{'-'.join(row.values()):{width}}{line}", flush=True)
        finally:
            base.close()
            here.close()


if __name__ == "__main__":
    main()
