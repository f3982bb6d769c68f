"""Chunks of the recurrence where each key channel decays by itself: forward and hand-derived backward.

Equations and legend as in `gdr_chunk`. Whatever looks into a chunk is a row (reads q, erases e), whatever is looked at a
column (w and k), and one matrix M holds them all: M[a t, b i] = sum_d row_a[t,d] column_b[i,d] exp(E_d(i, t)).

M is made of blocks that join neighbouring runs of s = 1, 2, 4, ... tokens: the decay from column to row is the decay
from the column to the end of the lower run, times that from the start of the upper run to the row, so each block is one
product of scaled rows and scaled columns. Both factors are products of numbers exp(g) <= 1, made once from those of half
the length; the factors of the whole chunk, s = C, tie rows and columns to the states. Nothing is divided by a decay, no
two sums are subtracted, and nothing of size [C, C, d] is formed.

A row that looks before its token's decay is the row of the token before it, seen from there after everything; so such
rows are moved up by one inside the chunk (the first to the end, where it sees nothing but the chunk's first state).

The backward pass forms M again and mirrors it; gradients of log-decays are sums of (gradient * value) over all factors,
handed from factors of length 2s to those of length s that they are made of.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .gdr_head import solve_unit, states_backward, states_forward

WORKING_SET = 1 << 16
"""Elements of one row or column argument worked on at a time: about thirty such tensors should fit in a cache."""


def _halves(x: Tensor, s: int) -> tuple[Tensor, Tensor]:
    """Lower and upper runs [..., C / 2s, s, d] of x [..., C, d]."""
    x = x.unflatten(-2, (-1, 2, s))
    return x.select(-3, 0), x.select(-3, 1)


def _blocks(M: Tensor, s: int) -> Tensor:
    """A view [n, C / 2s, Kr, s, Kc, s] of the blocks of M [n, Kr, C, Kc, C] that join runs of s tokens."""
    M = M.unflatten(4, (-1, 2, s)).unflatten(2, (-1, 2, s))
    return M.select(3, 1).select(6, 0).diagonal(dim1=2, dim2=5).permute(0, 5, 1, 2, 3, 4)


def _tokens(x: Tensor) -> Tensor:
    """[n, R, C, d] -> [n, C * R, d], a token's micro-steps one after the other."""
    return x[:, 0] if x.shape[1] == 1 else x.transpose(1, 2).flatten(1, 2)


def _kinds(x: Tensor, R: int) -> Tensor:
    """Inverse of `_tokens`."""
    return x.unsqueeze(1) if R == 1 else x.unflatten(1, (-1, R)).transpose(1, 2)


def _chunks(x: Tensor, p: slice, N: int, R: int) -> Tensor:
    """A view [chunks, B, H, R, C, d] of chunks p of x [B, H, N * C * R, d]."""
    return x.unflatten(2, (N, -1, R))[:, :, p].permute(2, 0, 1, 4, 3, 5)


def _stack(parts: list[Tensor], p: slice, N: int, R: list[int], early: list[int]) -> Tensor:
    """Chunks p of all parts as [n, kinds, C, d], the early kinds moved up by one."""
    parts = [_chunks(x, p, N, r) for x, r in zip(parts, R, strict=True)]
    length, B, H, _, C, d = parts[0].shape
    out = parts[0].new_empty(length, B, H, sum(R), C, d)
    at = 0
    for part, r in zip(parts, R, strict=True):
        into = out[:, :, :, at : at + r]
        if at in early:
            into[..., 0, :-1, :] = part[..., 0, 1:, :]
            into[..., 0, -1, :] = part[..., 0, 0, :]
            into[..., 1:, :, :] = part[..., 1:, :, :]
        else:
            into.copy_(part)
        at += r
    return out.flatten(0, 2)


def _put(x: Tensor | None, p: slice, N: int, part: Tensor, early: bool = False) -> None:
    """Write chunks p of x from part [n, R, C, d], the first kind moved down by one if early."""
    if x is None:
        return
    into = _chunks(x, p, N, part.shape[1])
    part = part.reshape(into.shape)
    if early:
        into[..., 0, 1:, :] = part[..., 0, :-1, :]
        into[..., 0, 0, :] = part[..., 0, -1, :]
        into, part = into[..., 1:, :, :], part[..., 1:, :, :]
    into.copy_(part)


