"""The causal spatial gating unit in eager PyTorch: the definition, and the oracle of every test.

Differentiable any number of times, for every dtype and device. Imports no kernel code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange

from hierkernels.ops.causal_sgu.call import SguCall

_FUNCTIONS = {
    "none": lambda z: z,
    "relu": torch.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def activate(name: str, z: torch.Tensor) -> torch.Tensor:
    """The activation of that name."""
    return _FUNCTIONS[name](z)


def slope(name: str, z: torch.Tensor) -> torch.Tensor:
    """The derivative of the activation at z."""
    if name == "none":
        return torch.ones_like(z)
    if name == "relu":
        return (z > 0).to(z.dtype)
    if name == "gelu":
        density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * density
    if name == "tanh":
        return 1 - torch.tanh(z) ** 2
    s = torch.sigmoid(z)
    return s * (1 - s) if name == "sigmoid" else s * (1 + z * (1 - s))


def supports(call: SguCall) -> list[str]:
    """The reference computes everything."""
    return []


def _matrix(call: SguCall) -> torch.Tensor:
    """What multiplies the gate, in its dtype, as autocast would; 0 where the future lies.

    (H, N, N), or (H, w, 2 w) with a window, of which (H, w, w) if there is but one bucket.
    """
    N = call.gate.shape[1]
    if not call.window:
        return call.weight[:, :N, :N].tril().to(call.gate.dtype)
    if call.window >= N:  # no bucket looks back
        return call.weight[:, :N, call.window : call.window + N].tril().to(call.gate.dtype)
    return call.weight.tril(call.window).to(call.gate.dtype)


def _in_buckets(x: torch.Tensor, call: SguCall) -> torch.Tensor:
    """(B, N, C) -> (B, H, buckets, w, C/H), the end padded with zeros; without a window, one."""
    N = x.shape[1]
    size = min(call.size, N) or 1
    x = F.pad(x, (0, 0, 0, -N % size))
    return rearrange(x, "b (c n) (h d) -> b h c n d", n=size, h=call.heads)


def _with_look_back(x: torch.Tensor, call: SguCall) -> torch.Tensor:
    """Each bucket's tokens, after those of the bucket before; the first has zeros before it."""
    if not call.window or call.window >= call.gate.shape[1]:
        return x
    before = F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1]
    return torch.cat((before, x), dim=3)


def _merge(x: torch.Tensor, N: int) -> torch.Tensor:
    return rearrange(x, "b h c n d -> b (c n) (h d)")[:, :N]


def preactivation(call: SguCall) -> torch.Tensor:
    """The mixed gate + bias + gate_residual, (B, N, C)."""
    N = call.gate.shape[1]
    gate = _with_look_back(_in_buckets(call.gate, call), call)
    mix = torch.einsum("bhcjd,hij->bhcid", gate, _matrix(call))
    bias = call.bias[:, : mix.shape[3]].to(mix.dtype)
    mix = _merge(mix + rearrange(bias, "h n -> h () n ()"), N)
    return mix if call.gate_residual is None else mix + call.gate_residual


def causal_sgu(call: SguCall) -> torch.Tensor:
    """out, by the definition."""
    return activate(call.activation, preactivation(call)) * call.residual


def forward(call: SguCall, keep: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """As every backend's forward: (out, preactivation), without a graph, contiguous."""
    z = preactivation(call).contiguous()
    out = activate(call.activation, z) * call.residual
    return out.contiguous(), z if keep else call.gate.new_empty(0)


def backward(
    call: SguCall, preactivation: torch.Tensor, dout: torch.Tensor, wanted: Sequence[bool]
) -> tuple[torch.Tensor | None, ...]:
    """As every backend's backward: the gradients that are wanted, in the order of GRADIENTS."""
    N = call.gate.shape[1]
    dresidual = dout * activate(call.activation, preactivation)
    dmix = dout * call.residual * slope(call.activation, preactivation)
    d = _in_buckets(dmix, call)
    dgate = dweight = dbias = None
    if wanted[1]:
        dgate = torch.einsum("bhcid,hij->bhcjd", d, _matrix(call))
        if dgate.shape[3] > d.shape[3]:  # the first half of the rows goes to the bucket before
            before, own = dgate.chunk(2, dim=3)
            dgate = own + F.pad(before[:, :, 1:], (0, 0, 0, 0, 0, 1))
        dgate = _merge(dgate, N).contiguous()
    if wanted[2]:
        gate = _with_look_back(_in_buckets(call.gate, call), call)
        dmatrix = torch.einsum("bhcid,bhcjd->hij", d, gate).to(call.weight.dtype)
        dweight = torch.zeros_like(call.weight, memory_format=torch.contiguous_format)
        if gate.shape[3] > d.shape[3]:
            dweight.copy_(dmatrix.tril(call.window))
        else:
            rows, first = d.shape[3], call.window
            dweight[:, :rows, first : first + rows] = dmatrix.tril()
    if wanted[3]:
        dbias = torch.zeros_like(call.bias, memory_format=torch.contiguous_format)
        dbias[:, : d.shape[3]] = d.sum((0, 2, 4)).to(call.bias.dtype)
    return dresidual.contiguous(), dgate, dweight, dbias, dmix.contiguous()
