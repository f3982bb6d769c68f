"""The same branch several times on one token: the states of its depths, and what each application sees.

state: each. Depth n has a state S^(n), written by the tokens that reach depth n; to the others it does not exist (the
recursion-wise caching of 2507.10524). state: first. Depth 1 writes S; at depth n > 1 token t reads S_t, as it was after
t had been written. A token alone reads the state that it has just left. With several tokens in one call, a list of keys
that holds them all is read again up to each (trait `rereads`); any other memory, and a list in which a document ends,
takes each token twice, in turn: as it was at depth 1, to be written, and as it is now, only to read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from postformer.block.depth.base import Depth, there
from postformer.block.depth.compaction import Flat, Rows, following
from postformer.contract.context import Context, along_time, placed
from postformer.contract.mixer import Out, Traits
from postformer.contract.state import State
from postformer.kernels.tape import recording, when


class Repeated(NamedTuple):
    """Around a mixer that has a state."""

    of: tuple[State, ...]
    """Of every depth, or of the first"""
    next: Tensor
    """[B, depths] int64: position after the last token that reached each"""


class Repeating(Depth):
    """Base of the kinds that run the branch up to `most` times."""

    def __init__(self, design: Any, site: Any, sublayer: Any, able: Traits, needs: frozenset[str]) -> None:
        super().__init__(design, site, sublayer, able, needs)
        self.depths: int = design.most if design.state == "each" else 1
        # With one step there is nothing to decide.
        self.gate = site.linear("gate", self.width, 1, bias=True, role="gate") if design.decisions else None

    def starting_at(self, value: float) -> None:
        """The bias of the gate: what it says before anything is learned."""
        if self.gate is not None:
            torch.nn.init.constant_(self.gate.bias, value)

    def initial(self, batch: int, condition: Tensor | None = None) -> State:
        if not self.able.stateful:
            return None
        device = next(self.sublayer.parameters()).device
        return Repeated(tuple(self.of.initial(batch) for _ in range(self.depths)),
                        torch.zeros(batch, self.depths, dtype=torch.long, device=device))


class Applications:
    """The branch at one depth after another, for the tokens of one call; keeps the states.

    Args:
        around: the depth whose branch it is.
        x: [B, T, D], what the first application reads.
        state: before the call; `state` is the one after it.
    """

    def __init__(self, around: Repeating, x: Tensor, state: State, ctx: Context) -> None:
        self.around, self.sublayer, self.x = around, around.sublayer, x
        self.stateful, self.each = around.able.stateful, around.design.state == "each"
        self.outs: list[Out] = []
        self.ctx, self.fresh = ctx, ctx.fresh
        if self.stateful:
            position, end = placed(state.next[:, 0], x.shape[1], ctx)
            self.ctx = ctx.replace(position=position)
            self.before, self.next, self.start = state.next, [end, *state.next.unbind(1)[1:]], state.of
            self.states: list[State] = list(state.of)

    @property
    def state(self) -> State:
        return Repeated(tuple(self.states), torch.stack(self.next, 1)) if self.stateful else None

    @property
    def waits(self) -> bool:
        """Depths that no token reaches must be shown the boundaries of this call."""
        return self.stateful and self.each and self.ctx.boundary is not None

    def __call__(self, n: int, h: Tensor, running: Tensor, gate: Tensor | None = None) -> Tensor:
        """The branch of h [B, T, D] at depth n = 0, 1, ..., zero where no token is running [B, T].

        gate [B, T]: all tokens run, and this much of each is seen by the state of the depth.
        """
        full = self.sublayer.inputs(h, self.ctx)
        if n == 0:
            again = self.stateful and not self.each and self.around.design.most > 1 and h.shape[1] > 1
            out = self._call(full, 0, self.ctx.replace(consume=False) if again else self.ctx)
            return out.y
        if not self.stateful:
            by: Rows | Flat = Flat(running)
            return h.new_zeros(h.shape) if by.empty else by.put(
                self._call(by.take(full), None, by.context(self.ctx, self.around.needs)).y)
        if not self.each:
            return self._read(full, h, running)
        self.next[n] = following(running if gate is None else running & (gate > 0), self.ctx, self.before[:, n])
        if gate is not None:
            gate = gate.to(h.dtype)
            tick, write = (gate if old is None else old * gate for old in (self.ctx.tick, self.ctx.write))
            return self._call(full, n, self.ctx.replace(tick=tick, write=write, room=False)).y
        by = Rows(running, self.ctx, self.next[n])
        return h.new_zeros(h.shape) if by.empty else by.put(
            self._call(by.take(full), n, by.context(self.ctx, self.around.needs)).y)

    def _call(self, full: Tensor, n: int | None, ctx: Context) -> Out:
        """n: the depth whose state is taken and kept; None: neither."""
        past = None if n is None or self.fresh or not self.stateful else self.states[n]
        out = self.sublayer.branch(full, past, ctx)
        if n is not None and self.stateful:
            self.states[n] = out.state
        self.outs.append(out)
        return out

    def _read(self, full: Tensor, h: Tensor, running: Tensor) -> Tensor:
        """state: first, at a later depth."""
        ctx, none, length = self.ctx, h.new_zeros(h.shape[:2]), h.shape[1]
        only = ctx.replace(tick=none, write=none, boundary=None, fresh=False)
        if recording() and length == 1:
            return self._recorded(full, running, only)
        whole = ctx.write is None and (ctx.boundary is None or not bool(ctx.boundary.any()))
        if length > 1 and whole and self.around.able.rereads == "all":
            kept = there(h, ctx).long()
            only = only.replace(later=kept.sum(1, keepdim=True) - kept.cumsum(1), consume=False, room=False)
        if length == 1 or only.later is not None:
            by = Rows(running, only, self.next[0])
            if by.empty:
                return h.new_zeros(h.shape)
            out = self.sublayer.branch(by.take(full), self.states[0], by.context(only, self.around.needs))
            self.outs.append(out)
            return by.put(out.y)

        def twice(field: Tensor | None, second: Tensor) -> Tensor:
            return torch.stack([torch.ones_like(second) if field is None else field, second], 2).flatten(1, 2)

        position = ctx.position
        assert position is not None
        boundary = None if ctx.boundary is None else twice(ctx.boundary, torch.zeros_like(ctx.boundary))
        read = {name: value for name, value in ctx.shared.items() if name in self.around.needs}
        shared = along_time(read, length, lambda value: value.repeat_interleave(2, 1))
        keep = twice(ctx.valid, running)
        pairs = ctx.replace(position=twice(position, position), valid=None if bool(keep.all()) else keep,
                            boundary=boundary, tick=twice(ctx.tick, none), write=twice(ctx.write, none), shared=shared,
                            consume=False, emit=None, room=False)
        first = self.sublayer.inputs(self.x, ctx)
        both = torch.stack([first, full], 2).flatten(1, 2)
        by = Rows(keep, pairs, self.next[0])
        out = self.sublayer.branch(by.take(both), None if self.fresh else self.start[0],
                                   by.context(pairs, self.around.needs))
        self.outs.append(out)
        return by.put(out.y)[:, 1::2]

    def _recorded(self, full: Tensor, running: Tensor, only: Context) -> Tensor:
        """`_read` of one token, for a tape: all rows, and nothing where none is running."""
        if self.around.able.rereads != "no":
            only = only.replace(later=torch.zeros_like(running, dtype=torch.long))
        read = {name: value for name, value in only.shared.items() if name in self.around.needs}
        ctx, y = only.replace(shared=read, consume=False, emit=None, room=False), torch.zeros_like(self.x)

        def branch() -> None:
            out = self.sublayer.branch(full, self.states[0], ctx)
            y.copy_(torch.where(running[..., None], out.y, 0))

        when(running, branch)
        return y
