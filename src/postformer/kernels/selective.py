"""Mamba's selective scan (arXiv 2312.00752), with memory that does not grow with tokens times state.

Inside, states are [Bt, N, D]: D is the longer of the two, and elementwise work wants a long last dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import settings
from .scan import _blocked, _linear

BUDGET = 1 << 18
"""Elements of a state history kept at a time, [Bt, L, N, D]: few enough to stay in a cache, many to hide overhead."""


def _piece(x: Tensor, state: Tensor) -> int:
    """Tokens per piece: the budget, but never fewer than 16 (where per-token steps would be as good)."""
    return min(x.shape[1], max(16, BUDGET // max(1, state.numel())))


def _history(dt, x, A, B, reset, start) -> tuple[Tensor, Tensor]:
    """(decays, states) of one piece, both [Bt, L, N, D]; A and start are [N, D] and [Bt, N, D]."""
    decay = (dt.unsqueeze(-2) * A).exp_()
    if reset is not None:
        decay.masked_fill_(reset[..., None, None], 0.0)
    h = (dt * x).unsqueeze(-2) * B.unsqueeze(-1)
    # In place: a token's input is read before its state is stored there.
    _blocked(decay, h, start, h, _linear, torch.mul, False)
    return decay, h


class _SelectiveScan(torch.autograd.Function):
    """Piece by piece; only the state before each piece is kept, and the backward pass runs the pieces again."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, h0, reset, emit):
        T, L = x.shape[1], _piece(x, h0)
        y = torch.empty_like(x)
        starts, emitted = [], []
        h = h0
        for i in range(0, T, L):
            s = slice(i, min(i + L, T))
            starts.append(h)
            _, states = _history(dt[:, s], x[:, s], A, B[:, s], None if reset is None else reset[:, s], h)
            y[:, s] = (C[:, s].unsqueeze(-2) @ states).squeeze(-2)
            if emit is not None:
                emitted += [h if t == i else states[:, t - 1 - i].clone() for t in _marks(s.start, s.stop, emit)]
            h = states[:, -1].clone()
        ctx.save_for_backward(x, dt, A, B, C, reset, *starts)
        ctx.emit, ctx.length = emit, L
        return y, h, (h.new_empty(0) if emit is None else torch.stack(emitted, 1))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_last, grad_emitted):
        x, dt, A, B, C, reset, *starts = ctx.saved_tensors
        T, L, emit = x.shape[1], ctx.length, ctx.emit
        grad_x, grad_dt, grad_B, grad_C = (torch.empty_like(z) for z in (x, dt, B, C))
        grad_A = torch.zeros_like(A)
        carry = grad_last  # the gradient of the state after the piece
        for n in range(len(starts) - 1, -1, -1):
            s = slice(n * L, min(n * L + L, T))
            dt_s, x_s, B_s, gy = dt[:, s], x[:, s], B[:, s], grad_y[:, s]
            decay, h = _history(dt_s, x_s, A, B_s, None if reset is None else reset[:, s], starts[n])
            grad_C[:, s] = (h @ gy.unsqueeze(-1)).squeeze(-1)
            total = gy.unsqueeze(-2) * C[:, s].unsqueeze(-1)
            marks = _marks(s.start, s.stop, emit) if emit is not None else range(0)
            for t in marks:
                if t > s.start:
                    total[:, t - 1 - s.start] += grad_emitted[:, t // emit]
            total[:, -1] += carry
            if total.shape[1] > 1:
                _blocked(decay[:, 1:], total[:, :-1], total[:, -1], total[:, :-1], _linear, torch.mul, True)
            carry = decay[:, 0] * total[:, 0]
            if s.start in marks:
                carry = carry + grad_emitted[:, s.start // emit]
            grad_in = (B_s.unsqueeze(-2) @ total).squeeze(-2)
            grad_B[:, s] = (total @ (dt_s * x_s).unsqueeze(-1)).squeeze(-1)
            # What is left is the gradient of the decay's exponent: total * previous state * decay.
            decay *= total
            decay[:, 1:] *= h[:, :-1]
            decay[:, 0] *= starts[n]
            grad_x[:, s] = grad_in * dt_s
            grad_dt[:, s] = grad_in * x_s + (decay * A).sum(-2)
            grad_A += decay.mul_(dt_s.unsqueeze(-2)).sum((0, 1))
        return grad_x, grad_dt, grad_A, grad_B, grad_C, carry, None, None


def _marks(start: int, stop: int, emit: int) -> range:
    """The multiples of emit in [start, stop)."""
    return range(-(-start // emit) * emit, stop, emit)


def _reference(x, dt, A, B, C, h, reset, emit):
    out, emitted = [], []
    for t in range(x.shape[1]):
        if emit is not None and t % emit == 0:
            emitted.append(h)
        if reset is not None:
            h = h.masked_fill(reset[:, t, None, None], 0.0)
        h = (dt[:, t, :, None] * A).exp() * h + (dt[:, t] * x[:, t]).unsqueeze(-1) @ B[:, t].unsqueeze(-2)
        out.append((h @ C[:, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(out, 1), h, None if emit is None else torch.stack(emitted, 1)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
    emit: int | None = None,
    backend: str = "auto",
) -> Any:
    """Mamba's diagonal state space with input-dependent step, input and output maps (arXiv 2312.00752).

        h_t = exp(dt_t A) h_{t-1} + (dt_t x_t) B_t^T,    y_t = h_t C_t

    Args:
        x: input [Bt, T, D]. dt: step size [Bt, T, D], >= 0 (softplus already applied); 0 leaves the state as it is.
        A: [D, N], negative. B, C: [Bt, T, N].
        h0: [Bt, D, N], the state before the first token; None is zero.
        reset: [Bt, T] bool; the state is zero before these tokens, exactly.
        emit: also return the state before tokens 0, emit, 2*emit, ... (before a reset at that token).
        backend: "auto", "reference" (token by token) or "parallel" (pieces that are computed again for gradients).

    Returns:
        (y, h) or (y, h, emitted): y [Bt, T, D] in x's dtype, without a skip term; h [Bt, D, N] in float32 (float64 for
        float64 x); emitted [Bt, ceil(T / emit), D, N]. Gradients are first-order only in the parallel form.

    Raises:
        ValueError: shapes do not fit.
    """
    if x.ndim != 3 or x.shape[1] < 1 or dt.shape != x.shape:
        raise ValueError(f"selective_scan: x {tuple(x.shape)} and dt {tuple(dt.shape)}; give both [Bt, T, D], T >= 1")
    if A.ndim != 2 or A.shape[0] != x.shape[2]:
        raise ValueError(f"selective_scan: A has shape {tuple(A.shape)}; give [D, N] with D = {x.shape[2]}")
    maps, held = (x.shape[0], x.shape[1], A.shape[1]), (x.shape[0], *A.shape)
    for name, z, shape in (("B", B, maps), ("C", C, maps), ("h0", h0, held), ("reset", reset, maps[:2])):
        if z is not None and z.shape != shape:
            raise ValueError(f"selective_scan: {name} has shape {tuple(z.shape)}; it must be {shape}")
    if emit is not None and emit < 1:
        raise ValueError(f"selective_scan: emit={emit}; give a number of tokens >= 1 or None")
    out_dtype = x.dtype
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        x, dt, A, B, C = (z.to(dtype) for z in (x, dt, A, B, C))
        scale = settings.current().decay_scale
        if scale != 1.0:
            A = A * scale
        h = x.new_zeros(held) if h0 is None else h0.to(dtype)
        backend = settings.choose(backend)
        if backend == "reference" or (backend == "auto" and x.shape[1] <= 2):
            y, h, emitted = _reference(x, dt, A, B, C, h, reset, emit)
        else:
            y, h, emitted = _SelectiveScan.apply(x, dt, A.mT.contiguous(), B, C, h.mT.contiguous(), reset, emit)
            h, emitted = h.mT.contiguous(), emitted.mT if emit is not None else None
    y = y.to(out_dtype)
    return (y, h) if emit is None else (y, h, emitted)
