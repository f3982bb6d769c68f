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

RESET = -1e4
"""A log-decay whose exponential is exactly zero in fp32 and fp64, and which can still be added to others."""


def _before(x: Tensor) -> Tensor:
    """sum_{j<t} x_j over dim -2."""
    return F.pad(x, (0, 0, 1, 0))[..., :-1, :].cumsum(-2)


def _after(x: Tensor) -> Tensor:
    """sum_{j>i} x_j over dim -2."""
    return _before(x.flip(-2)).flip(-2)


class _HeadDecay(torch.autograd.Function):
    """g [..., C] -> [..., C, C+1]: exp(sum of g_j for c <= j <= t) at [t, c] where c <= t + 1, else 0.

    Column 0 is the decay since the chunk's start, column i + 1 the decay since token i. Sums are products with a
    triangle of ones: they only add, and on a CPU they beat a cumulative sum along a strided dimension.
    """

    @staticmethod
    def forward(ctx, g: Tensor) -> Tensor:
        C = g.shape[-1]
        ones = torch.ones(C, C + 1, dtype=torch.bool, device=g.device)
        own = ones.tril(0)
        summed = torch.ones(C, C, dtype=g.dtype, device=g.device).tril() @ (g.unsqueeze(-1) * own)
        decay = summed.masked_fill_(~ones.tril(1), float("-inf")).exp_()
        ctx.save_for_backward(decay)
        return decay

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (decay,) = ctx.saved_tensors
        C = decay.shape[-2]
        own = torch.ones(C, C + 1, dtype=grad.dtype, device=grad.device).tril(0)
        up = torch.ones(C, C, dtype=grad.dtype, device=grad.device).triu()
        return ((up @ (grad * decay)) * own).sum(-1)


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
            to_row = early if Rr == exclusive else torch.cat(
                [early.expand(*early.shape[:-2], exclusive, -1), to_row.expand(*early.shape[:-2], Rr - exclusive, -1)], -2
            )
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
            if decay is None:
                later.copy_(now) if add is None else torch.add(now, add[n], out=later)
            elif add is None:
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
            if decay is None:
                torch.add(grad_S[n], later, out=now)
            else:
                torch.addcmul(grad_S[n], later, decay[n], out=now)
            if w is not None:
                torch.baddbmm(grad_d[n], w[n], later, out=grad_u[n])
                now.baddbmm_(e[n].mT, grad_u[n], alpha=-1)
        grad_decay = grad_w = grad_e = None
        if decay is not None and ctx.needs_input_grad[0]:
            grad_decay = (S[:N] * carry[1:]).sum(-1, keepdim=True)
            if decay.shape[-2] == 1:
                grad_decay = grad_decay.sum(-2, keepdim=True)
        if w is not None:
            grad_w = d @ carry[1:].mT
            grad_e = -(grad_u @ S[:N].mT)
        return grad_decay, grad_w, grad_e, grad_u, carry[1:] if ctx.has_add else None, carry[0]


