"""The general diagonal + rank-one recurrence in chunks, as Triton kernels: forward, and what the backward recomputes.

Equations as in `gdr.chunk`. Rows r of a chunk are its tokens' micro-steps in time; a token decays at its first row,
is read at its last (or before its first), and its other rows neither decay nor read. Families of columns (w with the
errors of erases, k with v) are worked on one at a time by the same kernels.

    inside_*   parallel over chunks: matrices Mq, Me of reads and erases against columns; columns decayed to the end
    solve      parallel over chunks: (I + Me)^-1 and what it makes of targets and of erases against the first state
    states     one chunk after another: states and errors
    outputs    parallel over chunks

State, sums of log-decays, exponentials, what the solve sees and the solve are exact to fp32. PRECISION is that of the
other products: "tf32" only where what came in is half precision, of which products in tf32 are exact. No exponent is
positive and no two cumulative sums are subtracted.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportOptionalOperand=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from ..gpu.tiles import decay_sum, from_start, head_of, line, put, rows_of, square, table, tile


@triton.jit
def inside_head(
    q, qs, e, es, col, cs, g, gs, Mq, Me, end, whole, H, T, N, dk,
    C: tl.constexpr, R: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr, ERASES: tl.constexpr,
    EARLY_ERASE: tl.constexpr, EARLY_READ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One decay per head. Program (chunk, head)."""
    n, G = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    q, col, g = head_of(q, qs, G, H), head_of(col, cs, G, H), head_of(g, gs, G, H)
    if ERASES:
        e = head_of(e, es, G, H)
    r = tl.arange(0, BL)
    t, row, ok, reads, _ = rows_of(n, r, T, C, R, EARLY_READ)
    mq, me = tl.zeros([BL, BL], tl.float32), tl.zeros([BL, BL], tl.float32)
    to_end = tl.exp(decay_sum(g, gs[2], n, r + 1, 0, C * R, T, C, R, r, dk, True, True))
    first = tl.load(g + (n * C + r // R) * gs[2], mask=ok & (r % R == 0), other=0.0)
    passed = tl.exp(tl.sum(first, 0))
    for k0 in range(0, dk, BK):
        d = k0 + tl.arange(0, BK)
        x = tile(col, cs[2], row, ok, d, dk)
        mq += tl.dot(tile(q, qs[2], t, reads, d, dk), tl.trans(x), input_precision=PRECISION)
        if ERASES:
            me += tl.dot(tile(e, es[2], row, ok, d, dk), tl.trans(x), input_precision=PRECISION)
        put(end + G * T * R * dk, dk, row, ok, d, dk, x * to_end)
        tl.store(whole + (n * tl.num_programs(1) + G) * dk + d, d * 0.0 + passed, mask=d < dk)
    at = (n * tl.num_programs(1) + G) * BL * BL + r[:, None] * BL + r[None, :]
    tl.store(Mq + at, mq * table(g, gs[2], n, r, EARLY_READ, not EARLY_READ, T, C, R))
    if ERASES:
        tl.store(Me + at, me * table(g, gs[2], n, r, EARLY_ERASE, False, T, C, R))


@triton.jit
def inside_channel(
    q, qs, e, es, col, cs, g, gs, Mq, Me, end, whole, H, T, N, dk,
    C: tl.constexpr, R: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr, RUN: tl.constexpr, ERASES: tl.constexpr,
    EARLY_ERASE: tl.constexpr, EARLY_READ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One decay per channel: every row against the runs of columns before its own. Program (chunk, head).

    The decay from column to row is that to the end of the column's run, times that from there to the row.
    """
    n, G = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    q, col, g = head_of(q, qs, G, H), head_of(col, cs, G, H), head_of(g, gs, G, H)
    if ERASES:
        e = head_of(e, es, G, H)
    M = (n * tl.num_programs(1) + G) * BL * BL
    r = tl.arange(0, BL)
    t, row, ok, reads, decays = rows_of(n, r, T, C, R, EARLY_READ)
    for run in range(0, BL, RUN):
        i = run + tl.arange(0, RUN)
        _, column, there, _, _ = rows_of(n, i, T, C, R, EARLY_READ)
        mq, me = tl.zeros([BL, RUN], tl.float32), tl.zeros([BL, RUN], tl.float32)
        for k0 in range(0, dk, BK):
            d = k0 + tl.arange(0, BK)
            low = tl.exp(decay_sum(g, gs[2], n, i + 1, 0, run + RUN, T, C, R, d, dk, False, True))
            x = tl.trans(tile(col, cs[2], column, there, d, dk) * low)
            up = tl.exp(decay_sum(g, gs[2], n, r - EARLY_READ, run + RUN, C * R, T, C, R, d, dk, False, False))
            mq += tl.dot(tile(q, qs[2], t, reads, d, dk) * up, x, input_precision=PRECISION)
            if ERASES:
                if EARLY_ERASE != EARLY_READ:
                    up = tl.exp(decay_sum(g, gs[2], n, r - EARLY_ERASE, run + RUN, C * R, T, C, R, d, dk, False, False))
                me += tl.dot(tile(e, es[2], row, ok, d, dk) * up, x, input_precision="ieee")
        at = M + r[:, None] * BL + i[None, :]
        # A run against itself is another kernel's; what is above it is zero.
        elsewhere = (r[:, None] // RUN) != (i[None, :] // RUN)
        below = r[:, None] > i[None, :]
        tl.store(Mq + at, tl.where(below, mq, 0.0), mask=elsewhere)
        if ERASES:
            tl.store(Me + at, tl.where(below, me, 0.0), mask=elsewhere)
    for k0 in range(0, dk, BK):
        d = k0 + tl.arange(0, BK)
        to_end = tl.exp(decay_sum(g, gs[2], n, r + 1, 0, C * R, T, C, R, d, dk, False, True))
        put(end + G * T * R * dk, dk, row, ok, d, dk, tile(col, cs[2], row, ok, d, dk) * to_end)
        passed = tl.exp(tl.sum(tile(g, gs[2], t, decays, d, dk), 0))
        tl.store(whole + (n * tl.num_programs(1) + G) * dk + d, passed, mask=d < dk)


@triton.jit
def inside_run(
    q, qs, e, es, col, cs, g, gs, Mq, Me, H, T, N, dk,
    C: tl.constexpr, R: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr, RUN: tl.constexpr, ERASES: tl.constexpr,
    EARLY_ERASE: tl.constexpr, EARLY_READ: tl.constexpr,
):  # fmt: skip
    """One decay per channel: a run of rows against itself, row by row, its columns decaying on the way.

    Program (chunk and run, head).
    """
    n, G = (tl.program_id(0) // (BL // RUN)).to(tl.int64), tl.program_id(1).to(tl.int64)
    q, col, g = head_of(q, qs, G, H), head_of(col, cs, G, H), head_of(g, gs, G, H)
    if ERASES:
        e = head_of(e, es, G, H)
    start = tl.program_id(0) % (BL // RUN) * RUN
    i = tl.arange(0, RUN)
    _, column, there, _, _ = rows_of(n, start + i, T, C, R, EARLY_READ)
    mq, me = tl.zeros([RUN, RUN], tl.float32), tl.zeros([RUN, RUN], tl.float32)
    for k0 in range(0, dk, BK):
        d = k0 + tl.arange(0, BK)
        x = tile(col, cs[2], column, there, d, dk)
        now = tl.zeros([RUN, BK], tl.float32)
        for j in range(RUN):
            t, row, ok, reads, decays = rows_of(n, start + j, T, C, R, EARLY_READ)
            here = i[:, None] == j
            qj = line(q + t * qs[2], reads, d, dk)
            if ERASES:
                ej = line(e + row * es[2], ok, d, dk)
            if EARLY_READ:
                mq += tl.where(here, tl.sum(now * qj[None, :], 1)[None, :], 0.0)
            if ERASES and EARLY_ERASE:
                me += tl.where(here, tl.sum(now * ej[None, :], 1)[None, :], 0.0)
            now *= tl.exp(line(g + t * gs[2], decays, d, dk))[None, :]
            if ERASES and not EARLY_ERASE:
                me += tl.where(here, tl.sum(now * ej[None, :], 1)[None, :], 0.0)
            now = tl.where(here, x, now)
            if not EARLY_READ:
                mq += tl.where(here, tl.sum(now * qj[None, :], 1)[None, :], 0.0)
    at = (n * tl.num_programs(1) + G) * BL * BL + (start + i)[:, None] * BL + (start + i)[None, :]
    tl.store(Mq + at, mq)
    if ERASES:
        tl.store(Me + at, me)


@triton.jit
def inverse(A, r, BL: tl.constexpr, RUN: tl.constexpr):
    """(I + A)^-1 for a strictly lower A: each run by substitution, then runs against each other by substitution."""
    NB: tl.constexpr = BL // RUN
    own = (r[:, None] // RUN) == (r[None, :] // RUN)
    D = tl.reshape(tl.sum(tl.reshape(tl.where(own, A, 0.0), (BL, NB, RUN)), 1), (NB, RUN, RUN))
    i = tl.arange(0, RUN)
    X = tl.broadcast_to(tl.where(i[:, None] == i[None, :], 1.0, 0.0)[None, :, :], (NB, RUN, RUN))
    for j in range(1, RUN):
        here = (i == j)[None, :, None]
        line = tl.sum(tl.where(here, D, 0.0), 1)
        made = tl.sum(line[:, :, None] * X, 1)
        X = tl.where(here, X - made[:, None, :], X)
    X = tl.reshape(tl.broadcast_to(tl.reshape(X, (BL, 1, RUN)), (BL, NB, RUN)), (BL, BL))
    X = tl.where(own, X, 0.0)
    F = tl.dot(X, tl.where(own, 0.0, A), input_precision="ieee")
    inverted = X
    for _ in range(NB - 1):
        inverted = X - tl.dot(F, inverted, input_precision="ieee")
    return inverted


@triton.jit
def solve(
    e, es, u, us, v, vs, g, gs, Me, Me_add, Z, probe, target, H, T, N, dk, dv,
    C: tl.constexpr, R: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, RUN: tl.constexpr,
    HEAD: tl.constexpr, TARGETS: tl.constexpr, ADDS: tl.constexpr, EARLY_ERASE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Z = (I + Me)^-1, probe = Z (e decayed from the start), target = Z (u - Me_add v). Program (chunk, head)."""
    n, G = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    e, g = head_of(e, es, G, H), head_of(g, gs, G, H)
    M = (n * tl.num_programs(1) + G) * BL * BL
    r = tl.arange(0, BL)
    _, row, ok, _, _ = rows_of(n, r, T, C, R, False)
    every = (r[:, None] >= 0) & (r[None, :] >= 0)
    z = inverse(square(Me + M, r, r, every, BL), r, BL, RUN)
    tl.store(Z + M + r[:, None] * BL + r[None, :], z)
    for k0 in range(0, dk, BK):
        d = k0 + tl.arange(0, BK)
        x = tile(e, es[2], row, ok, d, dk) * from_start(g, gs[2], n, r, EARLY_ERASE, T, C, R, d, dk, HEAD)
        put(probe + G * T * R * dk, dk, row, ok, d, dk, tl.dot(z, x, input_precision=PRECISION))
    for v0 in range(0, dv, BV):
        d = v0 + tl.arange(0, BV)
        x = tl.zeros([BL, BV], tl.float32)
        if TARGETS:
            x += tile(head_of(u, us, G, H), us[2], row, ok, d, dv)
        if ADDS:
            added = tile(head_of(v, vs, G, H), vs[2], row, ok, d, dv)
            x -= tl.dot(square(Me_add + M, r, r, every, BL), added, input_precision=PRECISION)
        put(target + G * T * R * dv, dv, row, ok, d, dv, tl.dot(z, x, input_precision=PRECISION))


@triton.jit
def states(
    v, vs, start, whole, probe, delta, end, end_add, S, last, H, T, N, dk, dv,
    C: tl.constexpr, R: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, ERASES: tl.constexpr,
    ADDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S[n], the state before each chunk; delta comes in as target and becomes the errors. Program (values, head)."""
    G, d = tl.program_id(1).to(tl.int64), tl.arange(0, BK)
    dv_ = tl.program_id(0) * BV + tl.arange(0, BV)
    heads, r, key = tl.num_programs(1), tl.arange(0, BL), d < dk
    now = tile(start + G * dk * dv, dv, d, key, dv_, dv)
    for chunk in range(N):
        n = G * 0 + chunk  # int64
        _, row, ok, _, _ = rows_of(n, r, T, C, R, False)
        put(S + (n * heads + G) * dk * dv, dv, d, key, dv_, dv, now)
        later = now * tl.load(whole + (n * heads + G) * dk + d, mask=key, other=0.0)[:, None]
        if ERASES:
            error = tile(delta + G * T * R * dv, dv, row, ok, dv_, dv)
            error -= tl.dot(tile(probe + G * T * R * dk, dk, row, ok, d, dk), now, input_precision=PRECISION)
            put(delta + G * T * R * dv, dv, row, ok, dv_, dv, error)
            x = tile(end + G * T * R * dk, dk, row, ok, d, dk)
            later += tl.dot(tl.trans(x), error, input_precision=PRECISION)
        if ADDS:
            x = tile(end_add + G * T * R * dk, dk, row, ok, d, dk)
            added = tile(head_of(v, vs, G, H), vs[2], row, ok, dv_, dv)
            later += tl.dot(tl.trans(x), added, input_precision=PRECISION)
        now = later
    put(last + G * dk * dv, dv, d, key, dv_, dv, now)


@triton.jit
def outputs(
    q, qs, v, vs, g, gs, Mq, Mq_add, S, delta, o, os, H, T, N, dk, dv,
    C: tl.constexpr, R: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, HEAD: tl.constexpr,
    ERASES: tl.constexpr, ADDS: tl.constexpr, EARLY_READ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (chunk, head, values)."""
    n, G = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    q, g = head_of(q, qs, G, H), head_of(g, gs, G, H)
    at = n * tl.num_programs(1) + G
    r, dv_ = tl.arange(0, BL), tl.program_id(2) * BV + tl.arange(0, BV)
    t, row, ok, reads, _ = rows_of(n, r, T, C, R, EARLY_READ)
    every = (r[:, None] >= 0) & (r[None, :] >= 0)
    found = tl.zeros([BL, BV], tl.float32)
    for k0 in range(0, dk, BK):
        d = k0 + tl.arange(0, BK)
        x = tile(q, qs[2], t, reads, d, dk) * from_start(g, gs[2], n, r, EARLY_READ, T, C, R, d, dk, HEAD)
        found += tl.dot(x, tile(S + at * dk * dv, dv, d, d < dk, dv_, dv), input_precision=PRECISION)
    if ERASES:
        x = tile(delta + G * T * R * dv, dv, row, ok, dv_, dv)
        found += tl.dot(square(Mq + at * BL * BL, r, r, every, BL), x, input_precision=PRECISION)
    if ADDS:
        x = tile(head_of(v, vs, G, H), vs[2], row, ok, dv_, dv)
        found += tl.dot(square(Mq_add + at * BL * BL, r, r, every, BL), x, input_precision=PRECISION)
    put(head_of(o, os, G, H), os[2], t, reads, dv_, dv, found)
