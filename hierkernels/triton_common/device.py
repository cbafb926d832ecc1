"""Where Triton kernels can run."""

from __future__ import annotations

import functools

import torch

from hierkernels.triton_common.launch import Target

# Bytes of shared memory that a program may have: what the configurations of a family keep to.
SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
}
# Multiprocessors of a family's largest common device, where the device is not asked.
MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_90": 132, "sm_100": 148, "interpreter": 1}


@functools.cache
def _device(index: int) -> tuple[str, tuple[int, int], int, int]:
    """(name, capability, bytes of shared memory for a program, multiprocessors) of a GPU."""
    found = torch.cuda.get_device_properties(index)
    capability = found.major, found.minor
    default = SHARED_MEMORY[device_family(capability)]
    shared = getattr(found, "shared_memory_per_block_optin", default)
    return found.name, capability, shared, found.multi_processor_count


@functools.cache
def _gpu_reasons(index: int) -> tuple[str, ...]:
    if torch.version.hip is not None:
        return ("this PyTorch is for AMD devices, the configurations are not",)
    name, capability, shared, _ = _device(index)
    if capability < (8, 0):
        major, minor = capability
        return (f"{name} has the compute capability {major}.{minor}, below 8.0",)
    least = SHARED_MEMORY["sm_86"]
    if shared < least:
        return (f"{name} gives a program {shared} bytes of shared memory, {least} are needed",)
    return ()


def device_reasons(name: str, t: torch.Tensor, interpreted: bool) -> list[str]:
    """Why kernels cannot run on the device of t, an argument's name; empty if they can."""
    if interpreted and t.is_cpu:
        return []
    kind = t.device.type
    if kind != "cuda":
        return [
            f"{name} is on a {kind} device, the triton backend needs a GPU "
            "(or TRITON_INTERPRET=1, set before Triton is imported)"
        ]
    return [] if interpreted else list(_gpu_reasons(t.device.index))


def device_family(capability: tuple[int, int] | None, shared: int | None = None) -> str:
    """The row of a configuration table.

    Args:
        capability: 8.0 or more, None for the interpreter.
        shared: bytes of shared memory that a program may have, if known: a device with less than
            its family's takes the row of the smallest.
    """
    if capability is None:
        return "interpreter"
    major, minor = capability
    family = "sm_86"
    if major in (9, 10):
        family = f"sm_{major}0"
    elif (major, minor) in ((8, 0), (8, 7)):
        family = "sm_80"
    return "sm_86" if shared is not None and shared < SHARED_MEMORY[family] else family


@functools.cache
def _gpu_target(index: int, precision: str) -> Target:
    name, capability, shared, multiprocessors = _device(index)
    return Target(device_family(capability, shared), precision, name, multiprocessors)


def target_of(t: torch.Tensor, interpreted: bool) -> Target:
    """What kernels that run where t is are planned for."""
    if interpreted:
        return Target("interpreter", "emulated", "", MULTIPROCESSORS["interpreter"])
    exact = t.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return _gpu_target(t.device.index, "ieee" if exact else "tf32")
