"""Children one after another, each reading the one before: y = M_n(... M_1(x))."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from postformer.contract.context import Context
from postformer.contract.mixer import Mixer, Out, Traits, joined, prefixed
from postformer.contract.state import State
from postformer.design import registry
from postformer.design.base import Design
from postformer.design.cost import Cost
from postformer.design.grammar import AnyMixer
from postformer.design.registry import register


class ChainDesign(Design):
    kind: Literal["chain"] = "chain"
    of: tuple[AnyMixer, ...] = Field(min_length=1)


class Composite(Mixer):
    """A mixer made of the children in `design.of`; its state is the tuple of theirs."""

    def __init__(self, design: Any, site: Any) -> None:
        super().__init__()
        self.of = nn.ModuleList(site.build(child, f"of.{i}") for i, child in enumerate(design.of))

    def initial(self, batch: int, condition: Tensor | None = None) -> State:
        return tuple(child.initial(batch) for child in self.of)  # type: ignore[operator]

    def pasts(self, state: State, ctx: Context) -> State:
        """The children's states; None for each where nothing has been seen, so that they know it too."""
        return (None,) * len(self.of) if ctx.fresh else state

    @classmethod
    def traits(cls, design: Any) -> Traits:
        # Its children do what they cannot natively by themselves.
        return replace(joined([registry.resolve(c.kind).traits(c) for c in design.of]), native_reset=True,
                       native_emit=True)

    @classmethod
    def cost(cls, design: Any, site: Any) -> Cost:
        return sum((site.child_cost(child, f"of.{i}") for i, child in enumerate(design.of)), Cost())


@register(ChainDesign)
class Chain(Composite):
    @classmethod
    def words(cls, design: ChainDesign) -> str:
        return f"{len(design.of)} one after another, each reading the one before"

    def mix(self, x: Tensor, state: State, ctx: Context) -> Out:
        outs = []
        for child, past in zip(self.of, self.pasts(state, ctx)):
            outs.append(child(x, past, ctx))
            x = outs[-1].y
        return gathered(x, outs, ctx)


def gathered(y: Tensor, outs: list[Out], ctx: Context) -> Out:
    """A composite's Out from its children's."""
    losses, measured = {}, {}
    for i, out in enumerate(outs):
        losses |= prefixed(f"of.{i}", out.losses)
        measured |= prefixed(f"of.{i}", out.measured)
    emitted = tuple(out.emitted for out in outs) if ctx.emit else None
    return Out(y, tuple(out.state for out in outs), emitted=emitted, losses=losses, measured=measured)
