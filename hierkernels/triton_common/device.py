"""Where Triton kernels can run."""

from __future__ import annotations

import torch


def device_reasons(name: str, t: torch.Tensor, interpreted: bool) -> list[str]:
    """Why kernels cannot run on the device of t, an argument's name; empty if they can."""
    kind = t.device.type
    if kind != "cuda" and not (kind == "cpu" and interpreted):
        return [
            f"{name} is on a {kind} device, the triton backend needs a GPU "
            "(or TRITON_INTERPRET=1, set before Triton is imported)"
        ]
    if kind == "cuda" and not interpreted:
        if torch.version.hip is not None:
            return ["this PyTorch is for AMD devices, the configurations are not"]
        if torch.cuda.get_device_capability(t.device) < (8, 0):
            return ["the device has a compute capability below 8.0"]
    return []
