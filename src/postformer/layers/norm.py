"""Norms: RMS (1910.07467), zero-centred RMS (weight 1 + w), layer norm, and per-head group norms; computed in fp32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from postformer.design.grammar import Norm
from postformer.kernels.rows import norm
from postformer.layers.activation import activated


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim; with zero_centred, * (1 + weight). Same shape and dtype as x."""

    def __init__(self, width: int, eps: float = 1e-6, affine: bool = True, zero_centred: bool = False) -> None:
        super().__init__()
        self.eps, self.width, self.zero_centred = eps, width, zero_centred
        start = torch.zeros(width) if zero_centred else torch.ones(width)
        self.weight = nn.Parameter(start) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        weight = None if self.weight is None else self.weight.to(wide.dtype)
        if weight is not None and self.zero_centred:
            weight = 1 + weight
        return norm(wide, "rms", weight, eps=self.eps).to(x.dtype)


class HeadNorm(nn.Module):
    """Norm over each group of channels of x [..., groups * dim], with a weight per channel.

    kind rms, layer (per-group mean and variance: group norm). shared: one weight [dim] for all groups.
    """

    def __init__(self, groups: int, dim: int, kind: str = "rms", eps: float = 1e-6, affine: bool = True,
                 bias: bool = False, shared: bool = False) -> None:
        super().__init__()
        self.groups, self.dim, self.kind, self.eps, self.shared = groups, dim, kind, eps, shared
        size = dim if shared else groups * dim
        self.weight = nn.Parameter(torch.ones(size)) if affine else None
        self.bias = nn.Parameter(torch.zeros(size)) if affine and bias else None

    def forward(self, x: Tensor, gate: Tensor | None = None, activation: str = "none",
                order: str = "norm-gate") -> Tensor:
        """gate: like x; the result is multiplied by activation(gate), or x is before it is normed (gate-norm)."""
        wide = x if x.dtype == torch.float64 else x.float()
        if gate is not None and (gate.dtype != x.dtype or wide is not x):
            gated = activated(gate, activation)
            return self(x * gated) if order == "gate-norm" else self(x) * gated
        apart = (self.groups, self.dim)
        weight, bias = (None if p is None else p.to(wide.dtype).view(-1, self.dim) for p in (self.weight, self.bias))
        gate = None if gate is None else gate.unflatten(-1, apart)
        y = norm(wide.unflatten(-1, apart), self.kind, weight, bias, gate, eps=self.eps, activation=activation,
                 order=order)
        return y.flatten(-2).to(x.dtype)


def make_norm(design: Norm, width: int) -> nn.Module:
    """The norm a design names over `width` channels."""
    if design.kind == "none":
        return nn.Identity()
    if design.kind == "layer":
        return nn.LayerNorm(width, design.eps, design.affine, bias=design.bias)
    return RMSNorm(width, design.eps, design.affine, design.kind == "zero-centred-rms")


def l2norm(x: Tensor, eps: float = 1e-6, scale: float = 1.0) -> Tensor:
    """scale * x / sqrt(sum x^2 + eps) over the last dim, in fp32: finite gradients at zero, unlike F.normalize."""
    wide = x if x.dtype == torch.float64 else x.float()
    return norm(wide, "l2", eps=eps, scale=scale).to(x.dtype)
