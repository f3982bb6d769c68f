"""Elementwise recurrences and the selective scan as compiled code: see native/scan.h."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .native import call, pointers, rows, strides

BLOCK = 32
"""Tokens between two states that are kept for the backward pass of the selective scan."""
GROUP = 128
"""Channels that share a pass; the gradients of B and C are summed over groups at the end."""


@lru_cache(64)
def _blocks(T: int, emit: int | None) -> ctypes.Array:
    """The first token of each block, then T: blocks end where a state is emitted."""
    starts = {*range(0, T, BLOCK), *(() if emit is None else range(0, T, emit))}
    return (ctypes.c_int64 * (len(starts) + 1))(*sorted(starts), T)


class NativeSelectiveScan(torch.autograd.Function):
    """(x, dt, A, B, C, h0, reset) -> (y, h, emitted or None), as `selective_scan`; without `keep`, no backward pass."""

    @staticmethod
    def forward(ctx: Any, x, dt, A, B, C, h0, reset, emit: int | None, keep: bool):
        x, dt, B, C = map(rows, (x, dt, B, C))
        A, h0 = A.contiguous(), None if h0 is None else h0.contiguous()
        (batch, T, D), N = x.shape, A.shape[1]
        blocks, marks = _blocks(T, emit), 0 if emit is None else -(-T // emit)
        sizes = [batch, T, D, N, len(blocks) - 1, min(T, BLOCK), emit or 0, marks, GROUP]
        y, h = x.new_empty(x.shape), x.new_empty(batch, D, N)
        emitted = None if emit is None else x.new_empty(batch, marks, D, N)
        kept = x.new_empty(len(blocks) - 1, batch, D, N) if keep else None
        call("selective_forward", x.dtype, sizes,
             [*pointers(x, dt, B, C, reset), ctypes.addressof(blocks),
              *pointers(A, h0, y, h, emitted, kept)],
             strides(2, x, dt, B, C, reset, y))
        if keep:
            ctx.save_for_backward(x, dt, A, B, C, reset, kept)
            ctx.sizes, ctx.blocks, ctx.started = sizes, blocks, h0 is not None
            ctx.set_materialize_grads(False)
        return y, h, emitted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y, grad_h, grad_emitted):
        x, dt, A, B, C, reset, kept = ctx.saved_tensors
        grad_y = x.new_zeros(1).expand(x.shape).contiguous() if grad_y is None else rows(grad_y)
        grad_h, grad_emitted = (None if z is None else z.contiguous() for z in (grad_h, grad_emitted))
        grad_x, grad_dt = x.new_empty(x.shape), x.new_empty(x.shape)
        grad_B, grad_C = (x.new_empty(-(-x.shape[2] // GROUP), *B.shape) for _ in range(2))
        grad_A, grad_h0 = (x.new_empty(x.shape[0], *A.shape) for _ in range(2))
        call("selective_backward", x.dtype, ctx.sizes,
             [*pointers(x, dt, B, C, reset), ctypes.addressof(ctx.blocks),
              *pointers(A, kept, grad_y, grad_h, grad_emitted, grad_x, grad_dt, grad_B, grad_C, grad_A, grad_h0)],
             strides(2, x, dt, B, C, reset, grad_y, grad_x, grad_dt))
        return (grad_x, grad_dt, grad_A.sum(0), grad_B.sum(0), grad_C.sum(0), grad_h0 if ctx.started else None,
                None, None, None)


def _flat(x: Tensor) -> Tensor:
    """[B, T, ...] -> [B, T, F]; what is the same for all of F stays one number, all else becomes dense in F."""
    x = x.flatten(2) if x.ndim > 2 else x.unsqueeze(2)
    return x if x.stride(2) in (0, 1) or x.shape[2] == 1 else x.contiguous()


def _all_strides(x: Tensor) -> list[int]:
    return [*x.stride()[:2], 0 if x.shape[2] > 1 and x.stride(2) == 0 else 1]


def scan_forward(a: Tensor, b: Tensor, h0: Tensor, reset: Tensor | None, max_plus: bool) -> Tensor:
    """h [B, T, ...] of the linear recurrence, or of its max-plus sister."""
    a, b, h0 = _flat(a), _flat(b), h0.contiguous()
    h = b.new_empty(b.shape)
    call("scan_forward", b.dtype, [*b.shape, max_plus], pointers(a, b, h0, reset, h),
         [*_all_strides(a), *_all_strides(b), *strides(2, reset)])
    return h


class NativeScan(torch.autograd.Function):
    """(a, b, h0, reset) -> h, as `scan`."""

    @staticmethod
    def forward(ctx: Any, a, b, h0, reset):
        h = scan_forward(a, b, h0, reset, False)
        ctx.save_for_backward(a, h0, reset, h)
        return h.view(b.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        a, h0, reset, h = ctx.saved_tensors
        flat, g, start = _flat(a), _flat(grad), h0.contiguous()
        grad_a = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        grad_b, grad_h0 = torch.empty_like(h), torch.empty_like(start)
        call("scan_backward", h.dtype, list(h.shape),
             pointers(flat, start, reset, h, g, grad_a, grad_b, grad_h0),
             [*_all_strides(flat), *_all_strides(g), *strides(2, reset)])
        return None if grad_a is None else grad_a.view(a.shape), grad_b.view(a.shape), grad_h0, None
