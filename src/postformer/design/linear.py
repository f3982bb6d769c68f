"""Which linear map stands for each role: dense, ternary (BitNet b1.58, 2402.17764) or with low-rank updates (LoRA,
2106.09685). The modules are in layers/linear."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from postformer.design.base import Design, Scales, nearest, one_of
from postformer.design.cost import Cost
from postformer.design.cost import linear as dense_cost


class Dense(Design):
    """y = W x + b"""

    kind: Literal["dense"] = "dense"

    @property
    def smooth(self) -> bool:
        """The outputs have a derivative, and the gradients are it."""
        return True

    def cost(self, d_in: int, d_out: int, bias: bool) -> Cost:
        return dense_cost(d_in, d_out, bias)


class Ternary(Design):
    """Weights -1, 0 or 1 times one scale, activations as integers with one scale per token; trained straight through
    the rounding. No parameter but those of the dense map, under the same names."""

    kind: Literal["ternary"] = "ternary"
    activations: Literal["none", 2, 3, 4, 5, 6, 7, 8] = 8
    """Bits; none: not rounded"""
    norm: Literal["rms", "none"] = "rms"
    """rms: x / rms(x), without weights, before x is rounded"""
    eps: float = Field(default=1e-6, gt=0)

    @property
    def smooth(self) -> bool:
        return False

    def cost(self, d_in: int, d_out: int, bias: bool) -> Cost:
        return dense_cost(d_in, d_out, bias)


class Lora(Design):
    """y = W x + b + alpha / rank * B A x; B starts at zero."""

    kind: Literal["lora"] = "lora"
    rank: Annotated[int, Scales(1)] = Field(default=8, ge=1)
    """Of the update; at most the smaller side of a map is used"""
    alpha: float | None = Field(default=None, gt=0)
    """None: the rank"""
    train_base: bool = False
    """W and b learn as well"""

    @property
    def smooth(self) -> bool:
        return True

    def inner(self, d_in: int, d_out: int) -> int:
        return min(self.rank, d_in, d_out)

    def cost(self, d_in: int, d_out: int, bias: bool) -> Cost:
        r = self.inner(d_in, d_out)
        return dense_cost(d_in, d_out, bias) + dense_cost(d_in, r) + dense_cost(r, d_out)


Linear = Dense | Ternary | Lora
KINDS: dict[str, type[Linear]] = {"dense": Dense, "ternary": Ternary, "lora": Lora}


AnyLinear = Annotated[Linear, one_of(KINDS, "linear map", "{kind: lora, rank: 8}")]


class Linears(Design):
    """The linear map of each role. Embedding, head and norms have none."""

    projection: AnyLinear = Dense()
    """What carries values: queries, keys, values, outputs, feed-forwards"""
    gate: AnyLinear = Dense()
    """What makes gates: decays, rates, input and output gates"""
    expert: AnyLinear = Dense()
    """Feed-forwards of a mixture of experts"""

    @model_validator(mode="before")
    @classmethod
    def _by_role(cls, value: Any) -> Any:
        if isinstance(value, str) or (isinstance(value, dict) and "kind" in value):
            raise ValueError("say which maps are meant, by role, e.g. {projection: ternary, gate: dense}; roles: "
                             f"{', '.join(cls.model_fields)}")
        return value

    def of(self, role: str) -> Linear:
        """ValueError for a role that does not exist."""
        if role not in Linears.model_fields:
            raise ValueError(f"no linear map has the role '{role}'.{nearest(role, Linears.model_fields)}")
        return getattr(self, role)

    @property
    def in_words(self) -> str:
        """By role, the maps that are not dense and what they do not leave at its default; empty where all are dense."""
        found = []
        for role in Linears.model_fields:
            design = self.of(role)
            if design.kind != "dense":
                said = design.model_dump(exclude_defaults=True)
                more = ", ".join(f"{name} {value}" for name, value in said.items() if name != "kind")
                found.append(f"{role} {design.kind}" + (f" ({more})" if more else ""))
        return "; ".join(found)

    @property
    def smooth(self) -> bool:
        return all(self.of(role).smooth for role in Linears.model_fields)
