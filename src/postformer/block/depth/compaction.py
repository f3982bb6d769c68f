"""Compaction: the tokens that run, side by side, so that those that do not cost nothing.

`Rows` keeps the tokens of a row together, in their order, for mixers with a state; `Flat` puts all of a batch in one
row, for mixers that look at one token at a time. Both: `take` [B, T, ...] -> what runs, `put` the way back with zeros
at the other tokens, `context`, `empty` (there is nothing to run).

A token that is left out does not exist for the mixer: no position of its state moves on, no convolution sees it. What
began at it does: a boundary takes effect before the next token that runs, or behind the row's last one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from postformer.contract.context import DOCUMENT, Context, along_time


def following(chosen: Tensor, ctx: Context, before: Tensor) -> Tensor:
    """[B] int64: the position after the last token that ran, `before` [B] where none did; 0 once a document began."""
    assert ctx.position is not None
    order = torch.arange(1, chosen.shape[1] + 1, device=chosen.device)
    last = (chosen * order).amax(1)
    after = ctx.position.gather(1, (last - 1).clamp_min(0)[:, None])[:, 0] + 1
    after = torch.where(last > 0, after, before)
    if ctx.boundary is None:
        return after
    begun = ((ctx.boundary >= DOCUMENT) & (order > last[:, None])).any(1)
    return after.masked_fill(begun, 0)


class Rows:
    """The chosen tokens of each row, in order, then places of tokens that do not exist, up to the longest row.

    Args:
        chosen: [B, T] bool, of tokens that exist.
        after: [B] int64, the position after the last token of each row that runs (`following`).
        least: places that there are even if no token is chosen.
    """

    def __init__(self, chosen: Tensor, ctx: Context, after: Tensor, least: int = 0) -> None:
        batch, length = chosen.shape
        count, self.boundary, places = chosen.sum(1), None, chosen.sum(1)
        if ctx.boundary is not None:
            # A boundary goes to the place of the next chosen token; behind the last one it needs a place of its own.
            place = chosen.cumsum(1) - chosen.long()
            level = torch.zeros(batch, length + 1, dtype=ctx.boundary.dtype, device=chosen.device)
            level = level.scatter_reduce(1, place, ctx.boundary, "amax")
            self.boundary = level
            places = count + (level.gather(1, count[:, None])[:, 0] > 0).long()
        n = max(int(places.max()) if batch else 0, least)
        self.n, self.length, self.whole = n, length, n == length and bool(chosen.all())
        self.order = torch.argsort((~chosen).to(torch.uint8), dim=1, stable=True)[:, :n]
        self.valid = torch.arange(n, device=chosen.device) < count[:, None]
        self.after = after

    @property
    def empty(self) -> bool:
        return self.n == 0

    def take(self, x: Tensor) -> Tensor:
        if self.whole:
            return x
        return x.gather(1, self.order.view(*self.order.shape, *(1,) * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))

    def put(self, y: Tensor) -> Tensor:
        if self.whole:
            return y
        y = y.masked_fill(~self.valid[..., None], 0)
        made = y.new_zeros(y.shape[0], self.length, y.shape[2])
        return made.scatter(1, self.order[..., None].expand_as(y), y)

    def context(self, ctx: Context, needs: Collection[str]) -> Context:
        """needs: the publications that are read."""
        def take(field: Tensor | None) -> Tensor | None:
            return None if field is None else self.take(field)

        if self.whole:
            return ctx.replace(emit=None, room=False)
        position = take(ctx.position)
        if position is not None:
            position = torch.where(self.valid, position, self.after[:, None])
        return ctx.replace(
            position=position, valid=None if bool(self.valid.all()) else self.valid,
            boundary=None if self.boundary is None else self.boundary[:, : self.n], tick=take(ctx.tick),
            write=take(ctx.write), later=take(ctx.later), shared=taken(ctx.shared, needs, self), emit=None, room=False)


class Flat:
    """The chosen tokens of all rows as one row. Positions and publications go with them; nothing else is of use to a
    mixer that looks at one token at a time."""

    def __init__(self, chosen: Tensor, least: int = 0) -> None:
        self.shape = chosen.shape
        index = chosen.flatten().nonzero().flatten()
        self.idle = not len(index)
        self.index = index.new_zeros(least) if self.idle else index
        self.length = chosen.shape[1]
        self.whole = len(index) == chosen.numel()

    @property
    def empty(self) -> bool:
        return not len(self.index)

    def take(self, x: Tensor) -> Tensor:
        return x if self.whole else x.flatten(0, 1)[self.index][None]

    def put(self, y: Tensor) -> Tensor:
        if self.whole:
            return y
        y = y[0] * 0 if self.idle else y[0]
        return y.new_zeros(self.shape.numel(), y.shape[1]).index_copy(0, self.index, y).unflatten(0, self.shape)

    def context(self, ctx: Context, needs: Collection[str]) -> Context:
        position = None if ctx.position is None else self.take(ctx.position)
        return ctx.replace(position=position, valid=None, boundary=None, tick=None, write=None, later=None, emit=None,
                           room=False, shared=taken(ctx.shared, needs, self))


def taken(shared: Mapping[str, Any], needs: Collection[str], by: Rows | Flat) -> Mapping[str, Any]:
    """The publications that are read, those with a time axis at the tokens that run."""
    return along_time({name: value for name, value in shared.items() if name in needs}, by.length, by.take)
