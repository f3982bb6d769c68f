"""The backward pass of gdr_triton_forward_kernels, which see: Triton kernels.

    firsts       parallel: gradients of states and errors from what is read inside their chunk
    states_back  one chunk after another, from the last
    targets      parallel: gradients of targets, rho = (I + Me)^-T (gradient of the errors)
    values       parallel: gradients of added values
    matrices     parallel: gradients of Mq and Me
    starts_back, run_back, head_back or channel_back    parallel: what these gradients mean for q, e, columns and g

Gradients of log-decays are sums of (gradient * value) over all whose exponent contains them, never differences; sums
over rows are products with triangles of ones.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportOptionalOperand=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from ..gpu.tiles import add, add_line, decay_sum, from_start, head_of, line, put, rows_of, square, table, tile


@triton.jit
def firsts(
    q, qs, g, gs, go, gos, Mq, first, grad_delta, H, T, N, dk, dv,
    C: tl.constexpr, R: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, HEAD: tl.constexpr,
    ERASES: tl.constexpr, EARLY_READ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """first[n] = (q decayed from the start)^T go, grad_delta = Mq^T go. Program (chunk, head, values)."""
    n, G = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    q, g = head_of(q, qs, G, H), head_of(g, gs, G, H)
    at = n * tl.num_programs(1) + G
    r, dv_ = tl.arange(0, BL), tl.program_id(2) * BV + tl.arange(0, BV)
    t, row, ok, reads, _ = rows_of(n, r, T, C, R, EARLY_READ)
    y = tile(head_of(go, gos, G, H), gos[2], t, reads, dv_, dv)
    for k0 in range(0, dk, BK):
        d = k0 + tl.arange(0, BK)
        x = tile(q, qs[2], t, reads, d, dk) * from_start(g, gs[2], n, r, EARLY_READ, T, C, R, d, dk, HEAD)
        put(first + at * dk * dv, dv, d, d < dk, dv_, dv, tl.dot(tl.trans(x), y, input_precision=PRECISION))
    if ERASES:
        every = (r[:, None] >= 0) & (r[None, :] >= 0)
        x = tl.trans(square(Mq + at * BL * BL, r, r, every, BL))
        put(grad_delta + G * T * R * dv, dv, row, ok, dv_, dv, tl.dot(x, y, input_precision=PRECISION))


@triton.jit
def states_back(
    whole, probe, end, first, grad_delta, grad_last, later, grad_start, T, N, dk, dv,
    C: tl.constexpr, R: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, ERASES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """later[n], the gradient of the state after each chunk; grad_delta becomes whole. Program (values, head)."""
    G, d = tl.program_id(1).to(tl.int64), tl.arange(0, BK)
    dv_ = tl.program_id(0) * BV + tl.arange(0, BV)
    heads, r, key = tl.num_programs(1), tl.arange(0, BL), d < dk
    carry = tile(grad_last + G * dk * dv, dv, d, key, dv_, dv)
    for back in range(N):
        n = G * 0 + (N - 1 - back)  # int64
        _, row, ok, _, _ = rows_of(n, r, T, C, R, False)
        at = (n * heads + G) * dk
        put(later + at * dv, dv, d, key, dv_, dv, carry)
        earlier = tile(first + at * dv, dv, d, key, dv_, dv)
        earlier += carry * tl.load(whole + at + d, mask=key, other=0.0)[:, None]
        if ERASES:
            y = tile(grad_delta + G * T * R * dv, dv, row, ok, dv_, dv)
            y += tl.dot(tile(end + G * T * R * dk, dk, row, ok, d, dk), carry, input_precision=PRECISION)
            put(grad_delta + G * T * R * dv, dv, row, ok, dv_, dv, y)
            x = tl.trans(tile(probe + G * T * R * dk, dk, row, ok, d, dk))
            earlier -= tl.dot(x, y, input_precision=PRECISION)
        carry = earlier
    put(grad_start + G * dk * dv, dv, d, key, dv_, dv, carry)


@triton.jit
def targets(
    Z, grad_delta, rho, T, dv,
    C: tl.constexpr, R: tl.constexpr, BL: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """rho = Z^T grad_delta. Program (chunk, head, values)."""
    n, G = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    r, dv_ = tl.arange(0, BL), tl.program_id(2) * BV + tl.arange(0, BV)
    _, row, ok, _, _ = rows_of(n, r, T, C, R, False)
    every = (r[:, None] >= 0) & (r[None, :] >= 0)
    z = tl.trans(square(Z + (n * tl.num_programs(1) + G) * BL * BL, r, r, every, BL))
    y = tile(grad_delta + G * T * R * dv, dv, row, ok, dv_, dv)
    put(rho + G * T * R * dv, dv, row, ok, dv_, dv, tl.dot(z, y, input_precision=PRECISION))


@triton.jit
def values(
    go, gos, Mq_add, Me_add, end_add, later, rho, gv, H, T, dk, dv,
    C: tl.constexpr, R: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, ERASES: tl.constexpr,
    EARLY_READ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """gv = Mq_add^T go + end_add later - Me_add^T rho. Program (chunk, head, values)."""
    n, G = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = n * tl.num_programs(1) + G
    r, dv_ = tl.arange(0, BL), tl.program_id(2) * BV + tl.arange(0, BV)
    t, row, ok, reads, _ = rows_of(n, r, T, C, R, EARLY_READ)
    every = (r[:, None] >= 0) & (r[None, :] >= 0)
    y = tile(head_of(go, gos, G, H), gos[2], t, reads, dv_, dv)
    found = tl.dot(tl.trans(square(Mq_add + at * BL * BL, r, r, every, BL)), y, input_precision=PRECISION)
    if ERASES:
        y = tile(rho + G * T * R * dv, dv, row, ok, dv_, dv)
        found -= tl.dot(tl.trans(square(Me_add + at * BL * BL, r, r, every, BL)), y, input_precision=PRECISION)
    for k0 in range(0, dk, BK):
        d = k0 + tl.arange(0, BK)
        x = tile(end_add + G * T * R * dk, dk, row, ok, d, dk)
        found += tl.dot(x, tile(later + at * dk * dv, dv, d, d < dk, dv_, dv), input_precision=PRECISION)
    put(gv + G * T * R * dv, dv, row, ok, dv_, dv, found)


@triton.jit
def matrices(
    go, gos, rho, written, ws, gMq, gMe, H, T, dv,
    C: tl.constexpr, R: tl.constexpr, BL: tl.constexpr, BV: tl.constexpr, ERASES: tl.constexpr,
    EARLY_READ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """gMq = go written^T, gMe = -rho written^T, where a row may see a column. Program (chunk, head)."""
    n, G = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    r = tl.arange(0, BL)
    t, row, ok, reads, _ = rows_of(n, r, T, C, R, EARLY_READ)
    go, written = head_of(go, gos, G, H), head_of(written, ws, G, H)
    mq, me = tl.zeros([BL, BL], tl.float32), tl.zeros([BL, BL], tl.float32)
    for v0 in range(0, dv, BV):
        d = v0 + tl.arange(0, BV)
        x = tl.trans(tile(written, ws[2], row, ok, d, dv))
        mq += tl.dot(tile(go, gos[2], t, reads, d, dv), x, input_precision=PRECISION)
        if ERASES:
            me -= tl.dot(tile(rho + G * T * R * dv, dv, row, ok, d, dv), x, input_precision=PRECISION)
    at = (n * tl.num_programs(1) + G) * BL * BL + r[:, None] * BL + r[None, :]
    seen = r[:, None] > r[None, :] if EARLY_READ else r[:, None] >= r[None, :]
    tl.store(gMq + at, tl.where(seen, mq, 0.0))
    if ERASES:
        tl.store(gMe + at, tl.where(r[:, None] > r[None, :], me, 0.0))


@triton.jit
def after(x, r, early: tl.constexpr):
    """Sums of x [rows, d] over the rows from each row on, or after it: the log-decays those rows contain."""
    upper = r[:, None] < r[None, :] if early else r[:, None] <= r[None, :]
    return tl.dot(tl.where(upper, 1.0, 0.0), x, input_precision="ieee")


@triton.jit
def before(x, r):
    """Sums of x [rows, d] over the rows before each row."""
    return tl.dot(tl.where(r[:, None] > r[None, :], 1.0, 0.0), x, input_precision="ieee")


@triton.jit
def add_decay(gg, flow, G, n, t, decays, d, T, dk, HEAD: tl.constexpr, first: tl.constexpr):
    """Store or add gradients of log-decays [rows, d]; per head, the part of this block of channels."""
    if HEAD:
        to = gg + (tl.program_id(2) * tl.num_programs(1) + G) * T + t
        found = tl.sum(flow, 1)
        if not first:
            found += tl.load(to, mask=decays, other=0.0)
        tl.store(to, found, mask=decays)
    elif first:
        put(gg + G * T * dk, dk, t, decays, d, dk, flow)
    else:
        add(gg + G * T * dk, dk, t, decays, d, dk, flow)


@triton.jit
def starts_back(
    q, qs, e, es, g, gs, go, gos, rho, S, later, whole, gq, ge, gg, H, T, dk, dv,
    C: tl.constexpr, R: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, HEAD: tl.constexpr,
    ERASES: tl.constexpr, EARLY_ERASE: tl.constexpr, EARLY_READ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What reads and erases of the chunk's first state, and its passing on, mean for q, e and g: stored, not added.

    Program (chunk, head, keys).
    """
    n, G = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    q, g, go = head_of(q, qs, G, H), head_of(g, gs, G, H), head_of(go, gos, G, H)
    at = (n * tl.num_programs(1) + G) * dk
    r, d = tl.arange(0, BL), tl.program_id(2) * BK + tl.arange(0, BK)
    t, row, ok, reads, decays = rows_of(n, r, T, C, R, EARLY_READ)
    read, erase = tl.zeros([BL, BK], tl.float32), tl.zeros([BL, BK], tl.float32)
    passed = tl.zeros([BK], tl.float32)
    for v0 in range(0, dv, BV):
        dv_ = v0 + tl.arange(0, BV)
        x = tile(S + at * dv, dv, d, d < dk, dv_, dv)
        passed += tl.sum(x * tile(later + at * dv, dv, d, d < dk, dv_, dv), 1)
        x = tl.trans(x)
        read += tl.dot(tile(go, gos[2], t, reads, dv_, dv), x, input_precision=PRECISION)
        if ERASES:
            erase -= tl.dot(tile(rho + G * T * R * dv, dv, row, ok, dv_, dv), x, input_precision=PRECISION)
    read *= from_start(g, gs[2], n, r, EARLY_READ, T, C, R, d, dk, HEAD)
    put(gq + G * T * dk, dk, t, reads, d, dk, read)
    flow = after(read * tile(q, qs[2], t, reads, d, dk), r, EARLY_READ)
    flow += (passed * tl.load(whole + at + d, mask=d < dk, other=0.0))[None, :]
    if ERASES:
        erase *= from_start(g, gs[2], n, r, EARLY_ERASE, T, C, R, d, dk, HEAD)
        put(ge + G * T * R * dk, dk, row, ok, d, dk, erase)
        flow += after(erase * tile(head_of(e, es, G, H), es[2], row, ok, d, dk), r, EARLY_ERASE)
    add_decay(gg, flow, G, n, t, decays, d, T, dk, HEAD, True)


