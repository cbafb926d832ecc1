"""Activations and their derivatives in Triton kernels, of float32 tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from hierkernels.triton_common.tiles import tanh


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def _normal_cdf(x):
    return 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """act(x); relu passes NaN on."""
    if ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, x)
    elif ACTIVATION == "gelu":
        return x * _normal_cdf(x)
    elif ACTIVATION == "silu":
        return x * _sigmoid(x)
    elif ACTIVATION == "tanh":
        return tanh(x)
    elif ACTIVATION == "sigmoid":
        return _sigmoid(x)
    else:
        return x


@triton.jit
def slope(x, ACTIVATION: tl.constexpr):
    """act'(x)."""
    if ACTIVATION == "relu":
        return tl.where(x > 0.0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        density = tl.exp2(x * x * -0.7213475204444817) * 0.3989422804014327
        return _normal_cdf(x) + x * density
    elif ACTIVATION == "silu":
        s = _sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "tanh":
        t = tanh(x)
        return 1.0 - t * t
    elif ACTIVATION == "sigmoid":
        s = _sigmoid(x)
        return s * (1.0 - s)
    else:
        return tl.full(x.shape, 1.0, tl.float32)
