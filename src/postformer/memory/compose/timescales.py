"""Memories on several timescales: the first sees every token, each further one is written once per segment (`slow`).

    parallel  y = sum_l a_l M_l(x)                         a = L softmax(W x [+ b log variance]), or 1
    chain     h_1 = M_1(x),  h_l = h_{l-1} + M_l(h_{l-1})  y = h_L: continuum memory (2512.24695), slow reads fast
    nested    h_L = M_L(x),  h_l = M_l(x + W_l h_{l+1})    y = sum_l h_l: slow conditions fast, which starts afresh
                                                           where a segment of the next slower level ends

All arrangements look back only and are computed level by level over all tokens at once. `doubt` uses what a filter as
the first level publishes: how unsure it is of what it answers (its variance) says how much the other levels are heard
(reads), or how much of each token goes into what they are told (`summary: doubt` of a level).
Limits: nested needs ends that are there or not (no learned ones) and levels that forget at segments.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from postformer.contract.context import FED, SEGMENT, Context, extended
from postformer.contract.mixer import Mixer, Out, Traits, joined, prefixed
from postformer.contract.state import State
from postformer.design.base import Design
from postformer.design.cost import Cost
from postformer.design.grammar import AnyMixer
from postformer.design.registry import register
from postformer.memory.compose.segments import Learned, Period
from postformer.memory.compose.slow import SlowDesign, child, written


class Level(Design):
    of: AnyMixer
    every: Period = 1
    """1: every token"""
    summary: Literal["mean", "weighted", "doubt"] = "mean"

    @model_validator(mode="after")
    def _sense(self) -> Level:
        if self.every == 1 and self.summary != "mean":
            raise ValueError(f"summary: {self.summary} is of a segment, and this level sees every token; set every")
        if self.every != 1:
            SlowDesign(of=self.of, every=self.every, summary=self.summary)  # refuses what does not fit
        return self

    @property
    def mixer(self) -> Any:
        """The design of what runs"""
        # Without validation, which takes longer than a small step and is done above.
        return self.of if self.every == 1 else SlowDesign.model_construct(
            of=self.of, every=self.every, summary=self.summary)


class TimescalesDesign(Design):
    kind: Literal["timescales"] = "timescales"
    levels: tuple[Level, ...] = Field(min_length=1)
    """From fast to slow; the first sees every token"""
    arrangement: Literal["parallel", "chain", "nested"] = "parallel"
    merge: Literal["gate", "sum"] = "gate"
    """Of parallel levels"""
    doubt: bool = False
    """The variance of the first level (kind: filter) shifts the weights by which parallel levels are heard"""

    @model_validator(mode="after")
    def _sense(self) -> TimescalesDesign:
        if self.levels[0].every != 1:
            raise ValueError("the first level sees every token; leave `every` out there (or use kind: slow)")
        if any(level.every == 1 for level in self.levels[1:]) and self.arrangement == "nested":
            raise ValueError("nested levels start afresh where the next slower one ends a segment; give each level "
                             "but the first an `every`")
        if self.unsure and "variance" not in child(self.levels[0].of).publishes:
            raise ValueError(f"doubt is the variance of the first level, and kind '{self.levels[0].of.kind}' publishes "
                             "none; use kind: filter there, or leave doubt out")
        if self.doubt and (self.arrangement, self.merge) != ("parallel", "gate"):
            raise ValueError("doubt shifts the weights of parallel levels; set arrangement: parallel and merge: gate")
        if self.arrangement == "nested":
            for i, (level, slower) in enumerate(zip(self.levels, self.levels[1:])):
                if isinstance(slower.every, Learned):
                    raise ValueError(f"levels.{i + 1} has learned ends, which are shares, and levels.{i} is to start "
                                     "afresh at them; give a number of tokens or what ends a segment")
                if getattr(level.of, "forget_at", None) != "segment":
                    raise ValueError(f"levels.{i} ('{level.of.kind}') starts afresh at each segment of levels.{i + 1}; "
                                     "set forget_at: segment in it, or use arrangement: parallel")
        return self

    @property
    def unsure(self) -> bool:
        """Somebody wants the first level's variance."""
        return self.doubt or any(level.summary == "doubt" for level in self.levels)

    @property
    def offers(self) -> tuple[str, ...]:
        return tuple(name for name in child(self.levels[0].of).publishes if name == "variance")


