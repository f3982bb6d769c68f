"""Children one after another, each reading the one before: y = M_n(... M_1(x))."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from postformer.contract.context import Context
from postformer.contract.mixer import Mixer, Out, Traits
from postformer.contract.state import State
from postformer.design import registry
from postformer.design.base import Design
from postformer.design.cost import Cost
from postformer.design.grammar import AnyMixer
from postformer.design.registry import register


class ChainDesign(Design):
    kind: Literal["chain"] = "chain"
    of: tuple[AnyMixer, ...] = Field(min_length=1)


def joined_traits(children: tuple[Any, ...]) -> Traits:
    """What a composite can do: what all of its children can."""
    each = [registry.resolve(c.kind).traits(c) for c in children]
    return Traits(
        causal=all(t.causal for t in each),
        two_way=all(t.two_way for t in each),
        streaming="none" if any(t.streaming == "none" for t in each) else
        "growing" if any(t.streaming == "growing" for t in each) else "constant",
        soft_gates=all(t.soft_gates for t in each),
        stateful=any(t.stateful for t in each),
        exact_gradients=all(t.exact_gradients for t in each),
        reads=tuple(name for t in each for name in t.reads),
    )


@register(ChainDesign)
class Chain(Mixer):
    def __init__(self, design: ChainDesign, site: Any) -> None:
        super().__init__()
        self.of = nn.ModuleList(site.build(child, f"of.{i}") for i, child in enumerate(design.of))

    def initial(self, batch: int, condition: Tensor | None = None) -> State:
        return tuple(child.initial(batch) for child in self.of)  # type: ignore[operator]

    def mix(self, x: Tensor, state: State, ctx: Context) -> Out:
        outs = []
        for child, past in zip(self.of, state):
            outs.append(child(x, past, ctx))
            x = outs[-1].y
        return gathered(x, outs, ctx)

    @classmethod
    def traits(cls, design: ChainDesign) -> Traits:
        return joined_traits(design.of)

    @classmethod
    def cost(cls, design: ChainDesign, site: Any) -> Cost:
        return sum((site.child_cost(child, f"of.{i}") for i, child in enumerate(design.of)), Cost())


def gathered(y: Tensor, outs: list[Out], ctx: Context) -> Out:
    """A composite's Out from its children's."""
    losses = {f"of.{i}.{k}": v for i, out in enumerate(outs) for k, v in out.losses.items()}
    emitted = tuple(out.emitted for out in outs) if ctx.emit else None
    return Out(y, tuple(out.state for out in outs), emitted=emitted, losses=losses)
