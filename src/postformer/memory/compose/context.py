"""A memory that is context to attention: Titans' MAC (2501.00663, section 4.1), causal and exact in a stream.

The tokens of a document fall into segments of C. M_s is the memory as it was when the segment began, M_t the memory
that has learned from the attention's outputs so far:

    h_t = M_s(x_t)                                                    read only, frozen over the segment
    y_t = rms(Attention(x_t; [persistent; h_s, x_s, ..., h_t, x_t]))  inside the segment
    M_t = M_{t-1} updated with y_t,    o_t = y_t sigmoid(rms(M_t(y_t)))

The memory is any mixer with read-only tokens, the attention any causal one: it is fed h_t before x_t, at positions 2j
and 2j + 1 of the segment, so a window counts two per token.
As printed the paper's is not causal: all h of a segment are visible to all of its tokens though h_t = M(q(x_t)) depends
on x_t, and the gate reads a memory that has learned from the whole segment. Here h_t is visible to t and later ones,
and the gate at t has learned from the outputs up to t; at a segment's last token both are the paper's. The norm of y,
which the paper puts before the gate, stands before the write too: what a memory gives is fed back to it through
attention, and without a norm there a memory that is linear in its writes can grow without bound.
Limits: segment after segment (inside one, all tokens at once); two memories are carried. A token with write = 0 takes
no place in its segment. Calls whose rows stand at different places are cut where any row ends a segment.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from postformer.contract import state as states
from postformer.contract.context import EMPTY, LEVELS, Context, positions
from postformer.contract.mixer import Mixer, Out, Traits, prefixed
from postformer.contract.state import State
from postformer.design import registry
from postformer.design.base import Design
from postformer.design.cost import Cost, visible_keys
from postformer.design.grammar import AnyMixer
from postformer.design.registry import register
from postformer.kernels.tape import overwrite, recording
from postformer.layers.norm import RMSNorm


def _traits(child: Any) -> Traits:
    return registry.resolve(child.kind).traits(child)


class ContextDesign(Design):
    kind: Literal["context"] = "context"
    memory: AnyMixer
    attention: AnyMixer
    segment: int = Field(default=128, ge=1)
    """Tokens of a segment: attention sees no further back, the memory is read as it was at its start"""

    @model_validator(mode="after")
    def _fits(self) -> ContextDesign:
        memory, attention = _traits(self.memory), _traits(self.attention)
        if not memory.stateful:
            raise ValueError(f"memory '{self.memory.kind}' keeps nothing; give a memory, e.g. kind: deep or matrix")
        if not memory.soft_gates:
            raise ValueError(f"memory '{self.memory.kind}' mixes neighbouring tokens before it learns, and is to be "
                             "read without being written to; set local: none in it")
        if attention.reads:
            raise ValueError(f"attention '{self.attention.kind}' reads '{attention.reads[0]}', which has one entry per "
                             "token where it is fed two; leave it out")
        for name, child, traits in (("memory", self.memory, memory), ("attention", self.attention, attention)):
            if traits.streaming != "constant":
                wide = f" (two entries a token: {2 * self.segment} for a whole segment)" if name == "attention" else ""
                raise ValueError(f"{name} '{child.kind}' keeps a list that grows; give it a window{wide}")
        return self


class SegmentState(NamedTuple):
    start: State
    """The memory when the segment began: it is read"""
    running: State
    """The memory that has learned from the segment so far"""
    attention: State
    """Of this segment alone"""
    taken: Tensor
    """[B] int64: tokens of the segment so far, 0 to segment - 1"""


@register(ContextDesign)
class Segmented(Mixer):
    forget_at: str = "document"

    def __init__(self, design: ContextDesign, site: Any) -> None:
        super().__init__()
        one_width(site)
        self.memory, self.attention = site.build(design.memory, "memory"), site.build(design.attention, "attention")
        self.norm, self.gate_norm = RMSNorm(site.dim_out), RMSNorm(site.dim_out)

    def initial(self, batch: int, condition: Tensor | None = None) -> SegmentState:
        taken = torch.zeros(batch, dtype=torch.long, device=self.norm.weight.device)  # type: ignore[union-attr]
        # Two memories: either may be given away and written over.
        return SegmentState(self.memory.initial(batch), self.memory.initial(batch), self.attention.initial(batch),
                            taken)

    def mix(self, x: Tensor, state: SegmentState, ctx: Context) -> Out:
        length = x.shape[1]
        kept = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if ctx.valid is None else ctx.valid
        kept = kept if ctx.write is None else kept & (ctx.write > 0)
        before, after = positions(state.taken, length, ctx.replace(valid=kept), self.forget_at)
        place = before % self.design.segment
        full = kept & (place == self.design.segment - 1)
        ends = {1} if recording() and length == 1 else {t + 1 for t in torch.nonzero(full.any(0)).flatten().tolist()}
        starts = set() if ctx.boundary is None else set(torch.nonzero((ctx.boundary > 0).any(0)).flatten().tolist())
        parts: list[tuple[Out, Out]] = []
        ys: list[Tensor] = []
        for a, b in pairwise(sorted({0, length} | ends | starts)):
            piece = ctx.narrow(a, b, length)
            if a in starts:
                state = self._bounded(x[:, a : a + 1], place[:, a : a + 1], state, piece.narrow(0, 1, b - a))
            part = self._inside(x[:, a:b], place[:, a:b], state, piece.replace(boundary=None))
            parts.append(part)
            ys.append(part[0].y * torch.sigmoid(self.gate_norm(part[1].y)))
            state = state._replace(attention=part[0].state, running=part[1].state)
            if b in ends:
                state = self._next_segment(full[:, b - 1], state)
        state = state._replace(taken=after % self.design.segment)
        losses, measured = ({k: [told[k] for told in each] for k in each[0]} for each in (
            [prefixed("attention", a.losses) | prefixed("memory", m.losses) for a, m in parts],
            [prefixed("attention", a.measured) | prefixed("memory", m.measured) for a, m in parts]))
        return Out(torch.cat(ys, 1), state, losses={k: torch.stack(v).mean() for k, v in losses.items()},
                   measured={k: torch.stack(v).sum(0) for k, v in measured.items()})

    def _inside(self, x: Tensor, place: Tensor, state: SegmentState, ctx: Context) -> tuple[Out, Out]:
        """Tokens x [B, n, D] of one segment -> (attention to them, normed; the memory that learned from that)."""
        nothing = x.new_zeros(x.shape[:2])
        h = self.memory(x, state.start, ctx.replace(tick=nothing, write=nothing, consume=False)).y
        pairs = torch.stack([h.to(x.dtype), x], 2).flatten(1, 2)
        both = doubled(ctx, place)
        if recording() and x.shape[1] == 1:  # one by one, for which attention has a step
            first = self.attention(pairs[:, :1], state.attention, both.narrow(0, 1, 2))
            out = self.attention(pairs[:, 1:], first.state, both.narrow(1, 2, 2))
            y = out.y
        else:
            out = self.attention(pairs, state.attention, both)
            y = out.y[:, 1::2]
        out = out._replace(y=self.norm(y))
        return out, self.memory(out.y, state.running, ctx)

    def _bounded(self, x: Tensor, place: Tensor, state: SegmentState, ctx: Context) -> SegmentState:
        """The state after a boundary: each child ends what it ends there, shown by a token that does not exist."""
        none = ctx.replace(valid=torch.zeros_like(place, dtype=torch.bool))
        pair, both = x.repeat_interleave(2, 1), doubled(none, place)
        assert none.boundary is not None
        both = both.replace(boundary=torch.cat([none.boundary, torch.zeros_like(none.boundary)], 1))
        rows = none.boundary[:, 0] > 0  # the others are not to know that this one has a boundary
        ended = SegmentState(
            self.memory(x, state.start, none).state, self.memory(x, state.running, none).state,
            self.attention(pair, state.attention, both).state, state.taken)
        state = states.where(rows, ended, state)
        return self._next_segment(none.boundary[:, 0] >= LEVELS[self.forget_at], state)

    def _next_segment(self, rows: Tensor, state: SegmentState) -> SegmentState:
        """Rows [B] bool begin a segment: they read what they have learned, and attend to nothing yet."""
        fresh = self.attention.initial(rows.shape[0])
        if recording():
            overwrite(rows, lambda: [*states.leaves(state.running), *states.leaves(fresh)],
                      [*states.leaves(state.start), *states.leaves(state.attention)])
            return state
        return state._replace(start=states.where(rows, state.running, state.start),
                              attention=states.where(rows, fresh, state.attention))

    @classmethod
    def traits(cls, design: ContextDesign) -> Traits:
        memory, attention = _traits(design.memory), _traits(design.attention)
        return Traits(
            causal=memory.causal and attention.causal, soft_gates=attention.soft_gates or not attention.stateful,
            native_emit=False, exact_gradients=memory.exact_gradients and attention.exact_gradients,
            reads=memory.reads)

    @classmethod
    def words(cls, design: ContextDesign) -> str:
        return f"attention within {design.segment} tokens also sees what the memory recalls; the memory learns from it"

    @classmethod
    def cost(cls, design: ContextDesign, site: Any) -> Cost:
        """FLOPs of attention are averaged over a segment's tokens."""
        one_width(site)
        memory, attention = site.child_cost(design.memory, "memory"), site.child_cost(design.attention, "attention")
        keys = sum(f * visible_keys(2 * design.segment, 0, w) for f, w in attention.flops_per_key) / design.segment
        return memory + memory.shared() + Cost(
            params=attention.params + 2 * site.dim_out, flops_per_token=2 * attention.flops_per_token + keys,
            state=attention.state + 8, state_per_token=attention.state_per_token)


def doubled(ctx: Context, place: Tensor) -> Context:
    """The context of tokens fed as pairs, at places 2 j and 2 j + 1; a token that does not exist moves nothing on."""
    def twice(field: Tensor | None) -> Tensor | None:
        return None if field is None else field.repeat_interleave(2, 1)

    second = 1 if ctx.valid is None else ctx.valid.long()
    position = torch.stack([2 * place, 2 * place + second], 2).flatten(1, 2)
    return ctx.replace(position=position, valid=twice(ctx.valid), tick=twice(ctx.tick), write=twice(ctx.write),
                       boundary=None, shared=EMPTY)


def one_width(site: Any) -> None:
    if site.width != site.dim_out:
        raise ValueError(f"the memory of a context reads x ({site.width} channels) and is written with what attention "
                         f"makes of it ({site.dim_out}); leave `input` at [x]")
