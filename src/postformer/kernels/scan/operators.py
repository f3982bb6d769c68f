"""Elementwise recurrences and the selective scan as compiled code (native/scan.h, native/scan_plain.h), as operators
that `torch.compile` and fake tensors know."""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..native import call, pointers, rows, strides

Maybe = Tensor | None
BLOCK = 32
"""Tokens between two states that are kept for the backward pass of the selective scan."""
GROUP = 128
"""Channels that share a pass; the gradients of B and C are summed over groups at the end."""


@lru_cache(64)
def _blocks(T: int, emit: int) -> ctypes.Array:
    """The first token of each block, then T: blocks end where a state is emitted."""
    starts = {*range(0, T, BLOCK), *(range(0, T, emit) if emit else ())}
    return (ctypes.c_int64 * (len(starts) + 1))(*sorted(starts), T)


def _sizes(x: Tensor, A: Tensor, blocks: ctypes.Array, emit: int) -> list[int]:
    T, marks = x.shape[1], -(-x.shape[1] // emit) if emit else 0
    return [*x.shape, A.shape[1], len(blocks) - 1, min(T, BLOCK), emit, marks, GROUP]


def _outputs(x: Tensor, A: Tensor, emit: int, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty y, h, emitted and kept."""
    (batch, T, D), N, new = x.shape, A.shape[1], x.new_empty
    marks, both = (-(-T // emit), -(-T // math.lcm(BLOCK, emit))) if emit else (0, 0)
    blocks = -(-T // BLOCK) + marks - both if keep else 0
    return new(x.shape), new(batch, D, N), new(batch, marks, D, N), new(blocks, batch, D, N)


@torch.library.custom_op("postformer::selective_scan", mutates_args=(), device_types="cpu")
def selective(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Maybe, reset: Maybe, skip: Maybe,
              emit: int, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Shapes as in `selective_scan`; emit: 0 for none.

    Returns (y [Bt, T, D], h [Bt, D, N], emitted [Bt, ceil(T / emit), D, N], kept [blocks, Bt, D, N] the state before
    each block). The last is empty unless `keep`, without which there is no backward pass.
    """
    y, h, emitted, kept = found = _outputs(x, A, emit, keep)
    x, dt, B, C = map(rows, (x, dt, B, C))
    A, h0, skip = A.contiguous(), *(None if z is None else z.contiguous() for z in (h0, skip))
    blocks = _blocks(x.shape[1], emit)  # held until the call is over
    call("selective_forward", x.dtype, _sizes(x, A, blocks, emit),
         [*pointers(x, dt, B, C, reset), ctypes.addressof(blocks),
          *pointers(A, h0, y, h, emitted if emit else None, kept if keep else None, skip)],
         strides(2, x, dt, B, C, reset, y))
    return found


@selective.register_fake
def _(x, dt, A, B, C, h0, reset, skip, emit, keep):
    return _outputs(x, A, emit, keep)


@torch.library.custom_op("postformer::selective_scan_backward", mutates_args=(), device_types="cpu")
def selective_backward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, reset: Maybe, skip: Maybe, kept: Tensor, grad_y: Maybe,
    grad_h: Maybe, grad_emitted: Maybe, emit: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, h0 and skip (of no entries where there is none)."""
    x, dt, B, C = map(rows, (x, dt, B, C))
    A, new = A.contiguous(), x.new_empty
    grad_y = new(1).zero_().expand(x.shape).contiguous() if grad_y is None else rows(grad_y)
    grad_h, grad_emitted, skip = (None if z is None else z.contiguous() for z in (grad_h, grad_emitted, skip))
    grad_x, grad_dt = new(x.shape), new(x.shape)
    grad_B, grad_C = (new(-(-x.shape[2] // GROUP), *B.shape) for _ in range(2))
    grad_A, grad_h0 = (new(x.shape[0], *A.shape) for _ in range(2))
    grad_skip = new(x.shape[0], 0 if skip is None else x.shape[2])
    blocks = _blocks(x.shape[1], emit)  # held until the call is over
    call("selective_backward", x.dtype, _sizes(x, A, blocks, emit),
         [*pointers(x, dt, B, C, reset), ctypes.addressof(blocks),
          *pointers(A, kept, grad_y, grad_h, grad_emitted, grad_x, grad_dt, grad_B, grad_C, grad_A, grad_h0, skip,
                    grad_skip)],
         strides(2, x, dt, B, C, reset, grad_y, grad_x, grad_dt))
    return grad_x, grad_dt, grad_A.sum(0), grad_B.sum(0), grad_C.sum(0), grad_h0, grad_skip.sum(0)


@selective_backward.register_fake
def _(x, dt, A, B, C, reset, skip, kept, *_):
    new = x.new_empty
    return (new(x.shape), new(x.shape), new(A.shape), new(B.shape), new(B.shape), new(kept.shape[1:]),
            new(0 if skip is None else x.shape[2]))


def _keep_selective(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, dt, A, B, C, h0, reset, skip, ctx.emit, _ = inputs
    ctx.save_for_backward(x, dt, A, B, C, reset, skip, output[3])
    ctx.started, ctx.skips = h0 is not None, skip is not None
    ctx.set_materialize_grads(False)


def _selective_gradients(ctx: Any, grad_y: Maybe, grad_h: Maybe, grad_emitted: Maybe, _: Maybe) -> tuple:
    grads = selective_backward(*ctx.saved_tensors, grad_y, grad_h, grad_emitted if ctx.emit else None, ctx.emit)
    return *grads[:5], grads[5] if ctx.started else None, None, grads[6] if ctx.skips else None, None, None


selective.register_autograd(_selective_gradients, setup_context=_keep_selective)


def _flat(x: Tensor) -> Tensor:
    """[B, T, ...] -> [B, T, F]; what is the same for all of F stays one number, all else becomes dense in F."""
    x = x.flatten(2) if x.ndim > 2 else x.unsqueeze(2)
    return x if x.stride(2) in (0, 1) or x.shape[2] == 1 else x.contiguous()


def _all_strides(x: Tensor) -> list[int]:
    return [*x.stride()[:2], 0 if x.shape[2] > 1 and x.stride(2) == 0 else 1]


@torch.library.custom_op("postformer::scan", mutates_args=(), device_types="cpu")
def scan(a: Tensor, b: Tensor, h0: Tensor, reset: Maybe, max_plus: bool) -> Tensor:
    """h [B, T, ...] of the linear recurrence, or of its max-plus sister, which has no gradient."""
    h = b.new_empty(b.shape)
    a, b, h0 = _flat(a), _flat(b), h0.contiguous()
    call("scan_forward", b.dtype, [*b.shape, max_plus], pointers(a, b, h0, reset, h),
         [*_all_strides(a), *_all_strides(b), *strides(2, reset)])
    return h


@scan.register_fake
def _(a, b, h0, reset, max_plus):
    return b.new_empty(b.shape)


def _scan_grads(h0: Tensor, h: Tensor, wants_a: bool) -> list[Tensor]:
    """Empty gradients of b and h0, and of a where it is wanted."""
    return [h.new_empty(h.shape), h0.new_empty(h0.shape), *([h.new_empty(h.shape)] if wants_a else [])]


@torch.library.custom_op("postformer::scan_backward", mutates_args=(), device_types="cpu")
def scan_backward(a: Tensor, h0: Tensor, reset: Maybe, h: Tensor, grad: Tensor, wants_a: bool) -> list[Tensor]:
    """Gradients of b and h0, and of a where it is wanted."""
    grads = _scan_grads(h0, h, wants_a)
    flat, g, start = _flat(a), _flat(grad), h0.contiguous()
    call("scan_backward", h.dtype, list(_flat(h).shape),
         pointers(flat, start, reset, h, g, grads[2] if wants_a else None, *grads[:2]),
         [*_all_strides(flat), *_all_strides(g), *strides(2, reset)])
    return grads


@scan_backward.register_fake
def _(a, h0, reset, h, grad, wants_a):
    return _scan_grads(h0, h, wants_a)


def _keep_scan(ctx: Any, inputs: tuple, output: Tensor) -> None:
    a, _, h0, reset, max_plus = inputs
    assert not max_plus
    ctx.save_for_backward(a, h0, reset, output)


def _scan_gradients(ctx: Any, grad: Tensor) -> tuple:
    a, h0, reset, h = ctx.saved_tensors
    grad_b, grad_h0, *grad_a = scan_backward(a, h0, reset, h, grad, ctx.needs_input_grad[0])
    return grad_a[0] if grad_a else None, grad_b, grad_h0, None, None


scan.register_autograd(_scan_gradients, setup_context=_keep_scan)
