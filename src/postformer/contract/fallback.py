"""Slow but right: what a mixer cannot do natively is done by running it piece by piece.

A mixer without a native reset is cut wherever any row of the batch has a boundary, and the rows that start a document
there take the initial state. A mixer without native emit is cut at every emit-th token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from postformer.contract import state as states
from postformer.contract.context import Context

if TYPE_CHECKING:
    from postformer.contract.mixer import Mixer, Out, Traits


def by_pieces(mixer: Mixer, x: Tensor, state: states.State, ctx: Context, traits: Traits) -> Out:
    """Run mixer.mix on consecutive pieces of the tokens, resetting and emitting between them. Same result, slower."""
    length = x.shape[1]
    reset = None if traits.native_reset else ctx.reset(getattr(mixer, "forget_at", "document"))
    cuts = {0, length}
    if ctx.emit:
        cuts |= set(range(0, length, ctx.emit))
    if reset is not None:
        cuts |= set(torch.nonzero(reset.any(0)).flatten().tolist())
    edges = sorted(cuts)
    outs: list[Any] = []
    emitted: list[states.State] = []
    for start, stop in pairwise(edges):
        if ctx.emit and start % ctx.emit == 0:
            emitted.append(state)
        piece = ctx.narrow(start, stop, length)
        if reset is not None:
            piece = piece.replace(boundary=None)
            if bool(reset[:, start].any()):
                state = _restart(mixer, state, reset[:, start])
        if piece.consume and emitted:
            piece = piece.replace(consume=False)
        out = mixer.mix(x[:, start:stop], state, piece)
        state = out.state
        outs.append(out)
    return joined(outs)._replace(emitted=stack_emitted(emitted) if ctx.emit else None)


def joined(outs: Sequence[Out]) -> Out:
    """What consecutive pieces of a call gave, as one: the last one's state, losses by how many tokens they are of."""
    published = {
        name: torch.cat([o.published[name] for o in outs], 1) if isinstance(outs[0].published[name], Tensor)
        else outs[-1].published[name]
        for name in outs[0].published
    }
    length = sum(o.y.shape[1] for o in outs)
    losses = {name: torch.stack([o.losses[name] * (o.y.shape[1] / length) for o in outs]).sum()
              for name in outs[0].losses}
    measured = {name: torch.stack([o.measured[name] for o in outs]).sum(0) for name in outs[0].measured}
    return outs[-1]._replace(y=torch.cat([o.y for o in outs], 1), published=published, losses=losses,
                             measured=measured)


def _restart(mixer: Mixer, state: states.State, rows: Tensor) -> states.State:
    """Rows that start a document take the initial state; growing lists keep their capacity."""
    fresh = mixer.initial(rows.shape[0])
    parts = [
        states.select(fresh if new else state, [row]) for row, new in enumerate(rows.tolist())
    ]
    return states.concat(parts)


def stack_emitted(emitted: list[states.State]) -> states.State:
    """States at several tokens -> leaves [B, n, ...] (growing lists are padded to the largest capacity)."""
    batch = states.leaves(emitted[0])[0].shape[0] if states.leaves(emitted[0]) else 0
    if not batch:
        return None
    joined = states.concat(emitted)
    return states.map_state(lambda leaf: leaf.unflatten(0, (len(emitted), batch)).transpose(0, 1), joined)
