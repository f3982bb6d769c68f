"""Chunks of the recurrence where the decay is one number per head, or none: forward and hand-derived backward.

Equations and legend as in `gdr.chunk`. One table per chunk holds every decay: [t, 0] since the chunk's start, [t, i+1]
since token i. Both passes walk over a few chunks at a time and form each [C, C] matrix anew where it is needed, so that
what lives from forward to backward is no larger than the inputs, and what is worked on stays in a cache.

The backward pass needs the solve for one right-hand side only: with rho = (I + A)^-T (gradient of delta), the gradient
of the target is rho, of A it is -rho delta^T, and of the erase rows against the chunk's first state -rho S_0^T.
Gradients of log-decays are sums of (gradient * value) over all entries whose exponent contains them, never differences.
"""

# Arguments that come together are None together, which the checker cannot follow.
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportOptionalOperand=false
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

WORKING_SET = 1 << 15
"""Elements of one [C, C] matrix over heads and chunks worked on at a time: about ten of them should fit in a cache."""


def decay_table(g: Tensor) -> Tensor:
    """g [..., C] -> [..., C, C+1]: exp(sum of g_j over c <= j <= t) at [t, c] for c <= t + 1, else 0.

    The sums are products with a triangle of ones: they only add, and on a CPU they beat a strided cumulative sum.
    """
    C = g.shape[-1]
    ones = torch.ones(C, C + 1, dtype=torch.bool, device=g.device)
    summed = torch.ones(C, C, dtype=g.dtype, device=g.device).tril() @ (g.unsqueeze(-1) * ones.tril())
    return summed.masked_fill_(~ones.tril(1), float("-inf")).exp_()


def _table_gradient(P: Tensor) -> Tensor:
    """Gradient of g [..., C] from gradients of the table's exponents [..., C, C+1]."""
    C = P.shape[-2]
    ones = torch.ones(C, C + 1, dtype=P.dtype, device=P.device)
    return ((ones[:, 1:].triu() @ P) * ones.tril()).sum(-1)


def _rows(table: Tensor, per_token: int, early: bool) -> Tensor:
    """The table's rows for each row of the tokens, the first of each token from before its decay if `early`."""
    if not early:
        return table if per_token == 1 else table.repeat_interleave(per_token, -2)
    first = torch.zeros_like(table[..., :1, :])
    first[..., 0] = 1
    before = torch.cat([first, table[..., :-1, :]], -2)
    return torch.stack([before] + [table] * (per_token - 1), -2).flatten(-3, -2) if per_token > 1 else before


def _rows_gradient(P: Tensor, per_token: int, early: bool) -> Tensor:
    """Transpose of `_rows`."""
    if per_token == 1 and not early:
        return P
    P = P.unflatten(-2, (-1, per_token))
    own = P[..., int(early) :, :].sum(-2)
    if early:
        own[..., :-1, :] += P[..., 1:, 0, :]
    return own


class _Tables:
    """Decays of some chunks: reads and erases against columns and against the start, columns against the end."""

    def __init__(self, g: Tensor | None, C: int, R: int, early_erase: bool, early_read: bool, like: Tensor):
        self.R, self.early_erase, self.early_read = R, early_erase, early_read
        self.decays = g is not None
        if g is None:
            table = torch.ones(C, C + 1, dtype=like.dtype, device=like.device).tril(1)
        else:
            table = decay_table(g)
        read, erase = _rows(table, 1, early_read), _rows(table, R, early_erase)
        self.read, self.erase = (x[..., 1:] if R == 1 else x[..., 1:].repeat_interleave(R, -1) for x in (read, erase))
        if R > 1 or not early_erase:
            self.erase = self.erase.tril(-1)
        self.read_start, self.erase_start = read[..., :1], erase[..., :1]
        end = table[..., -1, 1:, None]
        self.end = end if R == 1 else end.repeat_interleave(R, -2)
        self.whole = table[..., -1:, :1]

    def scale(self, x: Tensor, factor: Tensor) -> Tensor:
        return x * factor if self.decays else x

    def gradient(self, read, erase, read_start, erase_start, end, whole) -> Tensor:
        """Gradient of g from those of the exponents of all the factors (erase and erase_start may be None)."""

        def micro(x: Tensor) -> Tensor:
            return x if self.R == 1 else x.unflatten(-1, (-1, self.R)).sum(-1)

        P = _rows_gradient(torch.cat([read_start, micro(read)], -1), 1, self.early_read)
        if erase is not None:
            P += _rows_gradient(torch.cat([erase_start, micro(erase)], -1), self.R, self.early_erase)
        P[..., -1, 0] += whole
        P[..., -1, 1:] += micro(end.squeeze(-1))
        return _table_gradient(P)


def solve_unit(A: Tensor, sides: Tensor, upper: bool, out: Tensor | None = None) -> Tensor:
    """(I + A)^-1 sides for a strictly triangular A: its zero diagonal is read as one."""
    # Without `out` the result is column-major, which costs two copies here and more in whatever reads it.
    out = torch.empty_like(sides) if out is None else out
    return torch.linalg.solve_triangular(A, sides, upper=upper, unitriangular=True, out=out)


