"""Spikes with a surrogate gradient (1901.09948): the step function forwards, the slope of a smooth one backwards.

    s = 1 if x > 0 else 0
    atan:          ds/dx := (a / 2) / (1 + (pi a x / 2)^2), a = 2
    fast-sigmoid:  ds/dx := 1 / (1 + 25 |x|)^2

Under kernels.use(rounding=False) a spike is the smooth function whose slope that is.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Surrogate = Literal["atan", "fast-sigmoid"]
ALPHA, STEEPNESS = 2.0, 25.0


def slope(x: Tensor, surrogate: str) -> Tensor:
    """What stands for the derivative of the step function at x."""
    if surrogate == "atan":
        return (ALPHA / 2) / (1 + (math.pi * ALPHA / 2 * x).square())
    return 1 / (1 + STEEPNESS * x.abs()).square()


def smooth(x: Tensor, surrogate: str) -> Tensor:
    """The function with that slope, 1/2 at zero."""
    if surrogate == "atan":
        return torch.atan(math.pi * ALPHA / 2 * x) / math.pi + 0.5
    return x / (1 + STEEPNESS * x.abs()) + 0.5


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, surrogate: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.surrogate = surrogate
        return (x > 0).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad * slope(x, ctx.surrogate), None


def spike(x: Tensor, surrogate: str = "atan", hard: bool = True) -> Tensor:
    """x of any shape -> 1.0 where x > 0, else 0.0, in x's dtype; with hard=False the smooth function."""
    return _Spike.apply(x, surrogate) if hard else smooth(x, surrogate)
