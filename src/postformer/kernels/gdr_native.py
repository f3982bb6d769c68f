"""The recurrence's chunks as compiled code: see native/gdr.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .native import call, pointer, rows


def _strides(*tensors: Tensor | None) -> list[int]:
    """Of batch, head and token."""
    return [n for x in tensors for n in ((0, 0, 0) if x is None else x.stride()[:3])]


def _like(x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.empty_like(x)


class NativeChunks(torch.autograd.Function):
    """(q, g, w, e, u, k, v, start, C, R, early_erase, early_read, keep) -> (o, last, S).

    Shapes as in `gdr`, of any length; g [B, H, T, 1 or dk] or None. o [B, H, T, dv], last [B, H, dk, dv], S [N, B, H,
    dk, dv] the state before each chunk, empty unless `keep`, without which there is no backward pass.
    """

    @staticmethod
    def forward(ctx: Any, q, g, w, e, u, k, v, start, C: int, R: int, early_erase: bool, early_read: bool, keep: bool):
        q, g, w, e, u, k, v = map(rows, (q, g, w, e, u, k, v))
        start = start.contiguous()
        (B, H, T, dk), dv = q.shape, start.shape[-1]
        N = -(-T // C)
        o = q.new_empty(B, H, T, dv) if q.is_contiguous() else q.new_empty(B, T, H, dv).transpose(1, 2)
        last = torch.empty_like(start)
        S = q.new_empty(N if keep else 0, B, H, dk, dv)
        delta = q.new_empty(N, B * H, C * R, dv) if keep and w is not None else None
        decay = 0 if g is None else 1 if g.shape[-1] == 1 else 2
        sizes = [B, H, T, dk, dv, C, R, decay, early_erase, early_read, keep, w is not None, k is not None]
        call("gdr_forward", q.dtype, sizes, [pointer(x) for x in (q, g, w, e, u, k, v, start, o, last, S, delta)],
             _strides(q, g, w, e, u, k, v, o))
        ctx.save_for_backward(q, g, w, e, u, k, v, S, delta)
        ctx.sizes = sizes
        ctx.set_materialize_grads(False)
        return o, last, S

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_o, grad_last, grad_S):
        q, g, w, e, u, k, v, S, delta = ctx.saved_tensors
        grad_o = q.new_zeros(()).expand(*q.shape[:3], S.shape[-1]) if grad_o is None else grad_o
        grad_o = grad_o if grad_o.stride(-1) == 1 else grad_o.contiguous()
        grad_last, grad_S = (None if x is None else x.contiguous() for x in (grad_last, grad_S))
        grads = [_like(x) for x in (q, g, w, e, u, k, v)]
        start = torch.empty(S.shape[1:], dtype=q.dtype)
        call("gdr_backward", q.dtype, ctx.sizes,
             [pointer(x) for x in (q, g, w, e, u, k, v, S, delta, grad_o, grad_last, grad_S, *grads, start)],
             _strides(q, g, w, e, u, k, v, grad_o, *grads))
        return *grads, start, None, None, None, None, None
