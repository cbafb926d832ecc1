"""The measurements of a run, a line of JSON each, and for TensorBoard."""

from __future__ import annotations

import json
import os
from pathlib import Path


class MetricsLog:
    """Appends to ``metrics.jsonl``; what a resumed run did after its checkpoint is cut off.

    With tensorboard, the same goes to ``tensorboard/`` in the run folder. Raises ValueError if the
    package that writes it is missing.
    """

    def __init__(self, run_dir: Path, *, after_step: int, tensorboard: bool = False) -> None:
        self.board = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError(
                    f"tensorboard needs its package: pip install tensorboard ({error})"
                ) from error
            self.board = SummaryWriter(run_dir / "tensorboard", purge_step=after_step + 1)
        self.path = run_dir / "metrics.jsonl"
        kept = []
        if self.path.exists() and after_step:
            for line in self.path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= after_step:
                        kept.append(line + "\n")
                except json.JSONDecodeError:
                    break  # a run was killed while it wrote this line
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(kept))
        os.replace(partial, self.path)

    def write(self, **values: float) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")
        if self.board is not None:
            for name in values.keys() - {"step", "seconds"}:
                self.board.add_scalar(name, values[name], int(values["step"]))

    def write_sample(self, step: int, text: str) -> None:
        """A sample, which only TensorBoard keeps."""
        if self.board is not None:
            self.board.add_text("sample", text, step)

    def close(self) -> None:
        """Everything is on the disk afterwards."""
        if self.board is not None:
            self.board.close()
