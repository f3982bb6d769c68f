"""Mamba's selective scan (arXiv 2312.00752), with memory that does not grow with tokens times state.

Inside, states are [Bt, N, D] (D is the longer of the two, and elementwise work wants a long last dimension) and time
comes first. A piece of the tokens is worked on at a time, in memory that is laid out once: fresh memory costs more than
what is done in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import settings
from ..tape import fused
from . import _blocked, _linear
from . import selective_gpu as gpu
from .operators import selective

BUDGET = 1 << 18
"""Elements of a state history worked on at a time: few enough to stay in a cache, many enough to hide overhead."""

WALK = 1024
"""Values of a state from which a walk over the tokens is faster than blocks (measured: 1.1 to 1.8 times)."""


def _length(x: Tensor, state: Tensor) -> int:
    """Tokens per piece: the budget, but never fewer than 16 (each piece keeps a state for the backward pass)."""
    return min(x.shape[1], max(16, BUDGET // max(1, state.numel())))


class _Piece:
    """Memory for up to L tokens, and the recurrence in it."""

    def __init__(self, L: int, state: Tensor, backward: bool):
        Bt, N, D = state.shape
        new = state.new_empty
        self.x, self.dt, self.u, self.gy = (new(L, Bt, D) for _ in range(4))
        self.B, self.C = (new(L, Bt, N) for _ in range(2))
        self.decay, self.h = (new(L, Bt, N, D) for _ in range(2))
        self.total = new(L, Bt, N, D) if backward else self.h
        self.inputs = self.u.unsqueeze(-2), self.B.unsqueeze(-1)
        last = new(2, Bt, N, D).unbind() if backward else ()
        # Views of single tokens, made once: making them takes as long as the arithmetic on a small state.
        tokens = [z.unbind() for z in (self.decay, self.h, *self.inputs)]
        self.forward = list(zip(*tokens, [last[t % 2] for t in range(L)] if backward else tokens[1], strict=True))
        total = self.total.unbind()
        self.backward = list(zip(total, tokens[0][1:], total[1:]))
        self.walk = state.numel() >= WALK

    def load(self, s: slice, x, dt, A, B, C, reset) -> None:
        """Take tokens s."""
        L = s.stop - s.start
        for into, z in ((self.x, x), (self.dt, dt), (self.B, B), (self.C, C)):
            into[:L] = z[:, s].transpose(0, 1)
        torch.mul(self.dt[:L], self.x[:L], out=self.u[:L])
        decay = torch.mul(self.dt[:L].unsqueeze(-2), A, out=self.decay[:L]).exp_()
        if reset is not None:
            decay.masked_fill_(reset[:, s].T[..., None, None], 0.0)

    def states(self, L: int, h: Tensor) -> Tensor:
        """The states of L tokens after h, [L, Bt, N, D]."""
        decay, states, u, B = (z[:L] for z in (self.decay, self.h, *self.inputs))
        if self.walk:
            for decay_t, h_t, u_t, B_t, _ in self.forward[:L]:
                torch.mul(decay_t, h, out=h_t)
                h = h_t.addcmul_(u_t, B_t)
        else:
            torch.mul(u, B, out=states)
            # In place: a token's input is read before its state is stored there.
            into = states.transpose(0, 1)
            _blocked(decay.transpose(0, 1), into, h, into, _linear, torch.mul, False)
        return states

    def found(self, L: int, h: Tensor) -> Tensor:
        """What L tokens after h find in memory, decay_t h_{t-1}; what they leave is not kept."""
        found = self.h[:L]
        if self.walk:
            for decay_t, found_t, u_t, B_t, left in self.forward[:L]:
                torch.mul(decay_t, h, out=found_t)
                h = torch.addcmul(found_t, u_t, B_t, out=left)
        else:
            before = self.total[:L]
            before[0] = h
            before[1:] = self.states(L, h)[:-1]
            torch.mul(self.decay[:L], before, out=found)
        return found

    def scan_back(self, L: int) -> None:
        """total_t += decay_{t+1} total_{t+1} from the last of L tokens to the first."""
        if self.walk:
            for total_t, decay, total in reversed(self.backward[: L - 1]):
                total_t.addcmul_(decay, total)
        elif L > 1:
            a, b = self.decay[1:L].transpose(0, 1), self.total[:L].transpose(0, 1)
            _blocked(a, b[:, :-1], b[:, -1], b[:, :-1], _linear, torch.mul, True)


class _SelectiveScan(torch.autograd.Function):
    """Piece by piece; only the state before each piece is kept, and the backward pass runs the pieces again."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, h0, reset, emit):
        T, L = x.shape[1], _length(x, h0)
        y = torch.empty_like(x)
        starts, emitted = [], []
        h, piece = h0, _Piece(L, h0, False)
        for i in range(0, T, L):
            s = slice(i, min(i + L, T))
            starts.append(h)
            piece.load(s, x, dt, A, B, C, reset)
            states = piece.states(s.stop - s.start, h)
            y[:, s] = (piece.C[: len(states)].unsqueeze(-2) @ states).squeeze(-2).transpose(0, 1)
            if emit is not None:
                emitted += [h if t == i else states[t - 1 - i].clone() for t in _marks(s.start, s.stop, emit)]
            h = states[-1].clone()
        ctx.save_for_backward(x, dt, A, B, C, reset, *starts)
        ctx.emit, ctx.length = emit, L
        return y, h, (h.new_empty(0) if emit is None else torch.stack(emitted, 1))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_last, grad_emitted):
        x, dt, A, B, C, reset, *starts = ctx.saved_tensors
        T, L, emit = x.shape[1], ctx.length, ctx.emit or 0
        grad_x, grad_dt, grad_B, grad_C = (torch.empty_like(z) for z in (x, dt, B, C))
        grad_A = torch.zeros_like(A)
        carry = grad_last  # the gradient of the state after the piece
        piece = _Piece(L, starts[0], True)
        for n in range(len(starts) - 1, -1, -1):
            s = slice(n * L, min(n * L + L, T))
            length = s.stop - s.start
            piece.load(s, x, dt, A, B, C, reset)
            found = piece.found(length, starts[n])
            held = (z[:length] for z in (piece.x, piece.dt, piece.u, piece.B, piece.C, piece.gy))
            x_s, dt_s, u_s, B_s, C_s, gy = held
            decay, total = piece.decay[:length], piece.total[:length]
            gy.copy_(grad_y[:, s].transpose(0, 1))
            # A state is what was found plus what was written.
            read = (gy.unsqueeze(-2) @ found.mT).squeeze(-2)
            grad_C[:, s] = read.addcmul_(B_s, (u_s * gy).sum(-1, keepdim=True)).transpose(0, 1)
            torch.mul(gy.unsqueeze(-2), C_s.unsqueeze(-1), out=total)
            marks = _marks(s.start, s.stop, emit) if emit else range(0)
            for t in marks:
                if t > s.start:
                    total[t - 1 - s.start] += grad_emitted[:, t // emit]
            total[-1] += carry
            piece.scan_back(length)
            carry = decay[0] * total[0]
            if s.start in marks:
                carry = carry + grad_emitted[:, s.start // emit]
            grad_u = (B_s.unsqueeze(-2) @ total).squeeze(-2)
            grad_B[:, s] = (u_s.unsqueeze(-2) @ total.mT).squeeze(-2).transpose(0, 1)
            exponent = found.mul_(total)  # its gradient
            grad_x[:, s] = (grad_u * dt_s).transpose(0, 1)
            grad_u *= x_s
            grad_u += torch.mul(exponent, A, out=decay).sum(-2)
            grad_dt[:, s] = grad_u.transpose(0, 1)
            grad_A += exponent.mul_(dt_s.unsqueeze(-2)).sum((0, 1))
        return grad_x, grad_dt, grad_A, grad_B, grad_C, carry, None, None


def _marks(start: int, stop: int, emit: int) -> range:
    """The multiples of emit in [start, stop)."""
    return range(-(-start // emit) * emit, stop, emit)


@fused
def scan_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """One token: x, dt [Bt, D], B, C [Bt, N], h [Bt, D, N] -> (y [Bt, D], the state after it)."""
    h = (dt[:, :, None] * A).exp() * h + (dt * x).unsqueeze(-1) @ B.unsqueeze(-2)
    return (h @ C.unsqueeze(-1)).squeeze(-1), h


def _reference(x, dt, A, B, C, h, reset, emit):
    out, emitted = [], []
    for t in range(x.shape[1]):
        if emit is not None and t % emit == 0:
            emitted.append(h)
        if reset is not None:
            h = h.masked_fill(reset[:, t, None, None], 0.0)
        y, h = scan_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], h)
        out.append(y)
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
    skip: Tensor | None = None,
) -> Any:
    """Mamba's diagonal state space with input-dependent step, input and output maps (arXiv 2312.00752).

        h_t = exp(dt_t A) h_{t-1} + (dt_t x_t) B_t^T,    y_t = h_t C_t + skip * x_t

    Args:
        x: input [Bt, T, D]. dt: step size [Bt, T, D], >= 0 (softplus already applied); 0 leaves the state as it is.
        A: [D, N], negative. B, C: [Bt, T, N].
        h0: [Bt, D, N], the state before the first token; None is zero.
        reset: [Bt, T] bool; the state is zero before these tokens, exactly.
        emit: also return the state before tokens 0, emit, 2*emit, ... (before a reset at that token).
        backend: "auto", "reference" (token by token), "parallel" (pieces that are computed again for gradients, by
            PyTorch operations) or "native" (the same as compiled code, on a CPU with a compiler, or on a GPU with
            Triton where no state is emitted).
        skip: [D], or None.

    Returns:
        (y, h) or (y, h, emitted): y [Bt, T, D] in x's dtype; h [Bt, D, N] in float32 (float64 for float64 x);
        emitted [Bt, ceil(T / emit), D, N]. Gradients are first-order only but in the reference.

    Raises:
        ValueError: shapes do not fit.
        RuntimeError: compiled code was asked for and there is none.
    """
    if x.ndim != 3 or x.shape[1] < 1 or dt.shape != x.shape:
        raise ValueError(f"selective_scan: x {tuple(x.shape)} and dt {tuple(dt.shape)}; give both [Bt, T, D], T >= 1")
    if A.ndim != 2 or A.shape[0] != x.shape[2]:
        raise ValueError(f"selective_scan: A has shape {tuple(A.shape)}; give [D, N] with D = {x.shape[2]}")
    maps, held = (x.shape[0], x.shape[1], A.shape[1]), (x.shape[0], *A.shape)
    for name, z, shape in (("B", B, maps), ("C", C, maps), ("h0", h0, held), ("reset", reset, maps[:2]),
                           ("skip", skip, x.shape[2:])):
        if z is not None and z.shape != shape:
            raise ValueError(f"selective_scan: {name} has shape {tuple(z.shape)}; it must be {shape}")
    if emit is not None and emit < 1:
        raise ValueError(f"selective_scan: emit={emit}; give a number of tokens >= 1 or None")
    out_dtype = x.dtype
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        backend, A = settings.choose(backend), A.to(dtype)
        on_gpu = emit is None and x.shape[1] > 2 and gpu.runs(backend, x, dt, A, B, C, reset)
        if not on_gpu:
            x, dt, B, C = (z.to(dtype) for z in (x, dt, B, C))
        scale = settings.current().decay_scale
        if scale != 1.0:
            A = A * scale
        h = h0 if h0 is None else h0.to(dtype)
        emitted = None
        if on_gpu:
            y, h = gpu.selective_triton(x, dt, A, B, C, A.new_zeros(held) if h is None else h, reset)
        elif settings.native(backend, x, "selective_scan"):
            skip = None if skip is None else skip.to(dtype)
            keep = settings.recorded(x, dt, A, B, C, h, skip)
            y, h, emitted, _ = selective(x, dt, A, B, C, h, reset, skip, emit or 0, keep)
            skip = None  # done
        elif backend == "reference" or (backend == "auto" and x.shape[1] <= 2):
            y, h, emitted = _reference(x, dt, A, B, C, x.new_zeros(held) if h is None else h, reset, emit)
        else:
            h = x.new_zeros(held) if h is None else h
            y, h, emitted = _SelectiveScan.apply(x, dt, A.mT.contiguous(), B, C, h.mT.contiguous(), reset, emit)
            h, emitted = h.mT.contiguous(), emitted.mT if emit is not None else None
        if skip is not None:
            y = torch.addcmul(y, x.to(y.dtype), skip.to(y.dtype))
    y = y.to(out_dtype)
    return (y, h) if emit is None else (y, h, emitted)