def _fold(x: Tensor, rows: int, pad: int) -> Tensor:
    """[B, H, L, d] -> [N, B * H, rows, d], the last chunk filled up with zeros (identity tokens)."""
    if pad:
        x = F.pad(x, (0, 0, 0, pad))
    B, H, L, d = x.shape
    return x.unflatten(2, (L // rows, rows)).permute(2, 0, 1, 3, 4).reshape(L // rows, B * H, rows, d)


class _Decays:
    """All decays of a chunk in the three forms that the chunk equations need, for none, one per head, one per channel."""

    def __init__(self, g: Tensor | None, C: int, like: Tensor):
        self.kind = "none" if g is None else "head" if g.shape[-1] == 1 else "channel"
        self.g, self.C, self.like = g, C, like
        if self.kind == "head":
            self.table = _HeadDecay.apply(g.squeeze(-1))  # [N, G, C, C+1]
        elif self.kind == "channel":
            self.inclusive = g.cumsum(-2).exp()

    def from_start(self, x: Tensor, per_token: int, exclusive: int) -> Tensor:
        """Rows times the decay since the chunk's start; the first `exclusive` rows of a token without its own decay."""
        if self.kind == "none":
            return x
        factor = self.table[..., :1] if self.kind == "head" else self.inclusive
        if exclusive:
            early = F.pad(factor, (0, 0, 1, 0), value=1.0)[..., :-1, :] if self.kind == "head" else _before(self.g).exp()
            parts = [early] * exclusive + [factor] * (per_token - exclusive)
            factor = torch.stack(parts, -2).flatten(-3, -2) if per_token > 1 else early
        elif per_token > 1:
            factor = factor.repeat_interleave(per_token, -2)
        return x * factor

    def to_end(self, x: Tensor, per_token: int) -> Tensor:
        """Rows times the decay from after their token to the chunk's end."""
        if self.kind == "none":
            return x
        factor = self.table[..., -1, 1:, None] if self.kind == "head" else _after(self.g).exp()
        return x * (factor.repeat_interleave(per_token, -2) if per_token > 1 else factor)

    def whole(self) -> Tensor | None:
        """The chunk's decay as a factor on the state, [N, G, 1 or dk, 1]."""
        if self.kind == "none":
            return None
        return self.table[..., -1:, :1] if self.kind == "head" else self.inclusive[..., -1, :, None]

    def triangle(self, rows: Tensor, cols: Tensor, per_row: int, per_col: int, strict: bool, exclusive: int) -> Tensor:
        """rows cols^T with the decay between them; columns after the row (strict: and the row's own) are zero.

        `exclusive`: how many leading rows of each token come before the token's own decay and updates.
        """
        C, like = self.C, self.like
        if self.kind == "channel":
            rows, cols = rows.unflatten(-2, (C, per_row)), cols.unflatten(-2, (C, per_col))
            inner = rows @ cols.mT
            mask = torch.ones(per_row, per_col, dtype=torch.bool, device=like.device)
            if strict:  # rows are micro-steps themselves
                mask = mask.tril(-1)
            elif exclusive:
                mask = torch.zeros_like(mask)
            return decay_triangle(rows, cols, self.g, inner * mask, exclusive)
        product = rows @ cols.mT
        step = torch.arange(C, device=like.device)
        row, col = step.repeat_interleave(per_row), step.repeat_interleave(per_col)
        if strict:
            visible = torch.ones(C * per_row, C * per_col, dtype=torch.bool, device=like.device).tril(-1)
        else:
            visible = row[:, None] > col if exclusive else row[:, None] >= col
        if self.kind == "none":
            return product * visible.to(product.dtype)
        table = self.table[..., 1:]
        if exclusive:
            early = F.pad(table, (0, 0, 1, 0))[..., :-1, :]
            parts = [early] * exclusive + [table] * (per_row - exclusive)
            table = torch.stack(parts, -2).flatten(-3, -2) if per_row > 1 else early
        elif per_row > 1:
            table = table.repeat_interleave(per_row, -2)
        if per_col > 1:
            table = table.repeat_interleave(per_col, -1)
        product = product * table
        return product * visible.to(product.dtype) if strict else product


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
    (B, H, T, dk), dv, R = q.shape, state.shape[-1], micro
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
    pad = (-T) % C
    q = _fold(q, C, pad)
    decays = _Decays(None if g is None else _fold(g, C, pad), C, q)
    w, e, u, k_add, v_add = (None if x is None else _fold(x, C * R, pad * R) for x in (w, e, u, k_add, v_add))
    late, early = int(read_before_update), int(erase_before_decay)

    o_local = add = w_end = probe = target = None
    if k_add is not None and v_add is not None:
        o_local = decays.triangle(q, k_add, 1, R, False, late) @ v_add
        add = decays.to_end(k_add, R).mT @ v_add
    if w is not None and e is not None:
        A = decays.triangle(e, w, R, R, True, early)
        if k_add is not None:
            seen = decays.triangle(e, k_add, R, R, True, early) @ v_add
            target = -seen if u is None else u - seen
        else:
            target = q.new_zeros(*w.shape[:-1], dv) if u is None else u
        # The diagonal of A is zero and is read as one.
        solved = torch.linalg.solve_triangular(
            A, torch.cat([target, decays.from_start(e, R, early)], -1), upper=False, unitriangular=True
        )
        target, probe = solved.split((dv, dk), -1)
        w_end = decays.to_end(w, R)
    S, d = _ChunkStates.apply(decays.whole(), w_end, probe, target, add, state.flatten(0, 1))
    o = decays.from_start(q, 1, late) @ S[:-1]
    if w is not None:
        o = o + decays.triangle(q, w, 1, R, False, late) @ d
    if o_local is not None:
        o = o + o_local
    o = o.unflatten(1, (B, H)).permute(1, 2, 0, 3, 4).reshape(B, H, T + pad, dv)[:, :, :T]
    S = S.unflatten(1, (B, H))
    return o, S[-1], S[:-1]
