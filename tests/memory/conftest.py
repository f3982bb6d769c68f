"""Test-only mixers that use the contract's carriers: publications, gates, boundary levels, fallbacks, starts."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import nn

from postformer.contract.mixer import Mixer, Out, StepMemory, Traits
from postformer.design import Design, register, registry
from postformer.design.cost import Cost
from postformer.design.grammar import AnyMixer
from postformer.kernels import scan

torch.set_num_threads(1)


class DecayDesign(Design):
    kind: Literal["test-decay"] = "test-decay"
    forget_at: Literal["segment", "document", "stream"] = "document"
    native: bool = True
    """False: without a reset or emitted states of its own"""
    reads: str | None = None
    """A publication that is added to the input"""


class Decay(Mixer):
    """h_t = a h_{t-1} + i(x_t): publishes h; tick and write as in every elementwise memory."""

    def __init__(self, design: DecayDesign, site: Any) -> None:
        super().__init__()
        self.forget_at = design.forget_at
        self.a = site.parameter("a", (site.width,), lambda p: p.uniform_(-1, 1))
        self.i = site.linear("in", site.width, site.width)
        self.out = site.linear("out", site.width, site.dim_out)
        self.wanted = site.publish

    def initial(self, batch, condition=None):
        dtype = torch.float64 if self.a.dtype == torch.float64 else torch.float32
        return self.a.new_zeros(batch, self.a.shape[0], dtype=dtype)

    def mix(self, x, state, ctx):
        if self.design.reads:
            x = x + ctx.shared[self.design.reads]
        log_a = nn.functional.logsigmoid(self.a).to(state.dtype).expand(*x.shape[:2], -1)
        b = self.i(x).to(state.dtype)
        valid = torch.ones(x.shape[:2], dtype=torch.bool) if ctx.valid is None else ctx.valid
        tick = valid.to(b.dtype) if ctx.tick is None else ctx.tick.to(b.dtype) * valid
        write = valid.to(b.dtype) if ctx.write is None else ctx.write.to(b.dtype) * valid
        log_a, b = log_a * tick[..., None], b * write[..., None]
        reset = ctx.reset(self.forget_at)
        assert self.design.native or (reset is None and ctx.emit is None)
        h = scan(log_a.exp(), b, state, reset)
        emitted = None
        if ctx.emit:
            emitted = torch.cat([state[:, None], h], 1)[:, : x.shape[1] : ctx.emit]
        return Out(self.out(h.to(x.dtype)), h[:, -1], {w: h.to(x.dtype) for w in self.wanted}, emitted)

    @classmethod
    def traits(cls, design):
        return Traits(native_reset=design.native, native_emit=design.native, publishes=("memory",),
                      reads=(design.reads,) if design.reads else ())

    @classmethod
    def cost(cls, design, site):
        return site.linear_cost(site.width, site.width) + site.linear_cost(site.width, site.dim_out) + Cost(
            params=site.width, state=4 * site.width)


class LearnedDesign(Design):
    kind: Literal["test-learned"] = "test-learned"


class Learned(StepMemory):
    """A gated unit that starts every document from a learned state."""

    def __init__(self, design: LearnedDesign, site: Any) -> None:
        super().__init__()
        self.start = site.parameter("start", (site.width,), lambda p: p.normal_())
        self.f = site.linear("forget", site.width, site.width, role="gate")
        self.out = site.linear("out", site.width, site.dim_out)

    def initial(self, batch, condition=None):
        return self.start.expand(batch, -1)

    def step(self, x, state):
        f = torch.sigmoid(self.f(x)).to(state.dtype)
        state = f * state + (1 - f) * x
        return self.out(state.to(x.dtype)), state

    @classmethod
    def cost(cls, design, site):
        return site.linear_cost(site.width, site.width, role="gate") + site.linear_cost(site.width, site.dim_out) + \
            Cost(params=site.width, state=4 * site.width)


class ClockDesign(Design):
    kind: Literal["test-clock"] = "test-clock"
    of: AnyMixer
    every: int = 4


class Clock(Mixer):
    """Its child learns from every n-th token of a document only; all tokens read it."""

    def __init__(self, design: ClockDesign, site: Any) -> None:
        super().__init__()
        self.of = site.build(design.of, "of")

    def initial(self, batch, condition=None):
        return self.of.initial(batch)

    def mix(self, x, state, ctx):
        gate = (ctx.position % self.design.every == self.design.every - 1).to(x.dtype)
        tick, write = (gate if g is None else gate * g.to(x.dtype) for g in (ctx.tick, ctx.write))
        return self.of(x, state, ctx.replace(tick=tick, write=write))

    @classmethod
    def traits(cls, design):
        child = registry.resolve(design.of.kind).traits(design.of)
        return Traits(streaming=child.streaming, soft_gates=child.soft_gates)

    @classmethod
    def cost(cls, design, site):
        return site.child_cost(design.of, "of")


KINDS = {DecayDesign: Decay, LearnedDesign: Learned, ClockDesign: Clock}


@pytest.fixture(autouse=True, scope="session")
def _kinds():
    before = dict(registry._classes)
    for design, mixer in KINDS.items():
        register(design)(mixer)
    yield
    registry._classes.clear()
    registry._classes.update(before)


@pytest.fixture
def design():
    """design(mixers, stack, **model) -> a recipe mapping of width 16."""
    def make(mixers: dict[str, Any], stack: list[Any], **model: Any) -> dict[str, Any]:
        return {"version": 1, "name": "carrier", "model": {"width": 16, "mixers": mixers, "stack": stack, **model}}
    return make