def states_forward(S, p: slice, whole, added, target, w_end, probe, delta) -> None:
    """The only sequential part: fill S[n + 1] and delta[n] for the chunks n in p.

    delta_n = target_n - probe_n S_n;  S_{n+1} = whole_n S_n + added_n + w_end_n^T delta_n

    S, probe and delta hold all chunks, the others those in p; whole, added, and target with w_end may be None.
    """
    for i, n in enumerate(range(p.start, p.stop)):
        now, later = S[n], S[n + 1]
        if added is None:
            later.copy_(now) if whole is None else torch.mul(now, whole[i], out=later)
        elif whole is None:
            torch.add(now, added[i], out=later)
        else:
            torch.addcmul(added[i], now, whole[i], out=later)
        if w_end is not None:
            torch.baddbmm(target[i], probe[n], now, alpha=-1, out=delta[n])
            later.baddbmm_(w_end[i].mT, delta[n])


def states_backward(first, carry, p: slice, whole, gd, w_end, probe, later=None) -> tuple[Tensor, Tensor]:
    """Mirror of `states_forward`: (gradients of the states after each chunk, flat; gradient of the first state).

    first and gd come in as the gradients of states and deltas from what is read inside the chunks, and are overwritten
    with the whole ones; carry is the gradient of the state after the last chunk.
    """
    later = torch.empty_like(first) if later is None else later.view_as(first)
    for n in range(first.shape[0] - 1, -1, -1):
        later[n] = carry
        if whole is None:
            first[n] += carry
        else:
            first[n].addcmul_(carry, whole[n])
        if w_end is not None:
            gd[n].baddbmm_(w_end[n], carry)
            first[n].baddbmm_(probe[p.start + n].mT, gd[n], alpha=-1)
        carry = first[n]
    return later.flatten(0, 1), carry


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1, keepdim=True)


def _take(x: Tensor, p: slice, N: int) -> Tensor:
    """Chunks p of x [B, H, L, d], in any layout, as [chunks * G, L / N, d]."""
    part = x.unflatten(2, (N, -1))[:, :, p]
    return part.permute(2, 0, 1, 3, 4).reshape(-1, *part.shape[3:]).contiguous()


def _put(x: Tensor, p: slice, N: int, part: Tensor) -> None:
    """Inverse of `_take`: write chunks p of x."""
    into = x.unflatten(2, (N, -1))[:, :, p].permute(2, 0, 1, 3, 4)
    into.copy_(part.view(into.shape))


