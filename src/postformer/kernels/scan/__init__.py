"""K2, elementwise recurrences: h_t = a_t h_{t-1} + b_t, its max-plus sister, and causal convolution by FFT."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import settings
from . import operators

Step = Callable[[Tensor, Tensor, Tensor, Tensor], object]
"""step(a, h, b, out): out <- a h + b, in whatever algebra."""
SHORT = 3
"""Tokens up to which a few operations of PyTorch are faster than any other form."""
WIDE = 4096
"""Values per token from which a plain walk over the tokens is faster than blocks (measured: 1.1 to 1.7 times)."""


def _linear(a: Tensor, h: Tensor, b: Tensor, out: Tensor) -> None:
    torch.addcmul(b, a, h, out=out)


def _max_plus(a: Tensor, h: Tensor, b: Tensor, out: Tensor) -> None:
    torch.maximum(torch.add(a, h), b, out=out)


def _blocked(a: Tensor, b: Tensor, h: Tensor, out: Tensor, step: Step, compose: Callable, reverse: bool) -> None:
    """Fill out [B, T, ...] with the recurrence started from h [B, ...], forwards or backwards in time.

    T is cut into about sqrt(T) blocks. A first pass finds what each block does as a whole, all blocks side by side;
    the blocks' start values then follow one from another; a second pass fills all blocks side by side. So there are
    about 3 sqrt(T) steps, and no intermediate is larger than one value per block.
    """
    T = b.shape[1]
    C = max(1, math.isqrt(T))
    if b[:, 0].numel() >= WIDE:
        C = T  # a step is work enough: one pass over the values beats two with fewer calls
    N = T // C
    lead = T - N * C if reverse else 0  # what is left over is done last, in the direction of the walk
    inside = range(C - 1, -1, -1) if reverse else range(C)
    blocks = range(N - 1, -1, -1) if reverse else range(N)
    if N > 1:
        a_n, b_n, out_n = (x[:, lead : lead + N * C].unflatten(1, (N, C)) for x in (a, b, out))
        first = inside[0]
        whole, end = a_n[:, :, first].clone(), b_n[:, :, first].clone()
        for c in inside[1:]:
            step(a_n[:, :, c], end, b_n[:, :, c], end)
            compose(a_n[:, :, c], whole, out=whole)
        start = torch.empty_like(end)
        for n in blocks:
            start[:, n] = h
            h = torch.empty_like(h)
            step(whole[:, n], start[:, n], end[:, n], h)
        now = start
        for c in inside:
            step(a_n[:, :, c], now, b_n[:, :, c], out_n[:, :, c])
            now = out_n[:, :, c]
        rest = range(lead - 1, -1, -1) if reverse else range(N * C, T)
    else:
        rest = range(T - 1, -1, -1) if reverse else range(T)
    if rest:
        # All views at once: one by one they take as long as a step over a few thousand values.
        left = [x[:, min(rest) : max(rest) + 1].unbind(1)[:: rest.step] for x in (a, b, out)]
        for a_t, b_t, out_t in zip(*left, strict=True):
            step(a_t, h, b_t, out_t)
            h = out_t


class _Scan(torch.autograd.Function):
    """The linear recurrence; its backward pass is the same recurrence backwards in time with a conjugated."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
        h = torch.empty(b.shape, dtype=b.dtype, device=b.device)
        _blocked(a, b, h0, h, _linear, torch.mul, False)
        ctx.save_for_backward(a, h0, h)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        a, h0, h = ctx.saved_tensors
        a = a.conj().resolve_conj()
        total = torch.empty(h.shape, dtype=h.dtype, device=h.device)
        total[:, -1] = grad[:, -1]
        if h.shape[1] > 1:
            _blocked(a[:, 1:], grad[:, :-1], total[:, -1], total[:, :-1], _linear, torch.mul, True)
        grad_a = None
        if ctx.needs_input_grad[0]:
            grad_a = torch.empty_like(total)
            torch.mul(total[:, 1:], h[:, :-1].conj(), out=grad_a[:, 1:])
            torch.mul(total[:, 0], h0.conj(), out=grad_a[:, 0])
        return grad_a, total, a[:, 0] * total[:, 0]


