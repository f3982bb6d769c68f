"""Context: what one call knows about its tokens.

Built once by the model (or by whoever calls a mixer), read-only, passed down unchanged; a wrapper that changes what its
child sees passes on a `replace`d copy. Every token field is `[B, T]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

EMPTY: Mapping[str, Any] = MappingProxyType({})

NONE, SEGMENT, DOCUMENT, STREAM = 0, 1, 2, 3
LEVELS = {"segment": SEGMENT, "document": DOCUMENT, "stream": STREAM}
"""Boundary levels. A boundary of level n ends everything of level <= n: a memory that forgets at level m starts afresh
before every token whose boundary is >= m."""
FED = "input."
"""Under this and its name in `Context.shared` stands what a wrapper feeds to an input of its child."""


class Store(Protocol):
    """External memory that a mixer may search; the backends live in `store/`."""

    def search(self, q: Tensor, k: int) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Context:
    """What one call knows about its tokens.

    `tick = write = 0` makes a token *read-only*: the state is unchanged, y is still produced. `valid = False` is the
    same with y = 0 and the token invisible to convolutions, counters and key-value lists. A boundary takes effect
    before its token whether or not that token is valid.
    """

    position: Tensor | None = None
    """[B, T] int64, position inside the document; never recomputed by a mixer. None: counted from the state's start."""
    valid: Tensor | None = None
    """[B, T] bool; False: the token does not exist (padding, skipped, idle row)."""
    boundary: Tensor | None = None
    """[B, T] int8: 0 none, 1 segment, 2 document, 3 stream; what ends BEFORE this token."""
    tick: Tensor | None = None
    """[B, T] in [0, 1]; multiplies the log-decay: how much time passes."""
    write: Tensor | None = None
    """[B, T] in [0, 1]; multiplies the update."""
    later: Tensor | None = None
    """[B, T] int64: the state has been written by so many tokens since this one, which only reads and does not see
    them (where the trait `rereads` says so). None: none."""
    causal: bool = True
    """False: tokens of this call see each other; the state is still only the past."""
    emit: int | None = None
    """Also return the state before tokens 0, emit, 2*emit, ..."""
    consume: bool = False
    """The caller gives the input state away: its buffers may be overwritten (decoding)."""
    room: bool = False
    """Growing lists in the state have room for this call's tokens (`states.reserve`), and each row's positions have
    counted by one from its document's start (decoding)."""
    fresh: bool = False
    """The mixer was given no state and starts from its initial one, so that nothing has been seen and the state need
    not be asked. Only `Mixer.forward` sets it."""
    shared: Mapping[str, Any] = field(default_factory=lambda: EMPTY)
    """What earlier sites published, by the name the design gives it, plus "embedding" and, where a language model
    calls, "tokens" [B, T]."""
    stores: Mapping[str, Store] = field(default_factory=lambda: EMPTY)
    inputs: Mapping[str, Tensor] = field(default_factory=lambda: EMPTY)

    def replace(self, **changes: Any) -> Context:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def reset(self, forget_at: str = "document") -> Tensor | None:
        """[B, T] bool: before which tokens a memory that forgets at this level starts afresh (None: nowhere)."""
        return None if self.boundary is None else self.boundary >= LEVELS[forget_at]

    def fed(self, name: str, x: Tensor) -> Tensor:
        """What a wrapper feeds to this input of its child (its traits name them in `inputs`); x where it does not."""
        return self.shared.get(f"{FED}{name}", x)

    def segments(self, forget_at: str = "document") -> Tensor | None:
        """[B, T] int64: which document of this call a token is in; 0 is the one the state comes from."""
        reset = self.reset(forget_at)
        return None if reset is None else reset.long().cumsum(1)

    def narrow(self, start: int, stop: int, length: int) -> Context:
        """The same context for tokens start..stop-1 of a call of `length` tokens. Publications with a time axis are
        cut, emit is left out; `stores` and `inputs` pass whole."""
        cut = {
            name: None if (value := getattr(self, name)) is None else value[:, start:stop]
            for name in ("position", "valid", "boundary", "tick", "write", "later")
        }
        return replace(self, **cut, shared=narrow_shared(self.shared, start, stop, length), emit=None,
                       fresh=self.fresh and start == 0)


def narrow_shared(shared: Mapping[str, Any], start: int, stop: int, length: int) -> Mapping[str, Any]:
    """Publications for tokens start..stop-1 of `length`: tensors [B, length, ...] are cut, the rest passes as it is."""
    return along_time(shared, length, lambda value: value[:, start:stop])


def along_time(shared: Mapping[str, Any], length: int, change: Callable[[Tensor], Tensor]) -> Mapping[str, Any]:
    """The publications with what has a time axis of `length`, tensors [B, length, ...], changed."""
    return MappingProxyType({
        k: change(v) if isinstance(v, Tensor) and v.ndim >= 2 and v.shape[1] == length else v
        for k, v in shared.items()
    })


def extended(shared: Mapping[str, Any], new: Mapping[str, Any]) -> Mapping[str, Any]:
    """The publications with more of them; the old mapping is not touched."""
    return MappingProxyType({**shared, **new})


def gates(ctx: Context) -> tuple[Tensor | None, Tensor | None]:
    """(tick, write) with invalid tokens folded in as identity tokens; None where every gate is one.

    Shapes [B, T], float.
    """
    tick, write, valid = ctx.tick, ctx.write, ctx.valid
    if valid is None:
        return tick, write
    mask = valid.to(torch.get_default_dtype() if tick is None else tick.dtype)
    return mask if tick is None else tick * mask, mask if write is None else write * mask.to(write.dtype)


def positions(start: Tensor, length: int, ctx: Context, forget_at: str = "document") -> tuple[Tensor, Tensor]:
    """(position [B, T] of each token, position [B] of the token after the call), counted from start [B].

    Invalid tokens do not count; a boundary of the level starts again at zero.
    """
    valid = torch.ones(start.shape[0], length, dtype=torch.long, device=start.device)
    if ctx.valid is not None:
        valid = ctx.valid.long()
    before = valid.cumsum(1) - valid
    reset = ctx.reset(forget_at)
    if reset is None:
        position = before + start[:, None]
    else:
        base = before.masked_fill(~reset, 0).cummax(1).values
        first = reset.long().cumsum(1) == 0
        position = before - base + torch.where(first, start[:, None], 0)
    return position, position[:, -1] + valid[:, -1]


def placed(start: Tensor, length: int, ctx: Context) -> tuple[Tensor, Tensor]:
    """(position [B, T], position [B] of the token after the call): the context's own, or counted from start [B]."""
    if ctx.position is None:
        return positions(start, length, ctx)
    return ctx.position, ctx.position[:, -1] + (1 if ctx.valid is None else ctx.valid[:, -1].long())
