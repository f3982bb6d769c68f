"""Block-diagonal linear maps: each group of channels is mapped by a matrix of its own."""

from __future__ import annotations

import torch
from torch import Tensor


def block_diagonal(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., G * i] by weight [G, i, o] -> [..., G * o]."""
    parts = x.unflatten(-1, (weight.shape[0], -1)).flatten(0, -3)
    y = torch.bmm(parts.transpose(0, 1), weight.to(x.dtype)).transpose(0, 1)
    return y.flatten(1).unflatten(0, x.shape[:-1])
