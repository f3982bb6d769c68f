"""Mamba's selective scan as Triton kernels: a tile of tokens, channels and states at a time, never all of it in memory.

Chunks of L tokens are scanned in parallel from a state of zero, chained one after another, and scanned again from the
states so found. What a token finds in memory comes from a scan that is late by one token, not from a difference.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportOptionalOperand=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def then(a, b, c, d):
    """x -> a x + b, then x -> c x + d."""
    return a * c, b * c + d


@triton.jit
def plane(x, s, b, t, ok, j, width):
    """[tokens, j] in fp32 of x [B, T, width], zero where there is none."""
    at = x + b * s[0] + t[:, None] * s[1] + j[None, :]
    return tl.load(at, mask=ok[:, None] & (j < width)[None, :], other=0.0).to(tl.float32)


@triton.jit
def put_plane(x, b, t, ok, j, T, width, value):
    tl.store(x + (b * T + t[:, None]) * width + j[None, :], value, mask=ok[:, None] & (j < width)[None, :])


@triton.jit
def entries(n, b, d, s, D, N):
    """Where a state [D, N] of chunk n and batch row b lies, and which of its entries there are."""
    at = ((n * tl.num_programs(1) + b) * D + d[:, None]) * N + s[None, :]
    return at, (d < D)[:, None] & (s < N)[None, :]


@triton.jit
def steps(x, xs, dt, dts, Bm, Bs, reset, A, b, t, ok, d, s, T, D, N, RESETS: tl.constexpr):
    """(decay, input) [tokens, channels, states] of tokens t; identity where there is none."""
    step = plane(dt, dts, b, t, ok, d, D)
    decay = tl.exp(step[:, :, None] * A[None, :, :])
    if RESETS:
        again = tl.load(reset + b * T + t, mask=ok, other=0) != 0
        decay = tl.where(again[:, None, None], 0.0, decay)
    u = step * plane(x, xs, b, t, ok, d, D)
    return decay, u[:, :, None] * plane(Bm, Bs, b, t, ok, s, N)[:, None, :]


@triton.jit
def ends(
    x, xs, dt, dts, A, Bm, Bs, reset, passed, end, T, D, N,
    L: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, RESETS: tl.constexpr,
):  # fmt: skip
    """What a chunk makes of the state before it: passed * state + end. Program (chunk, batch row, channels)."""
    n, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    d, s, i = tl.program_id(2) * BD + tl.arange(0, BD), tl.arange(0, BN), tl.arange(0, L)
    A_ = tl.load(A + d[:, None] * N + s[None, :], mask=(d < D)[:, None] & (s < N)[None, :], other=0.0)
    t = n * L + i
    decay, put = steps(x, xs, dt, dts, Bm, Bs, reset, A_, b, t, t < T, d, s, T, D, N, RESETS)
    decay, put = tl.associative_scan((decay, put), 0, then)
    at, there = entries(n, b, d, s, D, N)
    last = (i == L - 1)[:, None, None]
    tl.store(passed + at, tl.sum(tl.where(last, decay, 0.0), 0), mask=there)
    tl.store(end + at, tl.sum(tl.where(last, put, 0.0), 0), mask=there)


@triton.jit
def chain(passed, end, first, kept, last, chunks, size, BACK: tl.constexpr, BLOCK: tl.constexpr):
    """state = passed[n] * state + end[n] over the chunks (BACK: from the last one), kept[n] before each."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    now = tl.load(first + i, mask=i < size, other=0.0)
    for step in range(chunks):
        at = (i * 0 + (chunks - 1 - step if BACK else step)) * size + i
        tl.store(kept + at, now, mask=i < size)
        now = now * tl.load(passed + at, mask=i < size, other=0.0) + tl.load(end + at, mask=i < size, other=0.0)
    tl.store(last + i, now, mask=i < size)