class HeadChunks(torch.autograd.Function):
    """(q, g, w, e, u, k, v, start [B, H, dk, dv], C, R, flags) -> (o [B, H, T, dv], state, S).

    state [B * H, dk, dv] is the last one, S [N, B * H, dk, dv] those before each chunk.

    Shapes as in `gdr`, T a multiple of C, g [B, H, T, 1] or None. Chunks are copied out of the arguments as they are
    worked on, so that these may lie in memory as they please.
    """

    @staticmethod
    def _pieces(N: int, G: int, C: int, R: int) -> list[slice]:
        length = max(1, WORKING_SET // max(1, G * C * C * R))
        return [slice(i, min(i + length, N)) for i in range(0, N, length)]

    @staticmethod
    def forward(ctx, q, g, w, e, u, k, v, start, C: int, R: int, early_erase: bool, early_read: bool):
        (B, H, T, dk), dv = q.shape, start.shape[-1]
        N, G = T // C, B * H
        o = q.new_empty(B, H, T, dv) if q.is_contiguous() else q.new_empty(B, T, H, dv).transpose(1, 2)
        S = q.new_empty(N + 1, G, dk, dv)
        S[0] = start.flatten(0, 1)
        delta = None if w is None else q.new_empty(N, G, C * R, dv)
        probe = None if w is None else q.new_empty(N, G, C * R, dk)
        for p in HeadChunks._pieces(N, G, C, R):
            q_, g_, w_, e_, u_, k_, v_ = (None if x is None else _take(x, p, N) for x in (q, g, w, e, u, k, v))
            tables = _Tables(None if g_ is None else g_.squeeze(-1), C, R, early_erase, early_read, q)
            added = target = w_end = None
            if k is not None:
                added = (tables.scale(k_, tables.end).mT @ v_).unflatten(0, (-1, G))
            if w is not None:
                target = w_.new_zeros(*w_.shape[:-1], dv) if u_ is None else u_
                if k is not None:
                    target = target - ((e_ @ k_.mT) * tables.erase) @ v_
                sides = torch.cat([target, tables.scale(e_, tables.erase_start)], -1)
                solved = solve_unit((e_ @ w_.mT).mul_(tables.erase), sides, upper=False).unflatten(0, (-1, G))
                target = solved[..., :dv]
                probe[p] = solved[..., dv:]
                w_end = tables.scale(w_, tables.end).unflatten(0, (-1, G))
            whole = tables.whole.unflatten(0, (-1, G)) if tables.decays else None
            states_forward(S, p, whole, added, target, w_end, probe, delta)
            o_ = torch.bmm(tables.scale(q_, tables.read_start), S[p].flatten(0, 1))
            if w is not None:
                o_.baddbmm_((q_ @ w_.mT).mul_(tables.read), delta[p].flatten(0, 1))
            if k is not None:
                o_.baddbmm_((q_ @ k_.mT).mul_(tables.read), v_)
            _put(o, p, N, o_)
        ctx.save_for_backward(q, g, w, e, u, k, v, S, delta, probe)
        ctx.flags = (C, R, early_erase, early_read)
        ctx.set_materialize_grads(False)
        return o, S[N].clone(), S[:N]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_o, grad_last, grad_S):
        q, g, w, e, u, k, v, S, delta, probe = ctx.saved_tensors
        C, R, early_erase, early_read = ctx.flags
        B, H, T, _ = q.shape
        N, G = T // C, B * H
        if grad_o is None:
            grad_o = q.new_zeros(()).expand(B, H, T, S.shape[-1])
        grads = [None if x is None else torch.empty_like(x) for x in (q, g, w, e, u, k, v)]
        carry = torch.zeros_like(S[0]) if grad_last is None else grad_last
        for p in reversed(HeadChunks._pieces(N, G, C, R)):
            taken = (None if x is None else _take(x, p, N) for x in (q, g, w, e, k, v, grad_o))
            q_, g_, w_, e_, k_, v_, go = taken
            S_, delta_ = (None if x is None else x[p].flatten(0, 1) for x in (S, delta))
            tables = _Tables(None if g_ is None else g_.squeeze(-1), C, R, early_erase, early_read, q)
            gg = gw = ge = rho = gk = gv = None
            M = M_add = gd = A = w_end = None
            if w is not None:
                M = (q_ @ w_.mT).mul_(tables.read)
                A = (e_ @ w_.mT).mul_(tables.erase)
                w_end = tables.scale(w_, tables.end).unflatten(0, (-1, G))
                gd = (M.mT @ go).unflatten(0, (-1, G))
            if k is not None:
                M_add = (q_ @ k_.mT).mul_(tables.read)

            whole = tables.whole.unflatten(0, (-1, G)) if tables.decays else None
            first = (tables.scale(q_, tables.read_start).mT @ go).unflatten(0, (-1, G))
            if grad_S is not None:
                first += grad_S[p]
            later, carry = states_backward(first, carry, p, whole, gd, w_end, probe)

            gq = torch.bmm(go, S_.mT)
            if tables.decays:
                gq *= tables.read_start
            read_start = _dot(q_, gq)
            read = erase = erase_start = 0.0
            end = 0.0
            if w is not None:
                rho = solve_unit(A.mT, gd.flatten(0, 1), upper=True)
                grad = go @ delta_.mT
                read = read + grad * M
                grad *= tables.read
                gq.baddbmm_(grad, w_)
                gw = torch.bmm(grad.mT, q_)
                grad = torch.bmm(rho, delta_.mT).neg_()
                erase = erase + grad * A
                grad *= tables.erase
                ge = torch.bmm(rho, S_.mT).neg_()
                if tables.decays:
                    ge *= tables.erase_start
                erase_start = _dot(e_, ge)
                ge.baddbmm_(grad, w_)
                gw.baddbmm_(grad.mT, e_)
                part = tables.scale(delta_ @ later.mT, tables.end)
                end = end + _dot(w_, part)
                gw += part
            if k is not None:
                grad = go @ v_.mT
                read = read + grad * M_add
                grad *= tables.read
                gq.baddbmm_(grad, k_)
                gk = torch.bmm(grad.mT, q_)
                gv = torch.bmm(M_add.mT, go)
                gv.baddbmm_(tables.scale(k_, tables.end), later)
                part = tables.scale(v_ @ later.mT, tables.end)
                end = end + _dot(k_, part)
                gk += part
                if w is not None:
                    A_add = (e_ @ k_.mT).mul_(tables.erase)
                    grad = torch.bmm(rho, v_.mT).neg_()
                    erase = erase + grad * A_add
                    grad *= tables.erase
                    ge.baddbmm_(grad, k_)
                    gk.baddbmm_(grad.mT, e_)
                    gv.baddbmm_(A_add.mT, rho, alpha=-1)
            if tables.decays:
                total = (S_ * later).sum((-2, -1)) * tables.whole[..., 0, 0]
                erase = None if w is None else erase
                gg = tables.gradient(read, erase, read_start, erase_start, end, total)
            for x, part in zip(grads, (gq, gg, gw, ge, rho, gk, gv)):
                if x is not None and part is not None:
                    _put(x, p, N, part)
        return *grads, carry.unflatten(0, (B, H)), None, None, None, None
