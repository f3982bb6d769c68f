"""Vector memory (kernel K2): an elementwise recurrence h_t = a_t h_{t-1} + b_t, real or complex.

Selective scans (Mamba), gated linear recurrent units (RG-LRU, HGRN, minGRU), diagonal state spaces (S4D, S5). Each is
one parameterisation in memory/vectors; here it is found, run and counted. Limits: decay is elementwise.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from torch import Tensor

from postformer.contract.context import Context
from postformer.contract.mixer import Mixer, Out, Traits
from postformer.contract.state import State
from postformer.design.base import Design, Scales
from postformer.design.choices import Choices
from postformer.design.cost import Cost
from postformer.design.registry import register
from postformer.layers.spike import Surrogate
from postformer.memory.shared_design import Convolved, Local
from postformer.memory.vectors import resolve


class VectorDesign(Design):
    kind: Literal["vector"] = "vector"
    parameterisation: str = "mamba1"
    """mamba1, rglru, hgrn, mingru, mlgru, s4d, s5 or lif"""
    dim_inner: Annotated[int | None, Scales()] = Field(default=None, ge=1)
    """Channels of the recurrence; None: 2 width for mamba1, width otherwise"""
    dim_state: int = Field(default=16, ge=1)
    """States per channel (mamba1, s4d), or of the layer (s5)"""
    rank: int | None = Field(default=None, ge=1)
    """Of the step size's projection (mamba1); None: width / 16, rounded up"""
    inner_norm: bool = False
    """RMS norms on the step size, B and C (Jamba, 2403.19887)"""
    blocks: int = Field(default=1, ge=1)
    """Diagonal blocks of the gates' weights (rglru)"""
    bias: bool = False
    """On the projections in and out"""
    local: Convolved = Local()
    threshold: float = Field(default=1.0, gt=0)
    """At which a neuron spikes (lif)"""
    surrogate: Surrogate = "atan"
    """Gradient of a spike (lif)"""
    eps: float = Field(default=1e-6, gt=0)
    forget_at: Literal["segment", "document", "stream"] = "document"

    @model_validator(mode="after")
    def _sense(self) -> VectorDesign:
        uses, fields = resolve(self.parameterisation).uses, type(self).model_fields
        for name in ("dim_inner", "dim_state", "rank", "inner_norm", "blocks", "bias", "local", "threshold",
                     "surrogate"):
            if name not in uses and getattr(self, name) != fields[name].default:
                raise ValueError(f"'{name}' means nothing to parameterisation '{self.parameterisation}'; leave it out")
        if self.parameterisation == "s5" and self.dim_state % 2:
            raise ValueError("s5 keeps half of its states, the others are their conjugates: dim_state must be even")
        return self

    def scaled(self, ratio: float) -> VectorDesign:
        new = super().scaled(ratio)
        changes: dict[str, Any] = {}
        if self.blocks > 1:
            changes["blocks"] = max(1, round(self.blocks * ratio))
        if self.rank and "rank" in self.model_fields_set:
            changes["rank"] = max(1, round(self.rank * ratio))
        return new.model_copy(update=changes)

    def inner(self, width: int) -> int:
        inner = self.dim_inner or (2 * width if self.parameterisation == "mamba1" else width)
        if inner % self.blocks:
            raise ValueError(f"{inner} channels do not divide into blocks: {self.blocks}; give a divisor")
        return inner


@register(VectorDesign)
class Vector(Mixer):
    def __init__(self, design: VectorDesign, site: Any) -> None:
        super().__init__()
        self.design, self.forget_at = design, design.forget_at
        self.params = resolve(design.parameterisation)(design, site)

    def initial(self, batch: int, condition: Tensor | None = None) -> State:
        return self.params.initial(batch)

    def mix(self, x: Tensor, state: State, ctx: Context) -> Out:
        y, state = self.params(x, state, ctx)
        return Out(y, state)

    @classmethod
    def traits(cls, design: VectorDesign) -> Traits:
        return Traits(soft_gates=design.local.kind == "none", native_emit=False,
                      exact_gradients=resolve(design.parameterisation).exact_gradients)

    @classmethod
    def choices(cls, design: VectorDesign) -> Choices:
        return resolve(design.parameterisation).four

    @classmethod
    def cost(cls, design: VectorDesign, site: Any) -> Cost:
        return resolve(design.parameterisation).cost(design, site)
