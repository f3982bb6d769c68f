"""A block around a memory: up, a short convolution, the memory, a skip, a gate, down (the mLSTM block, 2405.04517).

    u = W_u x;  c = silu(conv(u));  y = W_o (act(W_g x) * (M(...) + s * c))        s one number per channel

M reads c, or with `conv_on: [query, key]` reads u but for these inputs, which are fed with c. M is a memory of any
kind, of expand * width channels; naming inputs needs one whose traits list them. It should bring no local mixing and no
last map of its own (`local: none`, `read: {out: false}`).
Limits: tokens that are read-only or softly gated would enter the convolution's taps, so it has no soft gates.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor

from postformer.contract.context import FED, Context
from postformer.contract.mixer import Mixer, Out, Traits, prefixed
from postformer.contract.state import State
from postformer.design import registry
from postformer.design.base import Design, nearest
from postformer.design.cost import Cost
from postformer.design.grammar import AnyMixer
from postformer.design.registry import register
from postformer.layers.activation import activated
from postformer.layers.local import ShortConvolution
from postformer.memory.shared_design import Local


class EnvelopeDesign(Design):
    kind: Literal["envelope"] = "envelope"
    of: AnyMixer
    expand: float = Field(default=2.0, gt=0)
    """Channels of the memory: expand * width, rounded up to a multiple of 8"""
    conv: int = Field(default=4, ge=0)
    """Taps of the convolution; 0: none"""
    conv_bias: bool = True
    conv_on: tuple[Literal["query", "key", "value"], ...] = ()
    """Which of the memory's inputs see the convolved channels; (): all that it reads"""
    skip: bool = True
    """What the convolution gave, times one learned number per channel, is added to the memory's output"""
    gate: Literal["silu", "sigmoid", "none"] = "silu"

    @model_validator(mode="after")
    def _sense(self) -> EnvelopeDesign:
        if self.conv == 1:
            raise ValueError("a convolution of one tap mixes nothing; set conv: 0 for none, or 2 and more")
        if self.conv_on and not self.conv:
            raise ValueError("conv_on names inputs but there is no convolution; set conv: 4, or leave conv_on out")
        offered = _child(self).inputs
        for name in self.conv_on:
            if name not in offered:
                rest = nearest(name, offered) if offered else " It reads one input only; leave conv_on out."
                raise ValueError(f"'{name}' is no input of kind '{self.of.kind}' that can be fed apart.{rest}")
        return self

    @property
    def local(self) -> Local:
        return Local(kind="conv" if self.conv else "none", size=max(self.conv, 2), bias=self.conv_bias)

    def inner(self, width: int) -> int:
        return math.ceil(self.expand * width / 8) * 8


def _child(design: EnvelopeDesign) -> Traits:
    return registry.resolve(design.of.kind).traits(design.of)


@register(EnvelopeDesign)
class Envelope(Mixer):
    def __init__(self, design: EnvelopeDesign, site: Any) -> None:
        super().__init__()
        inner = design.inner(site.width)
        self.forget_at = getattr(design.of, "forget_at", "document")
        self.up = site.linear("up", site.width, inner)
        self.gate = site.linear("gate", site.width, inner, role="gate") if design.gate != "none" else None
        self.conv = ShortConvolution.of(inner, design.local)
        self.of = replace(site, dim_out=inner).build(design.of, "of", inner)
        self.skip = site.parameter("skip", (inner,), lambda p: p.fill_(1)) if design.skip else None
        self.out = site.linear("out", inner, site.dim_out)

    def initial(self, batch: int, condition: Tensor | None = None) -> State:
        return None if self.conv is None else self.conv.initial(batch), self.of.initial(batch)

    def mix(self, x: Tensor, state: State, ctx: Context) -> Out:
        local, past = state
        u = seen = self.up(x)
        if self.conv is not None:
            seen, local = self.conv(u, local, ctx, self.forget_at)
        inside = ctx
        if self.design.conv_on:
            fed = {f"{FED}{name}": seen for name in self.design.conv_on}
            inside = ctx.replace(shared={**ctx.shared, **fed})
        out = self.of(u if self.design.conv_on else seen, None if ctx.fresh else past, inside)
        y = out.y
        if self.skip is not None:
            y = y + self.skip.to(y.dtype) * seen
        if self.gate is not None:
            y = activated(self.gate(x), self.design.gate, y)
        return Out(self.out(y), (local, out.state), emitted=(None, out.emitted) if ctx.emit else None,
                   losses=prefixed("of", out.losses), measured=prefixed("of", out.measured))

    @classmethod
    def traits(cls, design: EnvelopeDesign) -> Traits:
        made, free = _child(design), not design.conv
        # Its child does what it cannot natively by itself; the convolution resets but does not emit.
        return replace(made, soft_gates=made.soft_gates and free, native_reset=True, native_emit=free,
                       two_way=made.two_way and free, stateful=made.stateful or not free, inputs=(), publishes=())

    @classmethod
    def words(cls, design: EnvelopeDesign) -> str:
        conv = f", a convolution of {design.conv} tokens" if design.conv else ""
        return f"{design.expand:g} times as wide{conv}" + (", gated" if design.gate != "none" else "")

    @classmethod
    def cost(cls, design: EnvelopeDesign, site: Any) -> Cost:
        inner = design.inner(site.width)
        total = site.linear_cost(site.width, inner) + site.linear_cost(inner, site.dim_out)
        if design.gate != "none":
            total += site.linear_cost(site.width, inner, role="gate")
        total += replace(site, dim_out=inner).child_cost(design.of, "of", inner)
        return total + ShortConvolution.cost(inner, design.local) + Cost(params=inner * design.skip)
