"""What this installation can do: python -m hierkernels.info."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch

from hierkernels import dispatch
from hierkernels.explain import PROBLEMS, explain
from hierkernels.native import native, native_error
from hierkernels.version import __version__

Section = tuple[str, list[tuple[str, str]]]


def package_version(package: str) -> str:
    """The version of an installed package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_model() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _versions() -> Section:
    rows = [("hierkernels", __version__), ("python", platform.python_version())]
    rows += [("torch", torch.__version__), ("triton", package_version("triton"))]
    return "versions", [*rows, ("system", f"{platform.system()} {platform.machine()}")]


def _devices() -> Section:
    rows = [("cpu", f"{cpu_model()}, {torch.get_num_threads()} threads")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        rows.append(
            (
                f"cuda:{index}",
                f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB",
            )
        )
    if len(rows) == 1:
        rows.append(("cuda", "no device"))
    return "devices", rows


def _core() -> Section:
    core = native()
    if core is None:
        return "compiled core", [("missing", _without_paths(native_error()))]
    cuda = "not built"
    if core.cuda_version is not None:
        major, minor = divmod(core.cuda_version // 10, 100)
        cuda = f"built with CUDA {major}.{minor}: {core.cuda_kernels}"
    return "compiled core", [
        ("cpu kernels", f"{core.cpu_isa()} in use; the machine has {', '.join(core.cpu_isas())}"),
        ("cuda kernels", cuda),
    ]


def _without_paths(text: str) -> str:
    return text.replace(f"{Path(__file__).resolve().parent}", "hierkernels")


# The options that each operator cannot do without.
_PLAIN_OPTIONS: dict[str, dict[str, Any]] = {
    "compressed_attention": {"stride": 1, "first_end": 0},
    "local_attention": {"window_size": 1},
    "native_sparse_attention": {
        "preset": "paper", "block_size": 1, "num_selected": 3, "window_size": 1, "stride": 1,
        "first_end": 0, "compression_window": 1,
    },
    "select_blocks": {
        "num_selected": 1, "block_size": 1, "stride": 1, "first_end": 0, "scoring": "logit",
    },
    "selected_attention": {"block_size": 16},
}  # fmt: skip


def _plain_call(op: str, device: str) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Arguments and options of the plainest call of an operator."""
    if op == "causal_sgu":
        shapes: tuple[tuple[int, ...], ...] = ((1, 1, 64), (1, 1, 64), (1, 1, 1), (1, 1))
    elif op == "rms_norm":
        shapes = ((1, 1, 64), (64,))
    elif op == "layer_norm":
        shapes = ((1, 1, 64), (64,), (64,))
    elif op == "gelu":
        shapes = ((1, 64),)
    elif op == "rotary":
        shapes = ((1, 1, 1, 64), (1, 32), (1, 32))
    else:
        count = {"select_blocks": 2, "native_sparse_attention": 5}.get(op, 3)
        shapes = ((1, 1, 1, 64),) * count
    tensors = [torch.empty(shape, device=device) for shape in shapes]
    if op == "selected_attention":
        tensors.append(torch.zeros(1, 1, 1, 1, dtype=torch.int32, device=device))
    if op == "native_sparse_attention":
        tensors.append(torch.empty(1, 1, 1, 3, device=device))
    return tensors, _PLAIN_OPTIONS.get(op, {})


def _backends(op: str, device: str) -> Section:
    """Each backend's state for a plain call of the operator, and the automatic choice."""
    with dispatch.use_backend(None):  # the machine's choice, not the environment's
        tensors, options = _plain_call(op, device)
        choice = explain(op, *tensors, **options)
    rows = []
    for backend in dispatch.BACKENDS:
        reasons = choice.refusals.get(backend)
        state = "; ".join(map(_without_paths, reasons)) if reasons else "ready"
        rows.append((backend, state + (", used by default" if backend == choice.backend else "")))
    return f"{op} on {device}", rows


def report() -> str:
    """Versions, devices, the compiled core and the state of every backend, as aligned text."""
    sections = [_versions(), _devices(), _core()]
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    sections += [_backends(op, device) for op in PROBLEMS for device in devices]
    width = max(len(name) for _, rows in sections for name, _ in rows)
    lines = []
    for title, rows in sections:
        lines += [title, *(f"  {name:<{width}}  {value}" for name, value in rows), ""]
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    print(report())
