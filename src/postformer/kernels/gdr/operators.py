"""The recurrence's chunks as compiled code (native/gdr.h), as operators that `torch.compile` and fake tensors know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..native import call, pointers, rows, strides

Maybe = Tensor | None


def _sizes(q: Tensor, g: Maybe, w: Maybe, k: Maybe, dv: int, C: int, R: int, early_erase: bool, early_read: bool,
           keep: bool) -> list[int]:  # fmt: skip
    decay = 0 if g is None else 1 if g.shape[-1] == 1 else 2
    return [*q.shape, dv, C, R, decay, early_erase, early_read, keep, w is not None, k is not None]


def _outputs(q: Tensor, w: Maybe, start: Tensor, C: int, R: int, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty o, last, S and delta; o lies in memory as q does, tokens or heads first."""
    (B, H, T, dk), dv = q.shape, start.shape[-1]
    N = -(-T // C)
    kept = N if keep else 0
    o = q.new_empty(B, H, T, dv) if q.is_contiguous() else q.new_empty(B, T, H, dv).transpose(1, 2)
    delta = q.new_empty(kept if w is not None else 0, B, H, C * R, dv)
    return o, q.new_empty(B, H, dk, dv), q.new_empty(kept, B, H, dk, dv), delta


@torch.library.custom_op("postformer::gdr_chunks", mutates_args=(), device_types="cpu")
def gdr_chunks(q: Tensor, g: Maybe, w: Maybe, e: Maybe, u: Maybe, k: Maybe, v: Maybe, start: Tensor, C: int, R: int,
               early_erase: bool, early_read: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Shapes as in `gdr`, of any length; g [B, H, T, 1 or dk] or None; C tokens per chunk.

    Returns (o [B, H, T, dv], last [B, H, dk, dv], S [N, B, H, dk, dv] the state before each chunk, delta [N, B, H,
    C * R, dv] the errors of erases). S and delta are empty unless `keep`, without which there is no backward pass.
    """
    sizes = _sizes(q, g, w, k, start.shape[-1], C, R, early_erase, early_read, keep)
    o, last, S, delta = found = _outputs(q, w, start, C, R, keep)
    q, g, w, e, u, k, v = map(rows, (q, g, w, e, u, k, v))
    start = start.contiguous()
    written = delta if delta.numel() else None
    call("gdr_forward", q.dtype, sizes, pointers(q, g, w, e, u, k, v, start, o, last, S, written),
         strides(3, q, g, w, e, u, k, v, o))
    return found


@gdr_chunks.register_fake
def _(q, g, w, e, u, k, v, start, C, R, early_erase, early_read, keep):
    return _outputs(q, w, start, C, R, keep)


@torch.library.custom_op("postformer::gdr_chunks_backward", mutates_args=(), device_types="cpu")
def gdr_chunks_backward(
    q: Tensor, g: Maybe, w: Maybe, e: Maybe, u: Maybe, k: Maybe, v: Maybe, S: Tensor, delta: Tensor, grad_o: Maybe,
    grad_last: Maybe, grad_S: Maybe, C: int, R: int, early_erase: bool, early_read: bool,
) -> list[Tensor]:
    """Gradients of those of q, g, w, e, u, k, v that are given, and of start."""
    sizes = _sizes(q, g, w, k, S.shape[-1], C, R, early_erase, early_read, True)
    given = q, g, w, e, u, k, v = tuple(map(rows, (q, g, w, e, u, k, v)))
    found = [None if x is None else torch.empty_like(x) for x in given]
    start = q.new_empty(S.shape[1:])
    grad_o = rows(q.new_zeros(()).expand(*q.shape[:3], S.shape[-1]) if grad_o is None else grad_o)
    last, states = (None if x is None else x.contiguous() for x in (grad_last, grad_S))
    call("gdr_backward", q.dtype, sizes,
         pointers(q, g, w, e, u, k, v, S, delta, grad_o, last, states, *found, start),
         strides(3, q, g, w, e, u, k, v, grad_o, *found))
    return [*(x for x in found if x is not None), start]


@gdr_chunks_backward.register_fake
def _(q, g, w, e, u, k, v, S, *_):
    return [*(torch.empty_like(rows(x)) for x in (q, g, w, e, u, k, v) if x is not None), S.new_empty(S.shape[1:])]


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, g, w, e, u, k, v, _, *flags, _ = inputs
    ctx.save_for_backward(q, g, w, e, u, k, v, *output[2:])
    ctx.flags = flags
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_o: Maybe, grad_last: Maybe, grad_S: Maybe, _: Maybe) -> tuple:
    saved = ctx.saved_tensors
    found = iter(gdr_chunks_backward(*saved, grad_o, grad_last, grad_S, *ctx.flags))
    return (*(None if x is None else next(found) for x in saved[:7]), next(found), *(None,) * 5)


gdr_chunks.register_autograd(_backward, setup_context=_save)
