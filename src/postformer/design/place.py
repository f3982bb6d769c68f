"""Where a mixer stands in a model, as data: enough to compute its cost, and the base of the site that builds it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from postformer.design import registry
from postformer.design.base import Design, DesignError
from postformer.design.cost import Cost
from postformer.design.linear import Linears


@dataclass(frozen=True)
class Place:
    """The rank-th of `count` uses of a mixer, in layer `layer` of `num_layers`; x has `width` channels, y `dim_out`."""

    path: str
    layer: int
    num_layers: int
    rank: int
    count: int
    width: int
    dim_out: int
    causal: bool = True
    publish: frozenset[str] = frozenset()
    identity: str = ""
    """The same for all uses of one mixer, different for different ones"""
    linears: Linears = field(default_factory=Linears)
    """Which linear map each role has"""

    def linear_cost(self, d_in: int, d_out: int, *, bias: bool = False, role: str = "projection") -> Cost:
        """Cost of what `site.linear` makes for this role."""
        return self.linears.of(role).cost(d_in, d_out, bias)

    def child(self, name: str, width: int | None = None, publish: frozenset[str] = frozenset()) -> Place:
        """The place of a child mixer: same layer, x of `width` channels; which of its publications are wanted."""
        return replace(self, path=f"{self.path}.{name}", width=width or self.width, publish=publish,
                       identity=f"{self.identity}.{name}")

    def child_cost(self, design: Design, name: str, width: int | None = None,
                   publish: frozenset[str] = frozenset()) -> Cost:
        """Cost of a child, through the registry."""
        return mixer_cost(design, self.child(name, width, publish))


class NotDeclared(DesignError):
    """A kind whose author declared no cost."""


def mixer_cost(design: Any, place: Place) -> Cost:
    """Cost of any mixer; DesignError if its author declared none."""
    found = registry.resolve(design.kind).cost(design, place)
    if found is None:
        raise NotDeclared(f"kind '{design.kind}' declares no cost; give its class a `cost(design, site)`",
                          path=place.path)
    return found