@register(TimescalesDesign)
class Timescales(Mixer):
    forget_at: str = "document"

    def __init__(self, design: TimescalesDesign, site: Any) -> None:
        super().__init__()
        if design.arrangement != "parallel" and site.width != site.dim_out:
            raise ValueError(f"a level reads x ({site.width} channels) or what another makes of it ({site.dim_out}); "
                             "leave `input` at [x], or use arrangement: parallel")
        self.wanted = site.publish
        self.levels = nn.ModuleList(
            site.build(level.mixer, f"levels.{i}", publish=self._asked(design, i, site))
            for i, level in enumerate(design.levels))
        count = len(design.levels)
        gated = design.arrangement == "parallel" and design.merge == "gate"
        self.gate = site.linear("gate", site.width, count, bias=True, role="gate") if gated else None
        self.doubt = site.parameter("doubt", (count,), lambda p: p.zero_()) if design.doubt else None
        nested = design.arrangement == "nested"
        self.condition = nn.ModuleList(site.linear(f"condition.{i}", site.width, site.width)
                                       for i in range(count - 1) if nested)

    @staticmethod
    def _asked(design: TimescalesDesign, i: int, site: Any) -> frozenset[str]:
        """Which publications of a level are wanted."""
        if i == 0:
            return frozenset({"variance"}) if design.unsure or "variance" in site.publish else frozenset()
        return frozenset({"ends"}) if design.arrangement == "nested" else frozenset()

    def initial(self, batch: int, condition: Tensor | None = None) -> State:
        return tuple(level.initial(batch) for level in self.levels)  # type: ignore[operator]

    def mix(self, x: Tensor, state: State, ctx: Context) -> Out:
        past = (None,) * len(self.levels) if ctx.fresh else state
        run = {"parallel": self._parallel, "chain": self._chain, "nested": self._nested}[self.design.arrangement]
        y, outs = run(x, past, ctx)
        losses, measured = {}, {}
        for i, out in enumerate(outs):
            losses |= prefixed(f"levels.{i}", out.losses)
            measured |= prefixed(f"levels.{i}", out.measured)
        published = {name: outs[0].published[name] for name in self.wanted}
        return Out(y, tuple(out.state for out in outs), published, losses=losses, measured=measured,
                   emitted=tuple(out.emitted for out in outs) if ctx.emit else None)

    def _told(self, first: Out, ctx: Context) -> Context:
        """The context of the slower levels: with the log of the first one's variance, the mean over its heads."""
        if not self.design.unsure:
            return ctx
        return ctx.replace(shared=extended(ctx.shared, {f"{FED}doubt": log_variance(first.published["variance"])}))

    def _parallel(self, x: Tensor, past: State, ctx: Context) -> tuple[Tensor, list[Out]]:
        outs = [self.levels[0](x, past[0], ctx)]
        told = self._told(outs[0], ctx)
        outs += [level(x, old, told) for level, old in zip(self.levels[1:], past[1:])]
        ys = torch.stack([out.y for out in outs], -1)
        if self.gate is None:
            return ys.sum(-1), outs
        raw = self.gate(x)
        if self.doubt is not None:
            raw = raw + (told.shared[f"{FED}doubt"][..., None] * self.doubt).to(raw.dtype)
        return (ys * (len(outs) * raw.softmax(-1))[..., None, :]).sum(-1), outs

    def _chain(self, x: Tensor, past: State, ctx: Context) -> tuple[Tensor, list[Out]]:
        outs = [self.levels[0](x, past[0], ctx)]
        h, told = outs[0].y, self._told(outs[0], ctx)
        for level, old in zip(self.levels[1:], past[1:]):
            outs.append(level(h, old, told))
            h = h + outs[-1].y
        return h, outs

    def _nested(self, x: Tensor, past: State, ctx: Context) -> tuple[Tensor, list[Out]]:
        outs: list[Out] = []
        y, inside = None, ctx
        for i in reversed(range(len(self.levels))):
            h = x if not outs else x + self.condition[i](outs[0].y)
            out = self.levels[i](h, past[i], inside)
            outs.insert(0, out)
            y = out.y if y is None else y + out.y
            if i:
                ends = out.published["ends"].long() * SEGMENT
                inside = ctx.replace(
                    boundary=ends if ctx.boundary is None else torch.maximum(ctx.boundary.long(), ends))
        assert y is not None
        return y, outs

    def part(self, name: str) -> Any:
        _, _, index = name.partition(".")
        return self.levels[int(index)] if index else self.levels

    @classmethod
    def traits(cls, design: TimescalesDesign) -> Traits:
        each = [child(level.mixer) for level in design.levels]
        made = joined(each)
        reads = tuple(name for name in made.reads if not (design.unsure and name == f"{FED}doubt"))
        # Its levels do what they cannot natively by themselves.
        return replace(made, native_reset=True, native_emit=True, rereads="no", publishes=design.offers, reads=reads)

    @classmethod
    def words(cls, design: TimescalesDesign) -> str:
        how = {"parallel": "side by side, " + ("summed" if design.merge == "sum" else "weighed by a gate"
                           + " that sees the first one's doubt" * design.doubt),
               "chain": "one after another",
               "nested": "the fast started afresh and told by the slow"}[design.arrangement]
        levels = "; ".join(f"{i} ({level.of.kind}) " + ("every token" if level.every == 1 else
                                                       written(level.every, level.summary))
                           for i, level in enumerate(design.levels))
        return f"{len(design.levels)} levels, {how}: {levels}"

    @classmethod
    def cost(cls, design: TimescalesDesign, site: Any) -> Cost:
        total = sum((site.child_cost(level.mixer, f"levels.{i}", publish=cls._asked(design, i, site))
                     for i, level in enumerate(design.levels)), Cost())
        count = len(design.levels)
        if design.arrangement == "parallel" and design.merge == "gate":
            total += site.linear_cost(site.width, count, bias=True, role="gate")
        if design.arrangement == "nested":
            total += sum((site.linear_cost(site.width, site.width) for _ in range(count - 1)), Cost())
        return total + Cost(params=count * design.doubt)


def log_variance(variance: Tensor) -> Tensor:
    """[B, T, H], of reads -> [B, T]: the log of their mean over heads"""
    return torch.log(variance.mean(-1) + 1e-6)