class _Inside:
    """Some chunks' rows and columns, their decays, and M; everything that is elementwise in the channels."""

    def __init__(self, rows: Tensor, cols: Tensor, g: Tensor, R: int, early: list[int]):
        """rows [n, Kr, C, d], cols [n, Kc, C, d], g [n, C, d]; early: which rows are moved up."""
        self.rows, self.cols, self.R, self.early = rows, cols, R, early
        self.C = g.shape[1]
        # (P, Q): decays from the start of each token's run of s to after the token, and from there to the run's end.
        P, Q = g.exp(), torch.ones_like(g)
        self.levels, s = [(P, Q)], 1
        while s < self.C:
            lower, upper = _halves(P, s)
            P, Q = P.clone(), Q.clone()
            _halves(P, s)[1].mul_(lower[..., -1:, :])
            _halves(Q, s)[0].mul_(upper[..., -1:, :])
            self.levels.append((P, Q))
            s *= 2
        from_start, to_end = (x.unsqueeze(1) for x in self.levels[-1])
        self.whole = from_start[:, 0, -1, :, None]
        if early:
            from_start = from_start.repeat(1, rows.shape[1], 1, 1)
            from_start[:, early, -1] = 1
        self.from_start, self.to_end = from_start, to_end
        self.start, self.end = rows * from_start, cols * to_end
        self.scaled: list[tuple[Tensor, Tensor]] = []

    def _seen(self):
        """(row kind, micro-steps): the row sees these first micro-steps of its own token, of w and of k."""
        for a in range(self.rows.shape[1]):
            seen = self.R if a == 0 or a in self.early else a - 1
            if seen:
                yield a, seen

    def _families(self, cols: Tensor) -> Tensor:
        return cols.unflatten(1, (-1, self.R))

    def matrix(self) -> Tensor:
        """M [n, Kr, C, Kc, C], rows where they belong."""
        n, Kr, C, d = self.rows.shape
        Kc = self.cols.shape[1]
        M = self.rows.new_zeros(n, Kr, C, Kc, C)
        own = M.unflatten(3, (-1, self.R)).diagonal(dim1=2, dim2=5)
        for a, seen in self._seen():
            own[:, a, :, :seen] = (self.rows[:, a, None, None] * self._families(self.cols)[:, :, :seen]).sum(-1)
        for level, (P, Q) in enumerate(self.levels[:-1]):
            s = 1 << level
            up = self.rows.new_empty(n, C // (2 * s), Kr, s, d)
            torch.mul(_halves(self.rows, s)[1].transpose(1, 2), _halves(P, s)[1].unsqueeze(2), out=up)
            low = self.cols.new_empty(n, C // (2 * s), Kc, s, d)
            if s == 1:
                low.copy_(_halves(self.cols, s)[0].transpose(1, 2))
            else:
                torch.mul(_halves(self.cols, s)[0].transpose(1, 2), _halves(Q, s)[0].unsqueeze(2), out=low)
            into = _blocks(M, s)
            into.copy_((up.flatten(2, 3) @ low.flatten(2, 3).mT).view(into.shape))
            self.scaled.append((up, low))
        if self.early:
            M[:, self.early, -1] = 0
            M[:, self.early] = M[:, self.early].roll(1, 2)
        return M

    def in_place(self, x: Tensor) -> Tensor:
        """Rows [n, Kr, C, d] back where they belong."""
        if self.early:
            x = x.clone()
            x[:, self.early] = x[:, self.early].roll(1, 2)
        return x

    def backward(self, grad_M, grad_start, grad_end, grad_whole) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of (rows, cols, g) from those of M, of `in_place(start)`, of `end` and of log `whole` [n, d]."""
        early = self.early
        if early:
            grad_M[:, early, 0] = 0
            grad_M[:, early] = grad_M[:, early].roll(-1, 2)
            grad_start[:, early] = grad_start[:, early].roll(-1, 2)
        grad_rows, grad_cols = grad_start * self.from_start, grad_end * self.to_end
        grad_start *= self.start
        if early:
            grad_start[:, early, -1] = 0
        # HP and HQ: gradients of the logarithms of P and Q, handed down from level to level.
        HP, HQ = grad_start.sum(1), grad_end.mul_(self.end).sum(1)
        HP[:, -1] += grad_whole

        own = grad_M.unflatten(3, (-1, self.R)).diagonal(dim1=2, dim2=5)
        for a, seen in self._seen():
            grad = own[:, a, :, :seen].unsqueeze(-1)
            cols = self._families(self.cols)[:, :, :seen]
            if cols.shape[1] * seen == 1:
                grad_rows[:, a].addcmul_(grad[:, 0, 0], cols[:, 0, 0])
            else:
                grad_rows[:, a] += (grad * cols).sum((1, 2))
            self._families(grad_cols)[:, :, :seen].addcmul_(grad, self.rows[:, a, None, None])

        for level in range(len(self.levels) - 2, -1, -1):
            s, (P, Q), (up, low) = 1 << level, self.levels[level], self.scaled[level]
            (P_low, P_up), Q_low = _halves(HP, s), _halves(HQ, s)[0]
            P_low[..., -1, :] += P_up.sum(-2)
            P_up[..., -1, :] += Q_low.sum(-2)
            grad = _blocks(grad_M, s)
            if s == 1:
                grad = grad.squeeze(3).squeeze(-1).unsqueeze(-1)  # [n, C / 2, Kr, Kc, 1]
                up_, low_ = up.squeeze(3), low.squeeze(3)
                grad_up = (grad * low_.unsqueeze(2)).sum(3) if low.shape[2] > 1 else grad[:, :, :, 0] * low_
                grad_low = (grad * up_.unsqueeze(3)).sum(2) if up.shape[2] > 1 else grad[:, :, 0] * up_
                grad_up, grad_low = grad_up.unsqueeze(3), grad_low.unsqueeze(3)
            else:
                grad = grad.flatten(4, 5).flatten(2, 3)
                grad_up, grad_low = (grad @ low.flatten(2, 3)).view_as(up), (grad.mT @ up.flatten(2, 3)).view_as(low)
            _halves(grad_rows, s)[1].transpose(1, 2).addcmul_(grad_up, _halves(P, s)[1].unsqueeze(2))
            P_up += grad_up.mul_(up).sum(2)
            into = _halves(grad_cols, s)[0].transpose(1, 2)
            if s == 1:
                into += grad_low
            else:
                into.addcmul_(grad_low, _halves(Q, s)[0].unsqueeze(2))
                Q_low += grad_low.mul_(low).sum(2)
        return grad_rows, grad_cols, HP


class ChannelChunks(torch.autograd.Function):
    """As `HeadChunks`, g [B, H, T, dk]."""

    @staticmethod
    def _pieces(N: int, G: int, C: int, R: int, dk: int) -> list[slice]:
        length = max(1, WORKING_SET // max(1, G * C * R * dk))
        return [slice(i, min(i + length, N)) for i in range(0, N, length)]

    @staticmethod
    def _inside(p: slice, N: int, q, g, w, e, k, R: int, early: list[int]) -> _Inside:
        rows = _stack([q] if e is None else [q, e], p, N, [1] if e is None else [1, R], early)
        given = [x for x in (w, k) if x is not None]
        cols = _stack(given, p, N, [R] * len(given), [])
        return _Inside(rows, cols, _stack([g], p, N, [1], [])[:, 0], R, early)

    @staticmethod
    def forward(ctx, q, g, w, e, u, k, v, start, C: int, R: int, early_erase: bool, early_read: bool):
        (B, H, T, dk), dv = q.shape, start.shape[-1]
        N, G, dw = T // C, B * H, 0 if w is None else R
        early = [0] * early_read + [1] * (early_erase and w is not None)
        o = q.new_empty(B, H, T, dv) if q.is_contiguous() else q.new_empty(B, T, H, dv).transpose(1, 2)
        S = q.new_empty(N + 1, G, dk, dv)
        S[0] = start.flatten(0, 1)
        delta = None if w is None else q.new_empty(N, G, C * R, dv)
        probe = None if w is None else q.new_empty(N, G, C * R, dk)
        for p in ChannelChunks._pieces(N, G, C, R, dk):
            inside = ChannelChunks._inside(p, N, q, g, w, e, k, R, early)
            M, from_start = inside.matrix(), inside.in_place(inside.start)
            added = target = w_end = v_ = None
            if k is not None:
                v_ = _stack([v], p, N, [R], [])
                added = (inside.end[:, dw:].flatten(1, 2).mT @ v_.flatten(1, 2)).unflatten(0, (-1, G))
            if w is not None:
                target = v_new = q.new_zeros(M.shape[0], C * R, dv) if u is None else _tokens(_stack([u], p, N, [R], []))
                if k is not None:
                    seen = M[:, 1:, :, dw:].flatten(3, 4).flatten(1, 2) @ v_.flatten(1, 2)
                    v_new = target - _tokens(seen.unflatten(1, (R, C)))
                A = M[:, 1, :, 0] if R == 1 else M[:, 1:, :, :R].permute(0, 2, 1, 4, 3).flatten(3, 4).flatten(1, 2)
                solved = solve_unit(A, torch.cat([v_new, _tokens(from_start[:, 1:])], -1), upper=False)
                solved = solved.unflatten(0, (-1, G))
                target = solved[..., :dv]
                probe[p] = solved[..., dv:]
                w_end = _tokens(inside.end[:, :R]).unflatten(0, (-1, G))
            whole = inside.whole.unflatten(0, (-1, G))
            states_forward(S, p, whole, added, target, w_end, probe, delta)
            o_ = torch.bmm(from_start[:, 0], S[p].flatten(0, 1))
            if w is not None:
                o_.baddbmm_(M[:, 0, :, :dw].flatten(2, 3), _kinds(delta[p].flatten(0, 1), R).flatten(1, 2))
            if k is not None:
                o_.baddbmm_(M[:, 0, :, dw:].flatten(2, 3), v_.flatten(1, 2))
            _put(o, p, N, o_.unsqueeze(1))
        ctx.save_for_backward(q, g, w, e, u, k, v, S, delta, probe)
        ctx.flags = (C, R, early)
        ctx.set_materialize_grads(False)
        return o, S[N].clone(), S[:N]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_o, grad_last, grad_S):
        q, g, w, e, u, k, v, S, delta, probe = ctx.saved_tensors
        C, R, early = ctx.flags
        B, H, T, dk = q.shape
        N, G, dw = T // C, B * H, 0 if w is None else R
        if grad_o is None:
            grad_o = q.new_zeros(()).expand(B, H, T, S.shape[-1])
        gq, gg, gw, ge, gu, gk, gv = (None if x is None else torch.empty_like(x) for x in (q, g, w, e, u, k, v))
        carry = torch.zeros_like(S[0]) if grad_last is None else grad_last
        for p in reversed(ChannelChunks._pieces(N, G, C, R, dk)):
            inside = ChannelChunks._inside(p, N, q, g, w, e, k, R, early)
            M, from_start = inside.matrix(), inside.in_place(inside.start)
            go = _stack([grad_o], p, N, [1], [])[:, 0]
            S_ = S[p].flatten(0, 1)
            # What each column wrote, and the gradient of what each row read: M's gradient is their outer product.
            written = []
            gd = w_end = rho = A = None
            if w is not None:
                written.append(_kinds(delta[p].flatten(0, 1), R))
                w_end = _tokens(inside.end[:, :R]).unflatten(0, (-1, G))
                gd = _tokens((M[:, 0, :, :R].flatten(2, 3).mT @ go).unflatten(1, (R, C))).unflatten(0, (-1, G))
            if k is not None:
                written.append(_stack([v], p, N, [R], []))
            written = (written[0] if len(written) == 1 else torch.cat(written, 1)).flatten(1, 2)
            first = (from_start[:, 0].mT @ go).unflatten(0, (-1, G))
            if grad_S is not None:
                first += grad_S[p]
            whole = inside.whole.unflatten(0, (-1, G))
            later, carry = states_backward(first, carry, p, whole, gd, w_end, probe)
            felt = go.unsqueeze(1)
            if w is not None:
                A = M[:, 1, :, 0] if R == 1 else M[:, 1:, :, :R].permute(0, 2, 1, 4, 3).flatten(3, 4).flatten(1, 2)
                rho = _kinds(solve_unit(A.mT, gd.flatten(0, 1), upper=True), R)
                _put(gu, p, N, rho)
                felt = torch.cat([felt, -rho], 1)
            rows = felt.flatten(1, 2)
            if k is not None:
                grad = torch.bmm(inside.end[:, dw:].flatten(1, 2), later)
                grad.baddbmm_(M[:, :, :, dw:].flatten(3, 4).flatten(1, 2).mT, rows)
                _put(gv, p, N, grad.unflatten(1, (R, C)))
            grad_whole = (S_ * later).sum(-1) * inside.whole[..., 0]
            grad_M = (rows @ written.mT).view_as(M)
            grad_rows, grad_cols, grad = inside.backward(
                grad_M, (rows @ S_.mT).view_as(inside.start), (written @ later.mT).view_as(inside.end), grad_whole
            )
            _put(gg, p, N, grad.unsqueeze(1))
            _put(gq, p, N, grad_rows[:, :1], 0 in early)
            _put(ge, p, N, grad_rows[:, 1:], 1 in early)
            _put(gw, p, N, grad_cols[:, :dw])
            _put(gk, p, N, grad_cols[:, dw:])
        return gq, gg, gw, ge, gu, gk, gv, carry.unflatten(0, (B, H)), None, None, None, None
