"""Activations by name."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from postformer.kernels.rows import ACTIVATIONS, gated

__all__ = ["ACTIVATIONS", "Activation", "activated"]

Activation = Literal["silu", "sigmoid", "gelu", "gelu-tanh", "relu", "relu2", "none"]

FASTER = ("gelu-tanh", "relu2")
"""Of those alone, what is faster in compiled code; the others are as fast in PyTorch"""


def activated(x: Tensor, activation: str, by: Tensor | None = None) -> Tensor:
    """activation(x), times `by` where there is one, as in SwiGLU; both [..., d]."""
    if (activation not in FASTER) if by is None else (by.dtype != x.dtype):
        y = ACTIVATIONS[activation](x)
        return y if by is None else y * by
    return gated(x, by, activation)
