"""Inside chunks where each key channel decays by itself: one matrix of all rows against all columns, and its mirror.

Equations and legend as in `gdr.chunk`. Whatever looks into a chunk is a row (reads q, erases e), what is looked at is a
column (w and k), and one matrix M holds them all: M[a t, b i] = sum_d row_a[t,d] column_b[i,d] exp(E_d(i, t)).

M is made of blocks that join neighbouring runs of s = 1, 2, 4, ... tokens: the decay from column to row is that from
the column to the end of the lower run, times that from the start of the upper run to the row, so that each block is one
product of scaled rows and scaled columns. Both factors are products of numbers exp(g) <= 1, each made once from those
of half its length; those of the whole chunk, s = C, tie rows and columns to the states. Nothing is divided by a decay,
no two sums are subtracted, and nothing of size [C, C, d] is formed.

A row that looks before its token's decay is the row of the token before it, seen from there after everything; so such
rows are moved up by one inside the chunk (the first to the end, where it sees nothing but the chunk's first state).

The backward pass forms M again and mirrors it; gradients of log-decays are sums of (gradient * value) over all factors,
handed from factors of length 2s to those of length s that they are made of.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _halves(x: Tensor, s: int) -> tuple[Tensor, Tensor]:
    """Views [n, C / 2s, K, s, d] of the lower and upper runs of x [n, K, C, d]."""
    x = x.unflatten(2, (-1, 2, s)).transpose(1, 2)
    return x.select(3, 0), x.select(3, 1)


def _blocks(M: Tensor, s: int) -> Tensor:
    """A view [n, C / 2s, Kr, s, Kc, s] of the blocks of M [n, Kr, C, Kc, C] that join runs of s tokens."""
    M = M.unflatten(4, (-1, 2, s)).unflatten(2, (-1, 2, s))
    return M.select(3, 1).select(6, 0).diagonal(dim1=2, dim2=5).permute(0, 5, 1, 2, 3, 4)


def view_chunks(x: Tensor, p: slice, N: int, R: int) -> Tensor:
    """A view [chunks, B, H, R, C, d] of chunks p of x [B, H, N * C * R, d]."""
    return x.unflatten(2, (N, -1, R))[:, :, p].permute(2, 0, 1, 4, 3, 5)


def move_up(into: Tensor, x: Tensor, early: bool) -> None:
    """Copy [..., R, C, d]; if early, the first kind is moved up by one token."""
    if early:
        into[..., 0, :-1, :] = x[..., 0, 1:, :]
        into[..., 0, -1, :] = x[..., 0, 0, :]
        into, x = into[..., 1:, :, :], x[..., 1:, :, :]
    into.copy_(x)


def move_down(into: Tensor, x: Tensor, early: bool) -> None:
    """Inverse of `move_up`."""
    if early:
        into[..., 0, 1:, :] = x[..., 0, :-1, :]
        into[..., 0, 0, :] = x[..., 0, -1, :]
        into, x = into[..., 1:, :, :], x[..., 1:, :, :]
    into.copy_(x)


def put_chunks(x: Tensor | None, p: slice, N: int, R: int, part: Tensor, early: bool = False) -> None:
    """Write chunks p of x from part [n, R, C, d], unless nobody wants x."""
    if x is not None:
        into = view_chunks(x, p, N, R)
        move_down(into, part.unflatten(0, into.shape[:3]), early)


def by_token(x: Tensor, R: int) -> Tensor:
    """A view [n, R, C, d] of x [n, C * R, d], in which a token's micro-steps follow one another."""
    return x.unflatten(1, (-1, R)).transpose(1, 2)


def tokens(x: Tensor) -> Tensor:
    """[n, R, C, d] -> [n, C * R, d], a token's micro-steps one after the other."""
    return x[:, 0] if x.shape[1] == 1 else x.transpose(1, 2).flatten(1, 2)


def _weigh(x: Tensor, weights: Tensor, out: Tensor) -> None:
    """out[:, :, i] = sum_j weights[:, :, j, i] x[:, :, j]: a product too thin for a matrix library."""
    torch.mul(weights[:, :, 0, :, None, None], x[:, :, :1], out=out)
    for j in range(1, x.shape[2]):
        out.addcmul_(weights[:, :, j, :, None, None], x[:, :, j : j + 1])