@triton.jit
def outputs(
    x, xs, dt, dts, A, Bm, Bs, Cm, Cs, reset, start, y, T, D, N,
    L: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, RESETS: tl.constexpr,
):  # fmt: skip
    """y from the states before the chunks. Program (chunk, batch row, channels)."""
    n, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    d, s, i = tl.program_id(2) * BD + tl.arange(0, BD), tl.arange(0, BN), tl.arange(0, L)
    at, there = entries(n, b, d, s, D, N)
    A_ = tl.load(A + d[:, None] * N + s[None, :], mask=there, other=0.0)
    t = n * L + i
    decay, put = steps(x, xs, dt, dts, Bm, Bs, reset, A_, b, t, t < T, d, s, T, D, N, RESETS)
    decay, put = tl.associative_scan((decay, put), 0, then)
    h = decay * tl.load(start + at, mask=there, other=0.0)[None, :, :] + put
    found = tl.sum(h * plane(Cm, Cs, b, t, t < T, s, N)[:, None, :], 2)
    put_plane(y, b, t, t < T, d, T, D, found)


@triton.jit
def back(
    x, xs, dt, dts, A, Bm, Bs, Cm, Cs, reset, gy, gys, start, later, out, gx, gdt, gA, gB, gC, T, D, N,
    L: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, RESETS: tl.constexpr, GRADIENTS: tl.constexpr,
):  # fmt: skip
    """Without GRADIENTS, out: gradient of the state before each chunk from what is read inside it. With them, those of
    all inputs, given the states before (start) and the gradients of those after (later); gB, gC are of these channels,
    gA of this chunk. Program (chunk, batch row, channels).
    """
    n, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    d, s, i = tl.program_id(2) * BD + tl.arange(0, BD), tl.arange(0, BN), tl.arange(0, L)
    at, there = entries(n, b, d, s, D, N)
    A_ = tl.load(A + d[:, None] * N + s[None, :], mask=there, other=0.0)
    t = n * L + i
    ok = t < T
    decay, put = steps(x, xs, dt, dts, Bm, Bs, reset, A_, b, t, ok, d, s, T, D, N, RESETS)
    y_ = plane(gy, gys, b, t, ok, d, D)
    C_ = plane(Cm, Cs, b, t, ok, s, N)
    # Of a token's state: what it is read with, and what the next token passes on.
    next_ok = (i < L - 1) & (t + 1 < T)
    passing, _ = steps(x, xs, dt, dts, Bm, Bs, reset, A_, b, t + 1, next_ok, d, s, T, D, N, RESETS)
    passing, total = tl.associative_scan((passing, y_[:, :, None] * C_[:, None, :]), 0, then, reverse=True)
    if not GRADIENTS:
        tl.store(out + at, tl.sum(tl.where((i == 0)[:, None, None], decay * total, 0.0), 0), mask=there)
    else:
        total += passing * tl.load(later + at, mask=there, other=0.0)[None, :, :]
        earlier = (i > 0) & (t - 1 < T)
        kept, found = steps(x, xs, dt, dts, Bm, Bs, reset, A_, b, t - 1, earlier, d, s, T, D, N, RESETS)
        kept, found = tl.associative_scan((kept, found), 0, then)
        found = decay * (kept * tl.load(start + at, mask=there, other=0.0)[None, :, :] + found)
        to = (tl.program_id(2) * tl.num_programs(1) + b) * T
        put_plane(gC + to * N, 0, t, ok, s, T, N, tl.sum((found + put) * y_[:, :, None], 1))
        step, x_ = plane(dt, dts, b, t, ok, d, D), plane(x, xs, b, t, ok, d, D)
        put_plane(gB + to * N, 0, t, ok, s, T, N, tl.sum(total * (step * x_)[:, :, None], 1))
        grad_u = tl.sum(total * plane(Bm, Bs, b, t, ok, s, N)[:, None, :], 2)
        put_plane(gx, b, t, ok, d, T, D, grad_u * step)
        found *= total  # the gradient of the exponent
        put_plane(gdt, b, t, ok, d, T, D, grad_u * x_ + tl.sum(found * A_[None, :, :], 2))
        tl.store(gA + at, tl.sum(found * step[:, :, None], 0), mask=there)
