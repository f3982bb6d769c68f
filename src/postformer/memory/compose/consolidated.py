"""What a memory has learned by the end of a document is kept, in part, and is where it starts from in the next.

    K_n = K_{n-1} + c_n (S_end - K_{n-1}),    S_start = K_n       c_n = share, or sigmoid(u^T mean_n(x) + b)

S is the state of any memory, which by itself would forget everything at the end of a document (a segment); K, of the
same shape, is its slow copy, from the initial state on. c = 0 is the memory by itself, c = 1 one that never forgets.
The learned share sees the mean of the document's tokens and decides whether this one was worth keeping (fast weights
into slow ones, as in 2512.24695).
Neighbouring tokens that a convolution before the memory has seen are no part of what is kept; counters go on.
Limits: document after document (inside one, all tokens at once); two states are carried. The memory's state is made of
numbers that can be mixed: no list of tokens, nothing that is kept in logarithms (mlstm).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from pydantic import model_validator
from torch import Tensor

from postformer.contract import fallback
from postformer.contract import state as states
from postformer.contract.context import LEVELS, STREAM, Context, gates
from postformer.contract.mixer import Mixer, Out, Traits, prefixed
from postformer.contract.state import State
from postformer.design.base import Design
from postformer.design.cost import Cost
from postformer.design.grammar import AnyMixer
from postformer.design.registry import register
from postformer.memory.compose.slow import child


class ConsolidatedDesign(Design):
    kind: Literal["consolidated"] = "consolidated"
    of: AnyMixer
    at: Literal["segment", "document"] = "document"
    """Where the memory by itself forgets, and what it learned is kept instead"""
    share: float | Literal["learned"] = "learned"
    """Of what was learned that is kept, in [0, 1]; learned: chosen by what the document said"""

    @model_validator(mode="after")
    def _sense(self) -> ConsolidatedDesign:
        traits = child(self.of)
        if isinstance(self.share, float) and not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share:g}; a share lies in [0, 1]")
        if not traits.soft_gates and not traits.taps:
            raise ValueError(f"of '{self.of.kind}' mixes neighbouring tokens before it learns (or keeps logarithms), "
                             "and a share of that makes no sense; set local: none in it, or use another memory")
        if not traits.stateful:
            raise ValueError(f"of '{self.of.kind}' keeps nothing; give a memory, e.g. kind: matrix")
        if getattr(self.of, "forget_at", "document") != self.at:
            raise ValueError(f"of '{self.of.kind}' forgets at another place than what is kept (at: {self.at}); "
                             f"set forget_at: {self.at} in it")
        return self


class ConsolidatedState(NamedTuple):
    running: State
    kept: State
    total: Tensor
    """[B, D]: sum of the document's tokens so far"""
    count: Tensor
    """[B]: how many they were"""


@register(ConsolidatedDesign)
class Consolidated(Mixer):
    forget_at = "stream"

    def __init__(self, design: ConsolidatedDesign, site: Any) -> None:
        super().__init__()
        self.of, self.width = site.build(design.of, "of", publish=site.publish), site.width
        self.taps = child(design.of).taps
        self.share = site.linear("share", site.width, 1, bias=True, role="gate") if design.share == "learned" else None

    def initial(self, batch: int, condition: Tensor | None = None) -> ConsolidatedState:
        like = next(self.of.parameters())
        total = like.new_zeros(batch, self.width, dtype=torch.promote_types(like.dtype, torch.float32))
        # Two states: either may be given away and written over.
        return ConsolidatedState(self.of.initial(batch), self.of.initial(batch), total, total[:, 0].clone())

    def mix(self, x: Tensor, state: ConsolidatedState, ctx: Context) -> Out:
        length, level = x.shape[1], LEVELS[self.design.at]
        boundary = ctx.boundary
        cuts = set() if boundary is None else set(torch.nonzero((boundary >= level).any(0)).flatten().tolist())
        write = gates(ctx)[1]
        outs: list[Out] = []
        for a, b in pairwise(sorted({0, length} | cuts)):
            if a in cuts:
                assert boundary is not None
                state = self._ended(boundary[:, a], level, state)
            piece = ctx.narrow(a, b, length)
            if piece.boundary is not None:
                piece = piece.replace(boundary=piece.boundary.masked_fill(piece.boundary >= level, 0))
            out = self.of(x[:, a:b], state.running, piece)
            seen = x[:, a:b].to(state.total.dtype)
            weight = seen.new_ones(seen.shape[:2]) if write is None else write[:, a:b].to(seen.dtype)
            state = state._replace(running=out.state, total=state.total + (seen * weight[..., None]).sum(1),
                                   count=state.count + weight.sum(1))
            outs.append(out)
        whole = fallback.joined(outs)
        return Out(whole.y, state, whole.published, losses=prefixed("of", whole.losses),
                   measured=prefixed("of", whole.measured))

    def _ended(self, boundary: Tensor, level: int, state: ConsolidatedState) -> ConsolidatedState:
        """The state where rows of boundary [B] begin a document, or a stream."""
        rows, anew = boundary >= level, boundary >= STREAM
        if self.share is None:
            c = state.count.new_full(state.count.shape, float(self.design.share))
        else:
            mean = state.total / torch.where(state.count > 0, state.count, 1)[:, None]
            c = torch.sigmoid(self.share(mean.to(self.share.weight.dtype))[:, 0]).to(state.count.dtype)
        c = torch.where(state.count > 0, c, 0)  # an empty document leaves nothing

        def mixed(new: Tensor, old: Tensor) -> Tensor:
            if not new.is_floating_point():
                return torch.where(c.view(-1, *(1,) * (new.ndim - 1)) > 0, new, old)
            return old + c.view(-1, *(1,) * (new.ndim - 1)).to(new.dtype) * (new - old)

        initial = self.initial(boundary.shape[0])
        kept = states.where(rows, states.map_state(mixed, state.running, state.kept), state.kept)
        kept = states.where(anew, initial.kept, kept)
        if self.taps:
            kept = states.local_of(kept, initial.kept)
        ended = ConsolidatedState(states.where(rows, kept, state.running), kept, *(
            value.masked_fill(rows.view(-1, *(1,) * (value.ndim - 1)), 0) for value in (state.total, state.count)))
        return ended._replace(running=states.map_state(torch.clone, ended.running))

    @classmethod
    def traits(cls, design: ConsolidatedDesign) -> Traits:
        return replace(child(design.of), native_reset=True, native_emit=False, two_way=False, inputs=())

    @classmethod
    def words(cls, design: ConsolidatedDesign) -> str:
        share = "a learned share" if design.share == "learned" else f"{float(design.share):.0%}"
        return f"at the end of a {design.at} {share} of what was learned is kept, and is where the next one starts from"

    @classmethod
    def cost(cls, design: ConsolidatedDesign, site: Any) -> Cost:
        """The share is worked out once a document, and its FLOPs are not counted."""
        held = site.child_cost(design.of, "of", publish=site.publish)
        if held.flops_per_key:
            raise ValueError(f"of '{design.of.kind}' keeps a list of tokens, of which there is no half; give a memory "
                             "whose state is made of numbers, e.g. kind: matrix")
        total = held + Cost(state=held.state + 4 * site.width + 4)
        if design.share == "learned":
            total += Cost(params=site.width + 1)
        return total

