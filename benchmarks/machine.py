"""What a result is a result of: device, instruction set, threads, versions and commit.

Nothing here names a host, a user or a path.
"""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import hierkernels as hk
from hierkernels.info import cpu_model, package_version
from hierkernels.native import native

ROOT = Path(__file__).resolve().parent.parent


def isa() -> str:
    """The instruction set of hierkernels' CPU kernels; of PyTorch's if ours are not built."""
    core = native()
    if core is not None:
        return core.cpu_isa()
    return torch.backends.cpu.get_cpu_capability().lower()


def machine_info(device: str) -> dict[str, Any]:
    """Device, threads and versions."""
    info: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_model(),
        "device_type": device,
        "cpu": cpu_model(),
        "isa": isa(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "hierkernels": hk.__version__,
        "torch": torch.__version__,
        "triton": package_version("triton"),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        info["capability"] = f"sm_{properties.major}{properties.minor}"
        info["cuda"] = torch.version.cuda
    return info


def slug(info: dict[str, Any]) -> str:
    """A file name for a machine: cpu-<model>-<isa>-<threads>t or gpu-<model>."""
    name = re.sub(r"\((R|TM)\)|\bCPU\b|\bProcessor\b|@.*", " ", info["device"], flags=re.IGNORECASE)
    parts = [
        "gpu" if info["device_type"] == "cuda" else "cpu",
        *re.findall(r"[a-z0-9]+", name.lower()),
    ]
    if info["device_type"] == "cpu":
        parts += [info["isa"].replace("_", ""), f"{info['threads']}t"]
    return "-".join(parts)


def git(*arguments: str, root: Path = ROOT) -> str | None:
    """The output of a git command in the repository; None if it fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit_info() -> dict[str, Any]:
    """The commit, and whether tracked files differ from it."""
    changed = git("status", "--porcelain", "--untracked-files=no")
    return {
        "id": git("rev-parse", "HEAD"),
        "time": git("log", "-1", "--format=%cI"),
        "dirty": None if changed is None else bool(changed),
    }
