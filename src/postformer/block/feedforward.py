"""Feed-forwards: gated (SwiGLU, GeGLU, 2002.05202) and plain MLPs, one token at a time.

    gated: W_out norm(act(W_gate x) * W_up x)        plain: W_out norm(act(W_up x))
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from postformer.contract.context import Context
from postformer.contract.mixer import Mixer, Out, Traits
from postformer.contract.state import State
from postformer.design.base import Design, Scales
from postformer.design.cost import Cost
from postformer.design.registry import register
from postformer.layers.activation import Activation, activated
from postformer.layers.norm import RMSNorm


class FeedForwardDesign(Design):
    kind: Literal["swiglu", "geglu", "mlp"] = "swiglu"
    dim_hidden: Annotated[int | None, Scales()] = Field(default=None, ge=1)
    """None: expand * width, rounded up to a multiple of 8"""
    expand: float | None = Field(default=None, gt=0)
    """None: 8/3 gated, 4 plain"""
    activation: Activation | None = None
    """Of an mlp; None: gelu"""
    gated: bool = False
    """An mlp with a gate, such as relu2 (swiglu and geglu have one)"""
    bias: bool = False
    sub_norm: Literal["none", "rms"] = "none"
    """On the hidden channels, before W_out (2210.06423)"""
    eps: float = Field(default=1e-6, gt=0)

    @model_validator(mode="after")
    def _sense(self) -> FeedForwardDesign:
        if self.activation and self.kind != "mlp":
            raise ValueError(f"{self.kind} fixes its activation; leave it out, or use kind: mlp (with gated: true)")
        if self.gated and self.kind != "mlp":
            raise ValueError(f"{self.kind} is gated; leave it out, or use kind: mlp with an activation")
        if self.dim_hidden and self.expand:
            raise ValueError("give dim_hidden or expand, not both")
        return self

    def hidden(self, width: int) -> int:
        expand = self.expand or (8 / 3 if self.has_gate else 4)
        return self.dim_hidden or math.ceil(expand * width / 8) * 8

    @property
    def act(self) -> str:
        return {"swiglu": "silu", "geglu": "gelu-tanh"}.get(self.kind) or self.activation or "gelu"

    @property
    def has_gate(self) -> bool:
        return self.gated or self.kind != "mlp"


@register(FeedForwardDesign)
class FeedForward(Mixer):
    def __init__(self, design: FeedForwardDesign, site: Any, role: str = "projection") -> None:
        super().__init__()
        self.design, hidden, bias = design, design.hidden(site.width), design.bias
        self.gate = site.linear("gate", site.width, hidden, bias=bias, role=role) if design.has_gate else None
        self.up = site.linear("up", site.width, hidden, bias=bias, role=role)
        self.norm = RMSNorm(hidden, design.eps) if design.sub_norm == "rms" else nn.Identity()
        self.out = site.linear("out", hidden, site.dim_out, bias=bias, role=role)

    def transform(self, x: Tensor) -> Tensor:
        """x [..., D] -> y [..., D_out]"""
        if self.gate is None:
            return self.out(self.norm(activated(self.up(x), self.design.act)))
        return self.out(self.norm(activated(self.gate(x), self.design.act, self.up(x))))

    def mix(self, x: Tensor, state: State, ctx: Context) -> Out:
        return Out(self.transform(x))

    @classmethod
    def traits(cls, design: FeedForwardDesign) -> Traits:
        return Traits(two_way=True, stateful=False)

    @classmethod
    def cost(cls, design: FeedForwardDesign, site: Any, role: str = "projection") -> Cost:
        hidden, maps, bias = design.hidden(site.width), 1 + design.has_gate, design.bias
        up = sum((site.linear_cost(site.width, hidden, bias=bias, role=role) for _ in range(maps)), Cost())
        norm = Cost(params=hidden if design.sub_norm == "rms" else 0)
        return up + norm + site.linear_cost(hidden, site.dim_out, bias=bias, role=role)