class _Level:
    """Views for joining runs of s tokens."""

    def __init__(self, chunks: Chunks, s: int):
        n, Kr, C, d = chunks.rows.shape
        Kc, new, half = chunks.cols.shape[1], chunks.new, C // (2 * s)
        self.s = s
        self.P_low, self.P_up = _halves(chunks.P, s)
        self.Q_low = _halves(chunks.Q, s)[0]
        self.rows, self.cols = _halves(chunks.rows, s)[1], _halves(chunks.cols, s)[0]
        shapes = [(n, half, K, s, d) for K in (1, 1, Kr, Kc)]  # of the same size for every s
        memory = chunks.half if chunks.half else [new(shape) for shape in shapes]
        self.from_start, self.to_end, self.up, self.low = (x.view(y) for x, y in zip(memory, shapes, strict=True))
        self.up_, self.low_ = (x.view(-1, x.shape[2] * s, d) for x in (self.up, self.low))
        self.block = new(n * half, Kr * s, Kc * s)
        self.blocks = self.block.view(n, half, Kr, s, Kc, s)
        self.into = _blocks(chunks.M, s)

    def forward(self) -> None:
        """The blocks of this level; then P and Q are made those of the next."""
        s = self.s
        self.from_start.copy_(self.P_up)
        torch.mul(self.rows, self.from_start, out=self.up)
        if s == 1:
            self.low.copy_(self.cols)
            self.Q_low.copy_(self.P_up)
        else:
            self.to_end.copy_(self.Q_low)
            torch.mul(self.cols, self.to_end, out=self.low)
            self.Q_low.mul_(self.P_up[..., -1:, :])
        self.P_up.mul_(self.P_low[..., -1:, :])
        torch.bmm(self.up_, self.low_.mT, out=self.block)
        self.into.copy_(self.blocks)

    def prepare_backward(self, chunks: Chunks) -> None:
        s = self.s
        self.grad_up, self.grad_low = chunks.grad_half[0].view_as(self.up), chunks.grad_half[1].view_as(self.low)
        self.grad_up_, self.grad_low_ = self.grad_up.view_as(self.up_), self.grad_low.view_as(self.low_)
        self.HP_low, self.HP_up = _halves(chunks.HP, s)
        self.HQ_low = _halves(chunks.HQ, s)[0]
        self.grad_rows, self.grad_cols = _halves(chunks.grad_rows, s)[1], _halves(chunks.grad_cols, s)[0]
        self.grad_into = _blocks(chunks.grad_M, s)

    def backward(self) -> None:
        """HP and HQ are made those of this level from those of the next; then what the blocks add."""
        s = self.s
        self.HP_low[..., -1, :] += self.HP_up.sum(-2)
        self.HP_up[..., -1, :] += self.HQ_low.sum(-2)
        self.blocks.copy_(self.grad_into)
        if s == 1:
            weights = self.block.view(*self.up.shape[:3], -1)
            _weigh(self.low, weights.mT, self.grad_up)
            _weigh(self.up, weights, self.grad_low)
        else:
            torch.bmm(self.block, self.low_, out=self.grad_up_)
            torch.bmm(self.block.mT, self.up_, out=self.grad_low_)
        self.grad_rows.addcmul_(self.grad_up, self.from_start)
        for a in range(self.up.shape[2]):
            self.HP_up[:, :, 0].addcmul_(self.grad_up[:, :, a], self.up[:, :, a])
        if s == 1:
            self.grad_cols.add_(self.grad_low)
            return
        self.grad_cols.addcmul_(self.grad_low, self.to_end)
        for b in range(self.low.shape[2]):
            self.HQ_low[:, :, 0].addcmul_(self.grad_low[:, :, b], self.low[:, :, b])