def _prepare(name: str, a: Tensor, b: Tensor, h0: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    if a.ndim < 2 or b.ndim < 2:
        raise ValueError(f"{name}: a and b need at least two dimensions, [B, T, ...]")
    if b.shape[1] < 1 or a.shape[1] != b.shape[1]:
        raise ValueError(f"{name}: a has {a.shape[1]} tokens and b {b.shape[1]}; give both [B, T, ...] with T >= 1")
    try:
        shape = torch.broadcast_shapes(a.shape, b.shape)
    except RuntimeError:
        raise ValueError(f"{name}: a {tuple(a.shape)} and b {tuple(b.shape)} do not broadcast to each other") from None
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    if h0 is not None:
        dtype = torch.promote_types(dtype, h0.dtype)
        if h0.shape != (shape[0], *shape[2:]):
            raise ValueError(f"{name}: the start has shape {tuple(h0.shape)}; it must be {(shape[0], *shape[2:])}")
    if reset is not None and reset.shape != shape[:2]:
        raise ValueError(f"{name}: reset has shape {tuple(reset.shape)}; it must be {tuple(shape[:2])}")
    return a.to(dtype).expand(shape), b.to(dtype).expand(shape)


def scan(
    a: Tensor,
    b: Tensor,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """All values of the elementwise linear recurrence h_t = a_t h_{t-1} + b_t (real or complex).

    Args:
        a, b: [B, T, ...] with time on dim 1; they broadcast to each other.
        h0: [B, ...], the value before the first token; None is zero.
        reset: [B, T] bool; the previous value counts as zero at these tokens, exactly.
        backend: "auto", "reference" (token by token), "parallel" (about 3 sqrt(T) steps; arXiv 1709.04057) or "native"
            (compiled code: CPU, real numbers).

    Returns:
        h [B, T, ...], at least float32; h[:, -1] is the final state. First-order gradients.

    Raises:
        ValueError: shapes do not fit.
        RuntimeError: compiled code was asked for by name and there is none.
    """
    a, b = _prepare("scan", a, b, h0, reset)
    h = b.new_zeros((b.shape[0], *b.shape[2:])) if h0 is None else h0.to(b.dtype)
    # Under `use(backend="native")` complex numbers run on what there is for them.
    named, backend = backend, settings.choose(backend)
    short = backend == "auto" and b.shape[1] <= SHORT
    if not short and settings.native(named if b.is_complex() else backend, b, "scan"):
        return operators.scan(a, b, h, reset, False)
    if reset is not None:
        a = torch.where(reset.view(*reset.shape, *(1,) * (a.ndim - 2)), 0.0, a)
    if short or backend == "reference":
        out = []
        for a_t, b_t in zip(a.unbind(1), b.unbind(1)):
            h = a_t * h + b_t
            out.append(h)
        return torch.stack(out, 1)
    return _Scan.apply(a, b, h)


def max_plus_scan(
    a: Tensor, b: Tensor, m0: Tensor | None = None, reset: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """All values of m_t = max(a_t + m_{t-1}, b_t), the running maximum of xLSTM's stabiliser (arXiv 2405.04517).

    a, b: [B, T, ...] with time on dim 1; m0 [B, ...], -1e30 where it is None; reset [B, T] bool: the previous value
    counts as -1e30 at these tokens. backend: as in `scan`, without a reference of its own. Returns [B, T, ...], at
    least float32, without gradient. Raises ValueError where shapes do not fit.
    """
    with torch.no_grad():
        a, b = _prepare("max_plus_scan", a, b, m0, reset)
        m = torch.full_like(b[:, 0], -1e30) if m0 is None else m0.to(b.dtype)
        if settings.native(settings.choose(backend), b, "max_plus_scan"):
            return operators.scan(a, b, m, reset, True)
        if reset is not None:
            a = torch.where(reset.view(*reset.shape, *(1,) * (a.ndim - 2)), -1e30, a)
        out = torch.empty(b.shape, dtype=b.dtype, device=b.device)
        _blocked(a, b, m, out, _max_plus, torch.add, False)
        return out


def fft_convolution(u: Tensor, k: Tensor) -> Tensor:
    """Causal convolution y_t = sum_{s<=t} k_s u_{t-s} by FFT (long convolutions: arXiv 2302.10866).

    u: [B, T, D]; k: [D, K] (any length), in float32 at least. Returns [B, T, D] in u's dtype.
    Raises ValueError where the channels differ. It has no state and cannot restart inside a row.
    """
    if u.ndim != 3 or k.ndim != 2 or u.shape[2] != k.shape[0]:
        raise ValueError(f"fft_convolution: u {tuple(u.shape)} and k {tuple(k.shape)}; give [B, T, D] and [D, K]")
    dtype = torch.promote_types(torch.promote_types(u.dtype, k.dtype), torch.float32)
    T = u.shape[1]
    k = k[:, :T].to(dtype)
    length = 1 << (T + k.shape[1] - 2).bit_length()  # >= T + K - 1: no wrap-around
    y = torch.fft.irfft(
        torch.fft.rfft(u.to(dtype).mT, n=length) * torch.fft.rfft(k, n=length), n=length
    )
    return y[..., :T].mT.to(u.dtype)
