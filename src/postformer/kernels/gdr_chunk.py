"""The general diagonal + rank-one recurrence in chunks.

Inside a chunk, with delta_t = u_t - X_t^T e_t the error of each erase,

    (I + A) Delta = U - A' V - (e . decay from the chunk's start) S_0,    A_ti = sum_d e_td w_id exp(E_d(i, t)), i < t
    O = (q . decay from the start) S_0 + B Delta + B' V,                  B_ti likewise with q for e
    S_C = (decay of the chunk) S_0 + (w . decay to the end)^T Delta + (k . decay to the end)^T V

where E(i, t) is the sum of log-decays after i up to t. Each E is formed by adding non-positive numbers only: no two
cumulative sums are subtracted and nothing is divided by a decay, so that every exponent is <= 0 whatever the gates.

Legend: N chunks, G = batch * heads, C tokens per chunk, R micro-steps per token; tensors are [N, G, C * R, d].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .gdr_head import HeadChunks

RESET = -1e4
"""A log-decay whose exponential is exactly zero in fp32 and fp64, and which can still be added to others."""


def _before(x: Tensor) -> Tensor:
    """sum_{j<t} x_j over dim -2."""
    return F.pad(x, (0, 0, 1, 0))[..., :-1, :].cumsum(-2)


def _after(x: Tensor) -> Tensor:
    """sum_{j>i} x_j over dim -2."""
    return _before(x.flip(-2)).flip(-2)


def decay_triangle(rows: Tensor, cols: Tensor, g: Tensor, inner: Tensor, exclusive: int) -> Tensor:
    """M[(t,r),(i,s)] = sum_d rows[t,r,d] cols[i,s,d] exp(sum_{i<j<=t} g[j,d]) for i < t, inner[t] at i = t, 0 above.

    rows [..., C, Rr, d], cols [..., C, Rc, d], g [..., C, d], inner [..., C, Rr, Rc]; C a power of two. In the first
    `exclusive` rows of each token the sum stops before t. Neighbouring halves of doubling size are joined by one
    product each: the decay from column to row is a sum inside the lower half plus a sum inside the upper half, so
    both factors are <= 1 and nothing of size [C, C, d] is formed. Returns [..., C * Rr, C * Rc].
    """
    C, Rr, Rc = rows.shape[-3], rows.shape[-2], cols.shape[-2]
    M, s = inner, 1
    while s < C:
        lo, hi = (x.squeeze(-3) for x in g.unflatten(-2, (C // (2 * s), 2, s)).split(1, -3))
        to_row = hi.cumsum(-2).exp().unsqueeze(-2)
        if exclusive:
            early = _before(hi).exp().unsqueeze(-2)
            later = to_row.expand(*to_row.shape[:-2], Rr - exclusive, -1)
            to_row = torch.cat([early.expand(*early.shape[:-2], exclusive, -1), later], -2)
        upper = rows.unflatten(-3, (C // (2 * s), 2, s)).select(-4, 1) * to_row
        lower = cols.unflatten(-3, (C // (2 * s), 2, s)).select(-4, 0) * _after(lo).exp().unsqueeze(-2)
        block = upper.flatten(-3, -2) @ lower.flatten(-3, -2).mT
        M = torch.cat([F.pad(M[..., 0::2, :, :], (0, s * Rc)), torch.cat([block, M[..., 1::2, :, :]], -1)], -2)
        s *= 2
    return M.squeeze(-3)


class _ChunkStates(torch.autograd.Function):
    """The only sequential part: d_n = u_n - e_n S_n;  S_{n+1} = decay_n S_n + add_n + w_n^T d_n, over chunks n.

    Returns all states [N+1, G, dk, dv] and all errors d. The backward pass walks the chunks in reverse with two
    products each; gradients of the per-chunk operands are then formed for all chunks at once.
    """

    @staticmethod
    def forward(ctx, decay, w, e, u, add, start):
        steps = w if add is None else add
        N = steps.shape[0]
        S = start.new_empty(N + 1, *start.shape)
        S[0] = start
        d = None if w is None else torch.empty_like(u)
        for n in range(N):
            now, later = S[n], S[n + 1]
            if add is None:
                torch.mul(now, decay[n], out=later)
            else:
                torch.addcmul(add[n], now, decay[n], out=later)
            if w is not None:
                torch.baddbmm(u[n], e[n], now, alpha=-1, out=d[n])
                later.baddbmm_(w[n].mT, d[n])
        ctx.save_for_backward(decay, w, e, S, d)
        ctx.has_add = add is not None
        if d is None:
            d = start.new_empty(0)
            ctx.mark_non_differentiable(d)
        return S, d

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_S, grad_d):
        decay, w, e, S, d = ctx.saved_tensors
        N = S.shape[0] - 1
        carry = torch.empty_like(S)  # carry[n]: the gradient of S_n, everything included
        carry[N] = grad_S[N]
        grad_u = None if w is None else torch.empty_like(d)
        for n in range(N - 1, -1, -1):
            later, now = carry[n + 1], carry[n]
            torch.addcmul(grad_S[n], later, decay[n], out=now)
            if w is not None:
                torch.baddbmm(grad_d[n], w[n], later, out=grad_u[n])
                now.baddbmm_(e[n].mT, grad_u[n], alpha=-1)
        grad_decay, grad_w, grad_e = (S[:N] * carry[1:]).sum(-1, keepdim=True), None, None
        if w is not None:
            grad_w = d @ carry[1:].mT
            grad_e = -(grad_u @ S[:N].mT)
        return grad_decay, grad_w, grad_e, grad_u, carry[1:] if ctx.has_add else None, carry[0]


def _fold(x: Tensor, rows: int, pad: int) -> Tensor:
    """[B, H, L, d] -> [N, B * H, rows, d], the last chunk filled up with zeros (identity tokens)."""
    if pad:
        x = F.pad(x, (0, 0, 0, pad))
    B, H, L, d = x.shape
    return x.unflatten(2, (L // rows, rows)).permute(2, 0, 1, 3, 4).reshape(L // rows, B * H, rows, d).contiguous()


def _micro(factor: Tensor, early: Tensor | None, per_token: int) -> Tensor:
    """[..., C, d] for each of a token's rows; the first of them takes `early` where that is given."""
    if per_token == 1:
        return factor if early is None else early
    rows = [factor] * per_token if early is None else [early] + [factor] * (per_token - 1)
    return torch.stack(rows, -2).flatten(-3, -2)