class Chunks:
    """n chunks' rows and columns, their decays, and M: memory, and all that is elementwise in the channels.

    Some rows are moved up (`early`); `start` and M have them where they were moved to.
    """

    def __init__(self, n: int, C: int, d: int, dv: int, R: int, erases: bool, families: int, early: list[int], new,
                 backward: bool):  # fmt: skip
        Kr, Kc = 1 + R * erases, R * families
        self.new, self.R, self.early = new, R, early
        self.rows, self.cols = new(n, Kr, C, d), new(n, Kc, C, d)
        # Decays from the start of each token's run of s to after the token, and from there to the run's end.
        self.P, self.Q = new(n, 1, C, d), new(n, 1, C, d)
        self.M = new(n, Kr, C, Kc, C).zero_()
        self.matrix = self.M.view(n, Kr * C, Kc * C)
        # The backward pass wants what every level made, the forward pass does not.
        self.half = [] if backward else [new(n, C // 2, K, d) for K in (1, 1, Kr, Kc)]
        self.levels = [_Level(self, 1 << i) for i in range(C.bit_length() - 1)]
        self.from_start = new(n, Kr, C, d) if early else self.P
        self.start, self.end = new(n, Kr, C, d), new(n, Kc, C, d)
        self.whole = self.P[:, 0, -1, :, None]
        self.felt, self.written = new(n, Kr, C, dv), new(n, Kc, C, dv)
        self.felt_, self.written_ = (x.view(n, -1, dv) for x in (self.felt, self.written))
        if erases:
            self.plain = R == 1 and 1 not in early
            self.A = self.matrix[:, C:, :C] if self.plain else new(n, C * R, C * R).zero_()
            self.sides, self.solved = new(n, C * R, dv + d), new(n, C * R, dv + d)

    def seen(self):
        """(row kind, micro-steps): the row sees these first micro-steps of its own token, of w and of k."""
        for a in range(self.rows.shape[1]):
            steps = self.R if a == 0 or a in self.early else a - 1
            if steps:
                yield a, steps

    def _own(self, M: Tensor) -> Tensor:
        """Entries of M of a row with the columns of its own token [n, Kr, families, R, C]."""
        return M.unflatten(3, (-1, self.R)).diagonal(dim1=2, dim2=5)

    def _families(self, cols: Tensor) -> Tensor:
        return cols.unflatten(1, (-1, self.R))

    def load(self, p: slice, N: int, q, g, w, e, k) -> None:
        """Take chunks p and form everything of the forward pass."""
        R = self.R

        def view(x: Tensor, like: Tensor) -> Tensor:
            return x.unflatten(0, like.shape[:3])

        for x, into, steps, moved in (
            (q, self.rows[:, :1], 1, 0 in self.early),
            (e, self.rows[:, 1:], R, 1 in self.early),
            (w, self.cols[:, :R], R, False),
            (k, self.cols[:, -R:], R, False),
        ):
            if x is not None:
                x = view_chunks(x, p, N, steps)
                move_up(view(into, x), x, moved)
        x = view_chunks(g, p, N, 1)
        view(self.P, x).copy_(x)
        self.P.exp_()
        own = self._own(self.M)
        for a, steps in self.seen():
            cols = self._families(self.cols)[:, :, :steps]
            own[:, a, :, :steps] = (self.rows[:, a, None, None] * cols).sum(-1)
        self.Q.fill_(1)
        for level in self.levels:
            level.forward()
        if self.early:
            self.from_start.copy_(self.P)
            self.from_start[:, self.early, -1] = 1
            self.M[:, self.early, -1] = 0
        torch.mul(self.rows, self.from_start, out=self.start)
        torch.mul(self.cols, self.Q, out=self.end)
        if self.rows.shape[1] > 1 and not self.plain:
            R, C = self.R, self.M.shape[2]
            for r in range(R):  # the micro-step of A's columns
                into = self.A.view(-1, C * R, C, R)[..., r]
                move_down(by_token(into, R), self.M[:, 1:, :, r], 1 in self.early)

    def prepare_backward(self) -> None:
        new = self.new
        self.grad_start, self.grad_end = torch.empty_like(self.start), torch.empty_like(self.end)
        self.grad_rows, self.grad_cols = torch.empty_like(self.rows), torch.empty_like(self.cols)
        self.grad_M = torch.empty_like(self.M)
        self.HP, self.HQ = torch.empty_like(self.P), torch.empty_like(self.P)
        n, Kr, C, d = self.rows.shape
        self.grad_half = new(n, C // 2, Kr, d), new(n, C // 2, self.cols.shape[1], d)
        self.states, self.later = new(n, d, self.felt.shape[-1]), new(n, d, self.felt.shape[-1])
        for level in self.levels:
            level.prepare_backward(self)

    def backward(self, S: Tensor, later: Tensor) -> None:
        """grad_rows, grad_cols and HP (the gradient of g) from `felt`, `written` and both sides of the states."""
        (n, Kr, _, d), Kc = self.rows.shape, self.cols.shape[1]
        torch.bmm(self.felt_, self.written_.mT, out=self.grad_M.view_as(self.matrix))
        torch.bmm(self.felt_, S.mT, out=self.grad_start.view(n, -1, d))
        torch.bmm(self.written_, later.mT, out=self.grad_end.view(n, -1, d))
        if self.early:
            self.grad_M[:, self.early, -1] = 0
        torch.mul(self.grad_start, self.from_start, out=self.grad_rows)
        torch.mul(self.grad_end, self.Q, out=self.grad_cols)
        # HP and HQ: gradients of the logarithms of P and Q.
        HP, HQ = self.HP[:, 0], self.HQ[:, 0]
        if self.early:
            self.grad_start[:, self.early, -1] = 0
        torch.mul(self.grad_start[:, 0], self.start[:, 0], out=HP)
        for a in range(1, Kr):
            HP.addcmul_(self.grad_start[:, a], self.start[:, a])
        torch.mul(self.grad_end[:, 0], self.end[:, 0], out=HQ)
        for b in range(1, Kc):
            HQ.addcmul_(self.grad_end[:, b], self.end[:, b])
        HP[:, -1] += torch.mul(S, later, out=self.states).sum(-1).mul_(self.whole[..., 0])
        own = self._own(self.grad_M)
        for a, steps in self.seen():
            for f in range(Kc // self.R):
                for r in range(steps):
                    grad, b = own[:, a, f, r].unsqueeze(-1), f * self.R + r
                    self.grad_rows[:, a].addcmul_(grad, self.cols[:, b])
                    self.grad_cols[:, b].addcmul_(grad, self.rows[:, a])
        for level in reversed(self.levels):
            level.backward()
