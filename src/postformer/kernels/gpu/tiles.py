"""What the Triton kernels share: where a program's rows lie, tiles of them, and sums of log-decays.

Imports Triton; nothing else of the package imports this unless Triton is there. A chunk has C tokens of R rows (its
micro-steps), padded to BL. Padding rows load as zeros, which are identity tokens.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportOptionalOperand=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

RUN = 16
"""Rows walked one by one where channels decay by themselves; also the smallest side of a product on a GPU."""


@triton.jit
def head_of(x, s, G, H):
    """x from where batch row G // H and head G % H begin; s are strides of batch, head and row."""
    return x + (G // H) * s[0] + (G % H) * s[1]


@triton.jit
def rows_of(n, r, T, C: tl.constexpr, R: tl.constexpr, EARLY_READ: tl.constexpr):
    """(token, row, is one, reads here, decays here) of rows r of chunk n."""
    t = n * C + r // R
    ok = (r >= 0) & (r < C * R) & (t < T)
    return t, n * (C * R) + r, ok, ok & (r % R == (0 if EARLY_READ else R - 1)), ok & (r % R == 0)


@triton.jit
def tile(x, stride, rows, ok, d, width):
    """[rows, d] in fp32, zero where there is none."""
    at = x + rows[:, None] * stride + d[None, :]
    return tl.load(at, mask=ok[:, None] & (d < width)[None, :], other=0.0).to(tl.float32)


@triton.jit
def put(x, stride, rows, ok, d, width, value):
    tl.store(x + rows[:, None] * stride + d[None, :], value, mask=ok[:, None] & (d < width)[None, :])


@triton.jit
def add(x, stride, rows, ok, d, width, value):
    """Add to what an earlier kernel stored."""
    put(x, stride, rows, ok, d, width, tile(x, stride, rows, ok, d, width) + value)


@triton.jit
def line(x, here, d, width):
    """[d] in fp32 at x, zero unless here."""
    # Not `here & (d < width)`: the interpreter makes integers of a truth value and a block of them.
    return tl.load(x + d, mask=d < tl.where(here, width, 0), other=0.0).to(tl.float32)


@triton.jit
def add_line(x, here, d, width, value):
    tl.store(x + d, line(x, here, d, width) + value, mask=d < tl.where(here, width, 0))


@triton.jit
def square(M, i, j, ok, BL: tl.constexpr):
    """M[i, j] of a chunk's [BL, BL] matrix in scratch memory."""
    return tl.load(M + i[:, None] * BL + j[None, :], mask=ok, other=0.0)


@triton.jit
def decay_sum(g, stride, n, r, low, high, T, C: tl.constexpr, R: tl.constexpr, d, dk, HEAD: tl.constexpr,
              BACK: tl.constexpr):  # fmt: skip
    """Sums of the log-decays of those rows r that lie in [low, high), from the first on (BACK: from the last on).

    [rows, 1] per head, [rows, d] per channel. Numbers of one sign are added, so no sum is positive.
    """
    t = n * C + r // R
    here = (r >= low) & (r < high) & (r >= 0) & (r < C * R) & (r % R == 0) & (t < T)
    if HEAD:
        return tl.cumsum(tl.load(g + t * stride, mask=here, other=0.0), 0, reverse=BACK)[:, None]
    else:
        return tl.cumsum(tile(g, stride, t, here, d, dk), 0, reverse=BACK)


@triton.jit
def from_start(g, stride, n, r, early: tl.constexpr, T, C: tl.constexpr, R: tl.constexpr, d, dk, HEAD: tl.constexpr):
    """exp(sum of log-decays from the chunk's start up to rows r, or to the row before)."""
    if early:
        return tl.exp(decay_sum(g, stride, n, r - 1, 0, C * R, T, C, R, d, dk, HEAD, False))
    else:
        return tl.exp(decay_sum(g, stride, n, r, 0, C * R, T, C, R, d, dk, HEAD, False))


@triton.jit
def table(g, stride, n, r, early: tl.constexpr, seen: tl.constexpr, T, C: tl.constexpr, R: tl.constexpr):
    """One decay per head: [row, column] -> exp(sum of log-decays after the column up to the row), else 0.

    early: up to the row before. seen: rows see themselves.
    """
    j = r - 1 if early else r
    t = n * C + j // R
    here = (j >= 0) & (j < C * R) & (j % R == 0) & (t < T)
    g = tl.load(g + t * stride, mask=here, other=0.0)
    summed = tl.cumsum(tl.where(j[:, None] > r[None, :], g[:, None], 0.0), 0)
    visible = r[:, None] >= r[None, :] if seen else r[:, None] > r[None, :]
    return tl.where(visible, tl.exp(summed), 0.0)
