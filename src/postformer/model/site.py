"""The site that builds: hands a mixer its linear maps, parameters, children and stack-owned parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from postformer.contract.mixer import Mixer
from postformer.design import registry
from postformer.design.base import Design
from postformer.design.place import Place
from postformer.layers.linear import make_linear

Kind = Literal["matrix", "embedding", "head", "gate", "norm", "bias"]


@dataclass(frozen=True)
class Role:
    """How an optimiser shall treat a parameter."""

    kind: Kind
    decay: bool


class Tied:
    """A parameter that the stack owns, reached from a mixer without being registered there."""

    def __init__(self, owner: nn.ParameterDict, name: str) -> None:
        self.owner, self.name = owner, name

    def __call__(self) -> Tensor:
        return self.owner[self.name]


class Ledger:
    """What the sites of one model have made: the roles of parameters, the maps named `out`, and the stack's tied
    parameters."""

    def __init__(self) -> None:
        self.roles: dict[int, Role] = {}
        self.outs: dict[nn.Module, str] = {}
        self.tied = nn.ParameterDict()
        self.owners: dict[str, str] = {}
        self.called: dict[str, tuple[str, str]] = {}


@dataclass(frozen=True)
class BuildSite(Place):
    """A place that can build."""

    ledger: Ledger = field(default_factory=Ledger)

    @classmethod
    def at(cls, place: Place, ledger: Ledger) -> BuildSite:
        return cls(**{f: getattr(place, f) for f in place.__dataclass_fields__ if f != "ledger"}, ledger=ledger)

    def linear(self, name: str, d_in: int, d_out: int, *, bias: bool = False, role: str = "projection") -> nn.Module:
        """A linear map of this role, as the design says. Maps named `out` start smaller with depth."""
        made = make_linear(self.linears.of(role), d_in, d_out, bias)
        std = d_in**-0.5 / (3**0.5)
        if name == "out":
            self.ledger.outs[made] = self.path
            std /= (2 * self.num_layers) ** 0.5
        nn.init.normal_(made.weight, 0, std)
        for parameter in made.parameters():  # low-rank updates as well
            self.ledger.roles[id(parameter)] = Role("matrix" if role != "gate" else "gate", True)
        if made.bias is not None:
            nn.init.zeros_(made.bias)
            self.ledger.roles[id(made.bias)] = Role("bias", False)
        return made

    def parameter(self, name: str, shape: Sequence[int], init: Callable[[Tensor], Any], *, role: str = "gate",
                  decay: bool = False) -> nn.Parameter:
        """A parameter of the mixer's own."""
        made = nn.Parameter(torch.empty(*shape))
        with torch.no_grad():
            init(made)
        self.ledger.roles[id(made)] = Role("gate" if role == "gate" else "norm", decay)
        return made

    def tied(self, name: str, shape: Sequence[int], init: Callable[[Tensor], Any]) -> Callable[[], Tensor]:
        """One parameter for all uses of this mixer, owned by the stack."""
        key = f"{name}-{'x'.join(map(str, shape))}"
        if self.ledger.owners.setdefault(key, self.identity) != self.identity:
            key = f"{key}-{self.identity.replace('.', '-')}"
        if key not in self.ledger.tied:
            made = self.parameter(name, shape, init)
            self.ledger.tied[key] = made
            self.ledger.called[key] = (self.identity, name)
            self.ledger.roles[id(self.ledger.tied[key])] = Role("gate", False)
        return Tied(self.ledger.tied, key)

    def build(self, design: Design, name: str, width: int | None = None,
              publish: frozenset[str] = frozenset()) -> Mixer:
        """A child mixer, through the registry; `publish`: which of its publications are wanted."""
        return build_mixer(design, replace(self, **vars_of(self.child(name, width, publish))))


def vars_of(place: Place) -> dict[str, Any]:
    return {f: getattr(place, f) for f in Place.__dataclass_fields__}


def build_mixer(design: Any, site: BuildSite) -> Mixer:
    """Any mixer, through the registry; it knows its own design afterwards."""
    mixer = registry.resolve(design.kind)(design, site)
    mixer.design, mixer.dim_in, mixer.dim_out = design, site.width, site.dim_out
    return mixer
