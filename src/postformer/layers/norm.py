"""Norms: RMS (1910.07467), zero-centred RMS (weight 1 + w), layer norm, and per-head group norms; computed in fp32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from postformer.design.grammar import Norm


class _Rms(torch.autograd.Function):
    """x / sqrt(mean x^2 + eps) * weight over the last dim, in few passes; the backward pass keeps x and one number a
    row. First-order gradients only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        unit = x * scale
        grad_weight = (grad * unit).flatten(0, -2).sum(0)
        grad = grad * weight
        inner = (grad * unit).mean(-1, keepdim=True)
        return torch.addcmul(grad, unit, inner, value=-1).mul_(scale), grad_weight, None


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim; with zero_centred, * (1 + weight). Same shape and dtype as x."""

    def __init__(self, width: int, eps: float = 1e-6, affine: bool = True, zero_centred: bool = False) -> None:
        super().__init__()
        self.eps, self.width, self.zero_centred = eps, width, zero_centred
        start = torch.zeros(width) if zero_centred else torch.ones(width)
        self.weight = nn.Parameter(start) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        if self.weight is None:
            return F.rms_norm(wide, (self.width,), None, self.eps).to(x.dtype)
        weight = self.weight.to(wide.dtype)
        return _Rms.apply(wide, 1 + weight if self.zero_centred else weight, self.eps).to(x.dtype)


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

    def forward(self, x: Tensor) -> Tensor:
        wide = (x if x.dtype == torch.float64 else x.float()).unflatten(-1, (self.groups, self.dim))
        if self.kind == "rms":
            wide = F.rms_norm(wide, (self.dim,), None, self.eps)
        else:
            wide = F.layer_norm(wide, (self.dim,), None, None, self.eps)
        if self.weight is not None:
            wide = wide * self.weight.to(wide.dtype).view(-1, self.dim)
        if self.bias is not None:
            wide = wide + self.bias.to(wide.dtype).view(-1, self.dim)
        return wide.flatten(-2).to(x.dtype)


def make_norm(design: Norm, width: int) -> nn.Module:
    """The norm a design names over `width` channels."""
    if design.kind == "none":
        return nn.Identity()
    if design.kind == "layer":
        return nn.LayerNorm(width, design.eps, design.affine, bias=design.bias)
    return RMSNorm(width, design.eps, design.affine, design.kind == "zero-centred-rms")


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum x^2 + eps) over the last dim, in fp32: finite gradients at zero, unlike F.normalize."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
