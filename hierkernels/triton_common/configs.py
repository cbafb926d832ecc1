"""Tile sizes of Triton kernels: a heuristic for each operator, and tables of measured ones over it.

Each operator's heuristic (its triton_configs.py or triton_launch.py) serves every device. A table
belongs to one device, by its name, and holds for a kernel and a bucket of shapes what
`python -m hierkernels.tune` measured to be fastest there. Tables are looked up in this order:

    1. HIERKERNELS_TUNING: a file, or a folder of files <device>.json
    2. $XDG_CACHE_HOME/hierkernels/tuning/<device>.json (by default in ~/.cache), the user's own
    3. hierkernels/triton_common/tables/<device>.json, shipped with the package

<device> is the name in lower case, with - between words: nvidia-h200. Nothing is tuned, and no
table is written, while a model runs.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hierkernels.triton_common.launch import Target

FORMAT = 1
LOOPS = ("always", "branch", "split")  # hierkernels.triton_common.key_range
SHIPPED = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class Config:
    """A tile of block_m by block_n, in steps of block_k where a kernel has these.

    descriptors: tiles of keys and values are fetched by the tensor memory accelerator, where the
    kernel, the device (sm_90, sm_100) and the tensors' alignment permit it.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    loop: str = "always"
    block_k: int = 0
    descriptors: bool = False

    def compiler_options(self) -> dict[str, int | bool]:
        """What to launch with; Triton's default for fused multiply-adds differs by version."""
        return {
            "num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True
        }  # fmt: skip

    def __str__(self) -> str:
        tile = "x".join(str(n) for n in (self.block_m, self.block_n, self.block_k) if n)
        fetch = " descriptors" if self.descriptors else ""
        return f"{tile} w{self.num_warps}s{self.num_stages} {self.loop}{fetch}"


def channels_bucket(channels: int) -> int:
    """64, 128 or 256: heads of up to so many channels are served alike."""
    return 64 if channels <= 64 else 128 if channels <= 128 else 256


# ---- which configuration ----

_trial: dict[str, Config] = {}  # by kernel; of the command that tunes alone
_watched: dict[str, tuple[str, Config]] | None = None


def choose(target: Target, kernel: str, bucket: str, heuristic: Config) -> Config:
    """What the device's table says of a kernel and a bucket of shapes, or the heuristic."""
    if _watched is not None:
        _watched[kernel] = bucket, heuristic
    if kernel in _trial:
        return _trial[kernel]
    if not target.device:
        return heuristic
    table = table_of(target.device, os.environ.get("HIERKERNELS_TUNING", ""))
    return table.get((kernel, bucket), heuristic)


@contextmanager
def trying(kernel: str, config: Config) -> Iterator[None]:
    """Plans made inside take config for kernel, whatever the shapes."""
    _trial[kernel] = config
    try:
        yield
    finally:
        del _trial[kernel]


@contextmanager
def watching() -> Iterator[dict[str, tuple[str, Config]]]:
    """(bucket, heuristic) by kernel, of the choices that plans made inside ask for."""
    global _watched
    before = _watched
    seen: dict[str, tuple[str, Config]] = {}
    _watched = seen
    try:
        yield seen
    finally:
        _watched = before
        if before is not None:
            before.update(seen)


# ---- tables ----

Table = dict[tuple[str, str], Config]  # by kernel and bucket


def file_name(device: str) -> str:
    """nvidia-h200.json for "NVIDIA H200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def user_folder() -> Path:
    """Where `python -m hierkernels.tune` writes to."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "hierkernels", "tuning")


@functools.lru_cache(maxsize=16)
def table_of(device: str, setting: str) -> Table:
    """The entries that hold for a device; setting: the value of HIERKERNELS_TUNING.

    Raises:
        ValueError: a table that cannot be read, naming the file, the entry and what is allowed.
    """
    paths = [SHIPPED / file_name(device), user_folder() / file_name(device)]
    if setting:
        path = Path(setting)
        if not path.exists():
            raise ValueError(f"HIERKERNELS_TUNING names {setting}, which does not exist")
        paths.append(path / file_name(device) if path.is_dir() else path)
    table: Table = {}
    for path in paths:
        if path.exists():
            table |= read_table(path, device)
    return table


def read_table(path: Path, device: str) -> Table:
    """The entries of a file for this device."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"tuning table {path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"tuning table {path}: format must be {FORMAT}, got {found!r}")
    if content.get("device") != device:
        raise ValueError(
            f"tuning table {path}: it is for the device {content.get('device')!r}, not {device!r}"
        )
    kernels = content.get("configurations")
    if not isinstance(kernels, dict):
        raise ValueError(f"tuning table {path}: configurations must be an object by kernel")
    table: Table = {}
    for kernel, buckets in kernels.items():
        if not isinstance(buckets, dict):
            raise ValueError(f"tuning table {path}: {kernel} must be an object by bucket of shapes")
        for bucket, entry in buckets.items():
            table[kernel, bucket] = _read_config(
                f"tuning table {path}: {kernel}, {bucket!r}", entry
            )
    return table


def _read_config(where: str, entry: Any) -> Config:
    names = {field.name for field in fields(Config)}
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: must be an object, got {entry!r}")
    unknown = entry.keys() - names - {"microseconds", "heuristic_microseconds"}
    missing = {"block_m", "block_n", "num_warps", "num_stages"} - entry.keys()
    if unknown or missing:
        wrong = [f"unknown {name}" for name in sorted(unknown)]
        wrong += [f"missing {name}" for name in sorted(missing)]
        raise ValueError(f"{where}: {', '.join(wrong)}; allowed are {', '.join(sorted(names))}")
    allowed = {
        "block_m": (16, 32, 64, 128, 256), "block_n": (16, 32, 64, 128, 256),
        "num_warps": (1, 2, 4, 8, 16), "num_stages": tuple(range(1, 9)), "loop": LOOPS,
        "block_k": (0, 16, 32, 64, 128, 256), "descriptors": (False, True),
    }  # fmt: skip
    for name in names & entry.keys():
        value = entry[name]
        if isinstance(value, bool) != (name == "descriptors") or value not in allowed[name]:
            options = ", ".join(map(str, allowed[name]))
            raise ValueError(f"{where}: {name} must be one of {options}, got {value!r}")
    return Config(**{name: entry[name] for name in names & entry.keys()})


def write_table(path: Path, device: str, found: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Adds entries (by kernel and bucket) to a file, which is replaced at once when complete."""
    content: dict[str, Any] = {"format": FORMAT, "device": device, "configurations": {}}
    if path.exists():
        read_table(path, device)  # never build on a broken one
        content = json.loads(path.read_text())
    for kernel, buckets in found.items():
        content["configurations"].setdefault(kernel, {}).update(buckets)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    scratch.replace(path)
    table_of.cache_clear()


def entry_of(config: Config, microseconds: float, heuristic: float) -> dict[str, Any]:
    """A table's entry: the configuration, its time, and that of the heuristic's configuration."""
    times = {"microseconds": round(microseconds, 2), "heuristic_microseconds": round(heuristic, 2)}
    return asdict(config) | times