@triton.jit
def ends_back(written, ws, later, G, H, n, row, ok, d, dk, dv, BL: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    """Gradient of columns decayed to the chunk's end."""
    at = (n * tl.num_programs(1) + G) * dk
    found = tl.zeros([BL, BK], tl.float32)
    for v0 in range(0, dv, BV):
        dv_ = v0 + tl.arange(0, BV)
        x = tl.trans(tile(later + at * dv, dv, d, d < dk, dv_, dv))
        found += tl.dot(tile(head_of(written, ws, G, H), ws[2], row, ok, dv_, dv), x, input_precision=PRECISION)
    return found


@triton.jit
def head_back(
    q, qs, e, es, col, cs, g, gs, written, ws, later, Mq, Me, gMq, gMe, gq, ge, gc, gg, H, T, dk, dv,
    C: tl.constexpr, R: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, ERASES: tl.constexpr,
    EARLY_ERASE: tl.constexpr, EARLY_READ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One decay per head: store gradients of columns, add to those of q, e and g. Program (chunk, head, keys)."""
    n, G = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    q, col, g = head_of(q, qs, G, H), head_of(col, cs, G, H), head_of(g, gs, G, H)
    M = (n * tl.num_programs(1) + G) * BL * BL
    r, d = tl.arange(0, BL), tl.program_id(2) * BK + tl.arange(0, BK)
    t, row, ok, reads, decays = rows_of(n, r, T, C, R, EARLY_READ)
    every = (r[:, None] >= 0) & (r[None, :] >= 0)
    x = tile(col, cs[2], row, ok, d, dk)
    found = ends_back(written, ws, later, G, H, n, row, ok, d, dk, dv, BL, BK, BV, PRECISION)
    found *= tl.exp(decay_sum(g, gs[2], n, r + 1, 0, C * R, T, C, R, r, dk, True, True))
    flow = before(found * x, r)
    grad = square(gMq + M, r, r, every, BL)
    inside = after(grad * square(Mq + M, r, r, every, BL), r, EARLY_READ)
    grad *= table(g, gs[2], n, r, EARLY_READ, not EARLY_READ, T, C, R)
    add(gq + G * T * dk, dk, t, reads, d, dk, tl.dot(grad, x, input_precision=PRECISION))
    found += tl.dot(tl.trans(grad), tile(q, qs[2], t, reads, d, dk), input_precision=PRECISION)
    if ERASES:
        grad = square(gMe + M, r, r, every, BL)
        inside += after(grad * square(Me + M, r, r, every, BL), r, EARLY_ERASE)
        grad *= table(g, gs[2], n, r, EARLY_ERASE, False, T, C, R)
        add(ge + G * T * R * dk, dk, row, ok, d, dk, tl.dot(grad, x, input_precision=PRECISION))
        y = tile(head_of(e, es, G, H), es[2], row, ok, d, dk)
        found += tl.dot(tl.trans(grad), y, input_precision=PRECISION)
    put(gc + G * T * R * dk, dk, row, ok, d, dk, found)
    # Every block of channels finds the same inside the matrices: the first hands it on.
    inside = tl.sum(tl.where(r[:, None] > r[None, :], inside, 0.0), 1) * (tl.program_id(2) == 0)
    total = tl.sum(flow, 1) + inside
    add_decay(gg, total[:, None], G, n, t, decays, d, T, dk, True, False)


@triton.jit
def channel_back(
    q, qs, e, es, col, cs, g, gs, written, ws, later, gMq, gMe, gq, ge, gc, gg, H, T, dk, dv,
    C: tl.constexpr, R: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, RUN: tl.constexpr,
    ERASES: tl.constexpr, EARLY_ERASE: tl.constexpr, EARLY_READ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One decay per channel, rows against the runs before their own: add to all. Program (chunk, head, keys)."""
    n, G = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    q, col, g = head_of(q, qs, G, H), head_of(col, cs, G, H), head_of(g, gs, G, H)
    if ERASES:
        e = head_of(e, es, G, H)
    M = (n * tl.num_programs(1) + G) * BL * BL
    r, d = tl.arange(0, BL), tl.program_id(2) * BK + tl.arange(0, BK)
    t, row, ok, reads, decays = rows_of(n, r, T, C, R, EARLY_READ)
    found = ends_back(written, ws, later, G, H, n, row, ok, d, dk, dv, BL, BK, BV, PRECISION)
    found *= tl.exp(decay_sum(g, gs[2], n, r + 1, 0, C * R, T, C, R, d, dk, False, True))
    flow = before(found * tile(col, cs[2], row, ok, d, dk), r)
    read, erase = tl.zeros([BL, BK], tl.float32), tl.zeros([BL, BK], tl.float32)
    for run in range(0, BL - RUN, RUN):
        i = run + tl.arange(0, RUN)
        _, column, there, _, _ = rows_of(n, i, T, C, R, EARLY_READ)
        later_rows = r >= run + RUN
        below = later_rows[:, None] & (i[None, :] >= 0)
        low = tl.exp(decay_sum(g, gs[2], n, i + 1, 0, run + RUN, T, C, R, d, dk, False, True))
        x = tile(col, cs[2], column, there, d, dk) * low
        grad = square(gMq + M, r, i, below, BL)
        up = tl.exp(decay_sum(g, gs[2], n, r - EARLY_READ, run + RUN, C * R, T, C, R, d, dk, False, False))
        y = tile(q, qs[2], t, reads, d, dk) * up
        back = tl.dot(grad, x, input_precision=PRECISION)
        read += back * up
        contained = after(back * y, r, EARLY_READ)
        columns = tl.dot(tl.trans(grad), y, input_precision=PRECISION)
        if ERASES:
            grad = square(gMe + M, r, i, below, BL)
            up = tl.exp(decay_sum(g, gs[2], n, r - EARLY_ERASE, run + RUN, C * R, T, C, R, d, dk, False, False))
            y = tile(e, es[2], row, ok, d, dk) * up
            back = tl.dot(grad, x, input_precision=PRECISION)
            erase += back * up
            contained += after(back * y, r, EARLY_ERASE)
            columns += tl.dot(tl.trans(grad), y, input_precision=PRECISION)
        flow += tl.where(later_rows[:, None], contained, 0.0)
        # Ones put the run's rows among the chunk's: itself, and those before each row of the run.
        itself = tl.where(r[:, None] == i[None, :], 1.0, 0.0)
        found += tl.dot(itself, columns * low, input_precision="ieee")
        earlier = tl.where((r[:, None] > i[None, :]) & (r < run + RUN)[:, None], 1.0, 0.0)
        flow += tl.dot(earlier, columns * x, input_precision="ieee")
    add(gq + G * T * dk, dk, t, reads, d, dk, read)
    if ERASES:
        add(ge + G * T * R * dk, dk, row, ok, d, dk, erase)
    add(gc + G * T * R * dk, dk, row, ok, d, dk, found)
    add_decay(gg, flow, G, n, t, decays, d, T, dk, False, False)


@triton.jit
def run_back(
    q, qs, e, es, col, cs, g, gs, gMq, gMe, gq, ge, gc, gg, H, T, dk,
    C: tl.constexpr, R: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr, RUN: tl.constexpr, ERASES: tl.constexpr,
    EARLY_ERASE: tl.constexpr, EARLY_READ: tl.constexpr,
):  # fmt: skip
    """One decay per channel, a run against itself from its last row on: store gradients of columns, add to the others.

    Program (chunk and run, head, keys).
    """
    n, G = (tl.program_id(0) // (BL // RUN)).to(tl.int64), tl.program_id(1).to(tl.int64)
    q, col, g = head_of(q, qs, G, H), head_of(col, cs, G, H), head_of(g, gs, G, H)
    if ERASES:
        e = head_of(e, es, G, H)
    M = (n * tl.num_programs(1) + G) * BL * BL
    start = tl.program_id(0) % (BL // RUN) * RUN
    i, d = tl.arange(0, RUN), tl.program_id(2) * BK + tl.arange(0, BK)
    _, column, there, _, _ = rows_of(n, start + i, T, C, R, EARLY_READ)
    x = tile(col, cs[2], column, there, d, dk)
    # grad: of the columns as they stand at row j; found: of the columns as they came.
    grad, found = tl.zeros([RUN, BK], tl.float32), tl.zeros([RUN, BK], tl.float32)
    for back in range(RUN):
        j = RUN - 1 - back
        t, row, ok, reads, decays = rows_of(n, start + j, T, C, R, EARLY_READ)
        upto = start + j + 1
        now = x * tl.exp(decay_sum(g, gs[2], n, start + i + 1, 0, upto, T, C, R, d, dk, False, True))
        if EARLY_READ or EARLY_ERASE:
            then = x * tl.exp(decay_sum(g, gs[2], n, start + i + 1, 0, upto - 1, T, C, R, d, dk, False, True))
        at = M + (start + j) * BL + start + i
        mq = tl.load(gMq + at)
        qj = line(q + t * qs[2], reads, d, dk)
        to_q, to_g = gq + (G * T + t) * dk, gg + (G * T + t) * dk
        if not EARLY_READ:
            grad += mq[:, None] * qj[None, :]
            add_line(to_q, reads, d, dk, tl.sum(mq[:, None] * now, 0))
        found = tl.where(i[:, None] == j, grad, found)
        grad = tl.where(i[:, None] == j, 0.0, grad)  # born here: earlier decays do not touch it
        if ERASES:
            me = tl.load(gMe + at)
            ej = line(e + row * es[2], ok, d, dk)
            to_e = ge + (G * T * R + row) * dk
            if EARLY_ERASE:
                add_line(to_e, ok, d, dk, tl.sum(me[:, None] * then, 0))
            else:
                grad += me[:, None] * ej[None, :]
                add_line(to_e, ok, d, dk, tl.sum(me[:, None] * now, 0))
        add_line(to_g, decays, d, dk, tl.sum(grad * now, 0))
        grad *= tl.exp(line(g + t * gs[2], decays, d, dk))[None, :]
        if ERASES and EARLY_ERASE:
            grad += me[:, None] * ej[None, :]
        if EARLY_READ:
            grad += mq[:, None] * qj[None, :]
            add_line(to_q, reads, d, dk, tl.sum(mq[:, None] * then, 0))
    put(gc + G * T * R * dk, dk, column, there, d, dk, found)
