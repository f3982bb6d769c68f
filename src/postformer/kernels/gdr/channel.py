"""Chunks of the recurrence where each key channel decays by itself: forward and hand-derived backward.

Equations and legend as in `gdr.chunk`; what is inside a chunk is made by `gdr.inside`. A few chunks are worked on at a
time, in memory that is laid out once: fresh memory costs more than what is done in it.
"""

# Arguments that come together are None together, which the checker cannot follow.
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportOptionalOperand=false
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .head import solve_unit, states_backward, states_forward
from .inside import Chunks, by_token, move_down, move_up, put_chunks, tokens, view_chunks

WORKING_SET = 1 << 16
"""Elements of one row or column argument worked on at a time: about thirty such tensors should fit in a cache."""


def _pieces(N: int, G: int, C: int, R: int, dk: int) -> list[slice]:
    length = max(1, WORKING_SET // max(1, G * C * R * dk))
    return [slice(i, min(i + length, N)) for i in range(0, N, length)]


class ChannelChunks(torch.autograd.Function):
    """As `HeadChunks`, g [B, H, T, dk]."""

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
        chunks = None
        for p in _pieces(N, G, C, R, dk):
            n = (p.stop - p.start) * G
            if chunks is None or chunks.rows.shape[0] != n:
                families = (w is not None) + (k is not None)
                chunks = Chunks(n, C, dk, dv, R, w is not None, families, early, q.new_empty, False)
                out = q.new_empty(n, C, dv)
                added_ = q.new_empty(n, dk, dv) if k is not None else None
            chunks.load(p, N, q, g, w, e, k)
            added = target = w_end = None
            if k is not None:
                v_ = view_chunks(v, p, N, R)
                written = chunks.written_[:, dw * C :]
                chunks.written[:, dw:].unflatten(0, v_.shape[:3]).copy_(v_)
                added = torch.bmm(chunks.end[:, dw:].flatten(1, 2).mT, written, out=added_).unflatten(0, (-1, G))
            if w is not None:
                sides = chunks.sides
                move_down(by_token(sides[..., dv:], R), chunks.start[:, 1:], 1 in early)
                if u is None:
                    sides[..., :dv] = 0
                else:
                    sides.view(-1, B, H, C * R, dv + dk)[..., :dv] = view_chunks(u, p, N, 1)[..., 0, :, :]
                if k is not None:
                    seen = torch.bmm(chunks.matrix[:, C:, dw * C :], written).unflatten(1, (R, C))
                    moved = seen.new_empty(n, C * R, dv)
                    move_down(by_token(moved, R), seen, 1 in early)
                    sides[..., :dv] -= moved
                solved = solve_unit(chunks.A, sides, upper=False, out=chunks.solved).unflatten(0, (-1, G))
                target = solved[..., :dv]
                probe[p] = solved[..., dv:]
                w_end = tokens(chunks.end[:, :R]).unflatten(0, (-1, G))
            states_forward(S, p, chunks.whole.unflatten(0, (-1, G)), added, target, w_end, probe, delta)
            torch.bmm(chunks.start[:, 0], S[p].flatten(0, 1), out=out)
            if w is not None:
                chunks.written[:, :R] = by_token(delta[p].flatten(0, 1), R)
            out.baddbmm_(chunks.matrix[:, :C], chunks.written_)
            put_chunks(o, p, N, 1, out.unsqueeze(1), early_read)
        ctx.save_for_backward(q, g, w, e, u, k, v, S, delta, probe)
        ctx.flags = (C, R, early)
        ctx.set_materialize_grads(False)
        return o, S[N].clone(), S[:N]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_o, grad_last, grad_S):
        q, g, w, e, u, k, v, S, delta, probe = ctx.saved_tensors
        C, R, early = ctx.flags
        (B, H, T, dk), dv = q.shape, S.shape[-1]
        N, G, dw = T // C, B * H, 0 if w is None else R
        if grad_o is None:
            grad_o = q.new_zeros(()).expand(B, H, T, dv)
        gq, gg, gw, ge, gu, gk, gv = (None if x is None else torch.empty_like(x) for x in (q, g, w, e, u, k, v))
        carry = torch.zeros_like(S[0]) if grad_last is None else grad_last
        chunks = None
        for p in reversed(_pieces(N, G, C, R, dk)):
            n = (p.stop - p.start) * G
            if chunks is None or chunks.rows.shape[0] != n:
                families = (w is not None) + (k is not None)
                chunks = Chunks(n, C, dk, dv, R, w is not None, families, early, q.new_empty, True)
                chunks.prepare_backward()
                first, gd_, gv_ = q.new_empty(n, dk, dv), q.new_empty(n, dw * C, dv), q.new_empty(n, R * C, dv)
            chunks.load(p, N, q, g, w, e, k)
            S_ = S[p].flatten(0, 1)
            # `written` is what each column wrote, `felt` the gradient of what each row read; M's is their product.
            go = view_chunks(grad_o, p, N, 1)
            move_up(chunks.felt[:, :1].unflatten(0, go.shape[:3]), go, 0 in early)
            go, gd, w_end = chunks.felt[:, 0], None, None
            if w is not None:
                chunks.written[:, :R] = by_token(delta[p].flatten(0, 1), R)
                torch.bmm(chunks.matrix[:, :C, : dw * C].mT, go, out=gd_)
                gd = tokens(gd_.unflatten(1, (R, C))).unflatten(0, (-1, G))
                w_end = tokens(chunks.end[:, :R]).unflatten(0, (-1, G))
            if k is not None:
                v_ = view_chunks(v, p, N, R)
                chunks.written[:, dw:].unflatten(0, v_.shape[:3]).copy_(v_)
            torch.bmm(chunks.start[:, 0].mT, go, out=first)
            grad_first = first.unflatten(0, (-1, G))
            if grad_S is not None:
                grad_first += grad_S[p]
            whole = chunks.whole.unflatten(0, (-1, G))
            later, last = states_backward(grad_first, carry, p, whole, gd, w_end, probe, chunks.later)
            carry = last.clone()
            if w is not None:
                rho = solve_unit(chunks.A.mT, gd.flatten(0, 1), upper=True, out=None)
                put_chunks(gu, p, N, R, by_token(rho, R))
                move_up(chunks.felt[:, 1:], by_token(rho, R), 1 in early)
                chunks.felt[:, 1:].neg_()
            if k is not None:
                torch.bmm(chunks.end[:, dw:].flatten(1, 2), later, out=gv_)
                gv_.baddbmm_(chunks.matrix[:, :, dw * C :].mT, chunks.felt_)
                put_chunks(gv, p, N, R, gv_.unflatten(1, (R, C)))
            chunks.backward(S_, later)
            put_chunks(gg, p, N, 1, chunks.HP)
            put_chunks(gq, p, N, 1, chunks.grad_rows[:, :1], 0 in early)
            put_chunks(ge, p, N, R, chunks.grad_rows[:, 1:], 1 in early)
            put_chunks(gw, p, N, R, chunks.grad_cols[:, :dw])
            put_chunks(gk, p, N, R, chunks.grad_cols[:, dw:])
        return gq, gg, gw, ge, gu, gk, gv, carry.unflatten(0, (B, H)), None, None, None, None
