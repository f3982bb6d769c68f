"""Precision of scalar Kalman filters, one for each channel, over time.

    lambda-_t = 1 / (f_t / lambda_{t-1} + q_t)          lambda_t = lambda-_t + phi_t

In lambda_{t-1} this is a quotient of two linear functions, and such maps compose like 2x2 matrices. They are walked in
about sqrt(T) blocks: what a block does as a whole for all blocks side by side, the blocks' first values one after
another, then all blocks side by side by the recursion itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..scan import scan

WIDE = 4096
"""Values per token from which a plain walk over the tokens is faster than blocks."""


def predicted(f: Tensor, q: Tensor, old: Tensor) -> Tensor:
    """Written so that its derivatives are products: old / (f + q old) has them as differences, which for small f are
    nothing but rounding."""
    return 1 / (f / old + q)


def precision_recurrent(f: Tensor, q: Tensor, phi: Tensor, state: Tensor, start: Tensor, reset: Tensor | None
                        ) -> tuple[Tensor, Tensor]:
    """The recursion itself. All [B, T, ...] but state and start [B, ...] and reset [B, T]; f is the factor.

    Returns (lambda-, lambda)."""
    before, after = [], []
    for t, (f_t, q_t, phi_t) in enumerate(zip(f.unbind(1), q.unbind(1), phi.unbind(1), strict=True)):
        if reset is not None:
            state = torch.where(_column(reset[:, t], state), start, state)
        prior = predicted(f_t, q_t, state)
        state = prior + phi_t
        before.append(prior)
        after.append(state)
    return torch.stack(before, 1), torch.stack(after, 1)


def precision_blocked(f: Tensor, q: Tensor, phi: Tensor, state: Tensor, start: Tensor, reset: Tensor | None
                      ) -> tuple[Tensor, Tensor]:
    """As precision_recurrent, with first-order gradients: the values are found without a graph; around them the
    recursion is linear, so that its derivatives are one linear scan."""
    with torch.no_grad():
        value = _values(f, q, phi, state, start, reset)
        old = torch.cat([state[:, None], value[:, :-1]], 1)
        if reset is not None:
            old = torch.where(_column(reset, old), start[:, None], old)
        slope = f / (f + q * old) ** 2
    if not torch.is_grad_enabled():
        return predicted(f, q, old), value
    first = state[:, None]
    if reset is not None:
        first = torch.where(_column(reset[:, :1], first), start[:, None], first)
        fresh = torch.where(_column(reset, old), start[:, None], old)
    else:
        fresh = old
    fresh = torch.cat([first, fresh[:, 1:]], 1)
    found = predicted(f, q, fresh) + phi
    # Zero in value, and the derivative in it of everything but lambda_{t-1}.
    change = scan(torch.cat([torch.zeros_like(slope[:, :1]), slope[:, 1:]], 1), found - found.detach(), reset=reset)
    after = value + change
    shifted = torch.cat([torch.zeros_like(change[:, :1]), change[:, :-1]], 1)
    if reset is not None:
        shifted = shifted.masked_fill(_column(reset, shifted), 0.0)
    return predicted(f, q, fresh + shifted), after


def _column(x: Tensor, like: Tensor) -> Tensor:
    return x.view(*x.shape, *(1,) * (like.ndim - x.ndim))


def _values(f: Tensor, q: Tensor, phi: Tensor, state: Tensor, start: Tensor, reset: Tensor | None) -> Tensor:
    shape = torch.broadcast_shapes(f.shape, q.shape, phi.shape)
    f, q, phi = (x.expand(shape) for x in (f, q, phi))
    T = phi.shape[1]
    C = T if phi[:, 0].numel() >= WIDE else max(1, math.isqrt(T))
    N = T // C
    out = torch.empty(shape, dtype=phi.dtype, device=phi.device)

    def walk(at: slice, blocks: tuple[int, int] | None, now: Tensor) -> Tensor:
        cut = [x[:, at] if blocks is None else x[:, at].unflatten(1, blocks).transpose(1, 2) for x in (f, q, phi)]
        done = out[:, at] if blocks is None else out[:, at].unflatten(1, blocks).transpose(1, 2)
        stops = None if reset is None else (
            reset[:, at] if blocks is None else reset[:, at].unflatten(1, blocks).transpose(1, 2))
        fresh = start if blocks is None else start[:, None]
        for t in range(cut[0].shape[1]):
            if stops is not None:
                now = torch.where(_column(stops[:, t], now), fresh, now)
            now = predicted(cut[0][:, t], cut[1][:, t], now) + cut[2][:, t]
            done[:, t] = now
        return now

    if N > 1:
        f_n, q_n, phi_n = (x[:, : N * C].unflatten(1, (N, C)) for x in (f, q, phi))
        wholes = _compose(f_n, q_n, phi_n, start, None if reset is None else reset[:, : N * C].unflatten(1, (N, C)))
        firsts, now = [], state
        for n in range(N):
            firsts.append(now)
            a, b, c, d = (m[:, n] for m in wholes)
            now = (a * now + b) / (c * now + d)
        walk(slice(0, N * C), (N, C), torch.stack(firsts, 1))
        if N * C < T:
            walk(slice(N * C, T), None, out[:, N * C - 1])
    else:
        walk(slice(0, T), None, state)
    return out


def _compose(f: Tensor, q: Tensor, phi: Tensor, start: Tensor, reset: Tensor | None
             ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[B, N, C, ...] -> (a, b, c, d) [B, N, ...] of lambda -> (a lambda + b) / (c lambda + d) over each block. All
    entries are >= 0, so that scaling them by their maximum loses nothing."""
    one, zero = torch.ones_like(phi[:, :, 0]), torch.zeros_like(phi[:, :, 0])
    a, b, c, d = one, zero, zero, one
    for t in range(phi.shape[2]):
        if reset is not None:
            cut = _column(reset[:, :, t], one)
            a, c = a.masked_fill(cut, 0.0), c.masked_fill(cut, 0.0)
            b, d = torch.where(cut, start[:, None], b), torch.where(cut, one, d)
        f_t, q_t, phi_t = f[:, :, t], q[:, :, t], phi[:, :, t]
        low = (q_t * a + f_t * c, q_t * b + f_t * d)
        high = (a + phi_t * low[0], b + phi_t * low[1])
        size = torch.maximum(torch.maximum(*low), torch.maximum(*high))
        a, b, c, d = high[0] / size, high[1] / size, low[0] / size, low[1] / size
    return a, b, c, d
