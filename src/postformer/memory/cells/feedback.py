"""The map of a cell's last output inside the loop over the tokens: drive_t + R h_{t-1}.

Autograd would add up T gradients as large as R, one per token. The sum takes the drive as it is, so that the drive's
gradient is that of every R h, and R's is one product over all tokens once the loop has been walked back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from postformer.memory.rules.gates import fp32

Add = Callable[[Tensor, Tensor], Tensor]
"""(drive of a token [B, n] or [B, H, n], last output [B, d] or [B, H, d]) -> drive + R h"""


class _Once(torch.autograd.Function):
    """The drive itself; backwards also the gradient of `weight`, from the outputs that the loop left in `seen`."""

    @staticmethod
    def forward(ctx: Any, drive: Tensor, weight: Tensor, seen: list[Tensor], sums: str, columns: int) -> Tensor:
        ctx.seen, ctx.sums, ctx.columns = seen, sums, columns
        return drive.view_as(drive)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        of_weight = torch.einsum(ctx.sums, torch.stack(ctx.seen, 1), grad[..., : ctx.columns])
        return grad, of_weight, None, None, None


def dense(drive: Tensor, linear: Any, dtype: torch.dtype, once: bool) -> tuple[Tensor, Add]:
    """drive [B, T, n or more], a linear map d -> n without bias -> (the drive for the loop, what adds R h to n of it).

    once: the loop is walked once forwards (no recomputation). A map that is not dense is called token by token.
    """
    if type(linear) is not nn.Linear or not _same(drive, linear.weight):
        return drive, lambda d, h: d + fp32(linear(h.to(dtype)))
    weight = linear.weight

    def add(d: Tensor, h: Tensor, w: Tensor) -> Tensor:
        return torch.addmm(d, h, w.t())

    return _looped(drive, weight, add, "btd,btn->nd", weight.shape[0], once)


def by_head(drive: Tensor, weight: Tensor, once: bool) -> tuple[Tensor, Add]:
    """The same for drive [B, T, H, n] and a matrix per head, weight [H, d, n]."""
    if not _same(drive, weight):
        return drive, lambda d, h: d + fp32(torch.bmm(h.transpose(0, 1).to(weight.dtype), weight)).transpose(0, 1)

    def add(d: Tensor, h: Tensor, w: Tensor) -> Tensor:
        return torch.baddbmm(d.transpose(0, 1), h.transpose(0, 1), w).transpose(0, 1)

    return _looped(drive, weight, add, "bthd,bthn->hdn", weight.shape[2], once)


def _same(drive: Tensor, weight: Tensor) -> bool:
    """One product and sum in one call, without a change of dtype."""
    return weight.dtype == drive.dtype and not torch.is_autocast_enabled(drive.device.type)


def _looped(drive: Tensor, weight: Tensor, add: Callable[[Tensor, Tensor, Tensor], Tensor], sums: str, columns: int,
            once: bool) -> tuple[Tensor, Add]:
    if not (once and torch.is_grad_enabled() and weight.requires_grad) or torch.compiler.is_compiling():
        return drive, lambda d, h: add(d, h, weight)
    seen: list[Tensor] = []
    fixed = weight.detach()

    def remembered(d: Tensor, h: Tensor) -> Tensor:
        seen.append(h.detach())
        return add(d, h, fixed)

    return _Once.apply(drive, weight, seen, sums, columns), remembered
