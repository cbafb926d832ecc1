"""Where Triton kernels can run."""

from __future__ import annotations

import torch

from hierkernels.triton_common.launch import Target


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


def device_family(capability: tuple[int, int] | None) -> str:
    """The row of a configuration table; capability: 8.0 or more, None for the interpreter."""
    if capability is None:
        return "interpreter"
    major, minor = capability
    if major == 10:
        return "sm_100"
    if major == 9:
        return "sm_90"
    return "sm_80" if (major, minor) in ((8, 0), (8, 7)) else "sm_86"


def target_of(t: torch.Tensor, interpreted: bool) -> Target:
    """What kernels that run where t is are planned for."""
    if interpreted:
        return Target(device_family(None), "emulated")
    exact = t.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    family = device_family(torch.cuda.get_device_capability(t.device))
    return Target(family, "ieee" if exact else "tf32", torch.cuda.get_device_name(t.device))
