"""A memory on a slower clock: it is written once per segment, with a summary of it, and read by every token.

    s_n = sum_{t in segment n} w_t x_t / sum w_t              w = 1, or sigmoid(u^T x_t + c [+ a log variance_t])
    M_n = M_{n-1} updated with s_n,    y_t = M_n(x_t)         n the last segment that ended before t

So the memory's clock ticks once per segment: its decay, its rate and its capacity are per segment (the slower levels
of 2512.24695; Clockwork RNN, 1402.3511). `every` says what ends one: a number of tokens, a word, a sentence, a
document, or a learned share. A summary counts from the token after its segment on. All memories that can be read
without being written fit; those that are fed their inputs apart (matrix, filter) read the token that comes with a
summary by its own query, others by the summary's.
Limits: all tokens pass through the memory's kernel with closed gates, so a slow level costs what a fast one does; with
learned ends a segment is closed by shares and summaries are mixtures. Time (tick) passes by segments only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from postformer.contract.context import FED, LEVELS, Context, extended
from postformer.contract.mixer import Mixer, Out, Traits, prefixed
from postformer.contract.state import State
from postformer.design import registry
from postformer.design.base import Design
from postformer.design.cost import Cost
from postformer.design.grammar import AnyMixer
from postformer.design.registry import register
from postformer.kernels import scan
from postformer.memory.compose.segments import Closing, Ended, Ends, Period


class SlowDesign(Design):
    kind: Literal["slow"] = "slow"
    of: AnyMixer
    every: Period = Field(default=16)
    summary: Literal["mean", "weighted", "doubt"] = "mean"
    """mean: of the segment's tokens; weighted: by learned weights; doubt: by learned weights that also see how unsure a
    faster memory was (`timescales` feeds its variance)"""

    @model_validator(mode="after")
    def _gated(self) -> SlowDesign:
        traits = child(self.of)
        if isinstance(self.every, int) and self.every < 2:
            raise ValueError(f"every: {self.every} is no slower clock; give 2 tokens or more, or use the memory itself")
        if not traits.stateful:
            raise ValueError(f"of '{self.of.kind}' keeps nothing; give a memory, e.g. kind: matrix")
        if not traits.soft_gates:
            raise ValueError(f"of '{self.of.kind}' mixes neighbouring tokens before it learns, and is to be read "
                             "without being written to; set local: none in it")
        if self.every in ("segment", "document") and LEVELS[outlives(self.of)] <= LEVELS[self.every]:  # type: ignore
            longer = "stream" if self.every == "document" else "document"
            raise ValueError(f"of '{self.of.kind}' forgets where a {self.every} ends, and so would never be written; "
                             f"set forget_at: {longer} in it")
        return self


def outlives(design: Any) -> str:
    """The boundary at which a memory forgets everything."""
    return getattr(design, "forget_at", None) or getattr(registry.resolve(design.kind), "forget_at", "document")


def child(design: Any) -> Traits:
    return registry.resolve(design.kind).traits(design)


class SlowState(NamedTuple):
    memory: State
    ends: Closing
    total: Tensor
    """[B, D]: sum of the segment's weighted tokens so far"""
    weight: Tensor
    """[B]: sum of their weights"""


@register(SlowDesign)
class Slow(Mixer):
    def __init__(self, design: SlowDesign, site: Any) -> None:
        super().__init__()
        self.of = site.build(design.of, "of")
        self.forget_at = outlives(design.of)
        self.ends = Ends(design.every, site, self.forget_at, "ends" in site.publish)
        self.score = (site.linear("score", site.width, 1, bias=True, role="gate") if design.summary != "mean" else None)
        self.doubt = site.parameter("doubt", (1,), lambda p: p.fill_(0.5)) if design.summary == "doubt" else None
        self.width = site.width
        inputs = child(design.of).inputs
        self.apart = "key" in inputs and "value" in inputs

    def initial(self, batch: int, condition: Tensor | None = None) -> SlowState:
        like = next(self.parameters())
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        total = like.new_zeros(batch, self.width, dtype=dtype)
        return SlowState(self.of.initial(batch), self.ends.initial(total), total, total[:, 0].clone())

    def mix(self, x: Tensor, state: SlowState, ctx: Context) -> Out:
        ended, ends, loss = self.ends(x, state.ends, ctx)
        s, close, total, weight = self._summaries(x, ended, state, ctx)
        inside = ctx.replace(tick=close, write=close)
        if self.apart:
            s = s.to(x.dtype)
            out = self.of(x, None if ctx.fresh else state.memory,
                          inside.replace(shared=extended(ctx.shared, {f"{FED}key": s, f"{FED}value": s})))
        else:
            out = self.of(torch.lerp(x, s.to(x.dtype), close[..., None].to(x.dtype)),
                          None if ctx.fresh else state.memory, inside)
        losses = prefixed("of", out.losses) | ({} if loss is None else {"rate": loss})
        published = {} if ended.first is None else {"ends": ended.first}
        return Out(out.y, SlowState(out.state, ends, total, weight), published, losses=losses,
                   measured=prefixed("of", out.measured))

    def _summaries(self, x: Tensor, ended: Ended, state: SlowState, ctx: Context
                   ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(the summary [B, T, D] of what was not closed before each token, how much it is written [B, T], the sums)"""
        weight = ended.gate
        if self.score is not None:
            raw = self.score(x)[..., 0].to(weight.dtype)
            if self.doubt is not None:
                raw = raw + self.doubt.to(raw.dtype) * ctx.shared[f"{FED}doubt"].to(raw.dtype)
            weight = weight * torch.sigmoid(raw)
        new = torch.cat([x.to(weight.dtype), torch.ones_like(x[..., :1], dtype=weight.dtype)], -1) * weight[..., None]
        start = torch.cat([state.total, state.weight[:, None]], -1)
        sums = scan((1 - ended.before)[..., None], new, start, ended.reset)
        before = torch.cat([start[:, None], sums[:, :-1]], 1)
        if ended.reset is not None:
            before = before.masked_fill(ended.reset[..., None], 0)
        total, mass = before[..., :-1], before[..., -1:]
        there = mass > 0
        s = total / torch.where(there, mass, 1.0)
        return s, ended.before * there[..., 0], sums[:, -1, :-1], sums[:, -1, -1]

    @classmethod
    def traits(cls, design: SlowDesign) -> Traits:
        made = child(design.of)
        return replace(made, native_reset=True, native_emit=False, two_way=False, inputs=("doubt",),
                       publishes=("ends",), reads=made.reads + Ends.reads(design.every)
                       + ((f"{FED}doubt",) if design.summary == "doubt" else ()))

    @classmethod
    def words(cls, design: SlowDesign) -> str:
        return written(design.every, design.summary)

    @classmethod
    def cost(cls, design: SlowDesign, site: Any) -> Cost:
        held = site.child_cost(design.of, "of")
        if held.flops_per_key:
            raise ValueError(f"of '{design.of.kind}' keeps a list of tokens, and here it would be of segments, of "
                             "whose length nobody could tell beforehand; give a memory of constant size")
        total = held + Ends.cost(design.every, site, "ends" in site.publish) + Cost(state=4 * site.width + 4)
        if design.summary != "mean":
            total += site.linear_cost(site.width, 1, bias=True, role="gate")
        return total + Cost(params=int(design.summary == "doubt"))


def written(every: Period, summary: str) -> str:
    """When a slow memory is written, and with what, in words."""
    told = {"mean": "the mean of their tokens", "weighted": "a weighted mean of their tokens",
            "doubt": "a mean of their tokens, weighed by doubt"}[summary]
    return f"written {Ends.words(every)} with {told}"