def _channel_chunks(q, g, w, e, u, k, v, start, R: int, early_erase: bool, early_read: bool):
    """One decay per key channel; folded arguments, g [N, G, C, dk]. Returns what `HeadChunks` does."""
    C, dv = q.shape[-2], start.shape[-1]
    inclusive, to_end = g.cumsum(-2).exp(), _after(g).exp()
    before = _before(g).exp() if early_erase or early_read else None
    own = torch.ones(R, R, dtype=q.dtype, device=q.device).tril(-1)

    def rows(x: Tensor, per_token: int) -> Tensor:
        return x.unflatten(-2, (C, per_token))

    def read(cols: Tensor) -> Tensor:
        inner = rows(q, 1) @ rows(cols, R).mT
        inner = torch.zeros_like(inner) if early_read else inner
        return decay_triangle(rows(q, 1), rows(cols, R), g, inner, int(early_read))

    def erased(cols: Tensor) -> Tensor:
        inner = (rows(e, R) @ rows(cols, R).mT) * own
        return decay_triangle(rows(e, R), rows(cols, R), g, inner, int(early_erase))

    o_local = add = w_end = probe = target = None
    if k is not None:
        o_local = read(k) @ v
        add = (k * _micro(to_end, None, R)).mT @ v
    if w is not None:
        target = q.new_zeros(*w.shape[:-1], dv) if u is None else u
        if k is not None:
            target = target - erased(k) @ v
        from_start = e * _micro(inclusive, before if early_erase else None, R)
        # The diagonal of A is zero and is read as one.
        solved = torch.linalg.solve_triangular(
            erased(w), torch.cat([target, from_start], -1), upper=False, unitriangular=True
        )
        target, probe = solved.split((dv, e.shape[-1]), -1)
        w_end = w * _micro(to_end, None, R)
    S, d = _ChunkStates.apply(inclusive[..., -1, :, None], w_end, probe, target, add, start)
    o = (q * _micro(inclusive, before if early_read else None, 1)) @ S[:-1]
    if w is not None:
        o = o + read(w) @ d
    return o if o_local is None else o + o_local, S[-1], S[:-1]


def gdr_chunked(
    q: Tensor,
    g: Tensor | None,
    w: Tensor | None,
    e: Tensor | None,
    u: Tensor | None,
    k_add: Tensor | None,
    v_add: Tensor | None,
    state: Tensor,
    reset: Tensor | None,
    micro: int,
    erase_before_decay: bool,
    read_before_update: bool,
    C: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes as in `gdr`, all floating tensors already in the state's dtype, C tokens per chunk (a power of two).

    Returns (o, state, the state before every C-th token [N, B, H, dk, dv]).
    """
    (B, H, T, _), dv, R = q.shape, state.shape[-1], micro
    if reset is not None:
        cut = reset[:, None, :, None]
        if g is None:
            g = q.new_zeros(()).expand(B, H, T, 1)
        g = torch.where(cut, RESET, g)
        # A zero decay does not hide the old state from a row that looks before the decay.
        if read_before_update:
            q = q.masked_fill(cut, 0.0)
        if erase_before_decay and e is not None:
            e = e.unflatten(2, (T, R))
            first = torch.arange(R, device=q.device) == 0
            e = e.masked_fill(cut[..., None] & first[:, None], 0.0).flatten(2, 3)
    pad, flags = (-T) % C, (R, erase_before_decay, read_before_update)
    if g is None or g.shape[-1] == 1:
        if pad:
            q, g = (None if x is None else F.pad(x, (0, 0, 0, pad)) for x in (q, g))
            w, e, u, k_add, v_add = (
                None if x is None else F.pad(x, (0, 0, 0, pad * R)) for x in (w, e, u, k_add, v_add)
            )
        o, last, S = HeadChunks.apply(q, g, w, e, u, k_add, v_add, state, C, *flags)
        o = o[:, :, :T]
    else:
        q, g = _fold(q, C, pad), _fold(g, C, pad)
        w, e, u, k_add, v_add = (None if x is None else _fold(x, C * R, pad * R) for x in (w, e, u, k_add, v_add))
        o, last, S = _channel_chunks(q, g, w, e, u, k_add, v_add, state.flatten(0, 1), *flags)
        o = o.unflatten(1, (B, H)).permute(1, 2, 0, 3, 4).reshape(B, H, T + pad, dv)[:, :, :T]
    return o, last.unflatten(0, (B, H)), S.unflatten(1, (B, H))
