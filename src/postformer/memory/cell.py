"""Cells (kernel K5): recurrences that feed their own output back and so have no parallel form.

LSTM, GRU (dense recurrent maps), sLSTM (block-diagonal ones) and spiking neurons. Each is one parameterisation in
memory/cells; here it is found, run and counted. What needs no earlier state is done for all tokens in one product; only
the recurrence goes token by token. Its calls set a floor under the time of a token: at width 256, one sequence, one CPU
core some 50 to 80 microseconds, and four times that with gradients.
A write gate between 0 and 1 interpolates the states, as in every step memory; tick has no meaning and is ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from torch import Tensor

from postformer.contract.context import Context, gates
from postformer.contract.mixer import Mixer, Out, Traits
from postformer.contract.state import State
from postformer.design.base import Design, Scales
from postformer.design.choices import Choices
from postformer.design.cost import Cost
from postformer.design.registry import register
from postformer.kernels import sequential
from postformer.layers.norm import HeadNorm
from postformer.layers.spike import Surrogate
from postformer.memory.cells import resolve
from postformer.memory.shared_design import Convolved, Local

LONG, BLOCK = 1024, 64
"""Calls of more tokens than LONG keep every BLOCK-th state for the backward pass and recompute the others."""


class CellDesign(Design):
    kind: Literal["cell"] = "cell"
    parameterisation: str = "lstm"
    """lstm, gru, slstm or lif"""
    dim_inner: Annotated[int | None, Scales()] = Field(default=None, ge=1)
    """Cells; None: width"""
    heads: int = Field(default=1, ge=1)
    """Diagonal blocks of the weights (slstm), and groups of the norm"""
    local: Convolved = Local()
    """What slstm's input and forget gates see"""
    reset: Literal["soft", "hard"] = "soft"
    """What a spike does to the potential (lif): soft takes the threshold off, hard sets it to zero"""
    threshold: float = Field(default=1.0, gt=0)
    """At which a neuron spikes (lif)"""
    surrogate: Surrogate = "atan"
    """Gradient of a spike (lif)"""
    norm: Literal["none", "rms", "layer"] = "none"
    """Of the outputs, per head"""
    out: bool = False
    """A linear map after the cells; without one dim_inner is the width"""
    eps: float = Field(default=1e-5, gt=0)
    forget_at: Literal["segment", "document", "stream"] = "document"

    @model_validator(mode="after")
    def _sense(self) -> CellDesign:
        uses, fields = resolve(self.parameterisation).uses, type(self).model_fields
        for name in ("heads", "local", "reset", "threshold", "surrogate"):
            free = name in uses or (name == "heads" and self.norm != "none")
            if not free and getattr(self, name) != fields[name].default:
                raise ValueError(f"'{name}' means nothing to parameterisation '{self.parameterisation}'; leave it out")
        return self

    def inner(self, width: int) -> int:
        inner = self.dim_inner or width
        if inner % self.heads or width % self.heads:
            raise ValueError(f"{inner} cells on {width} channels do not divide into heads: {self.heads}; "
                             "give a divisor of both")
        return inner


@register(CellDesign)
class Cell(Mixer):
    def __init__(self, design: CellDesign, site: Any) -> None:
        super().__init__()
        self.forget_at, inner = design.forget_at, design.inner(site.width)
        self.params = resolve(design.parameterisation)(design, site)
        self.norm = (None if design.norm == "none" else
                     HeadNorm(design.heads, inner // design.heads, design.norm, design.eps))
        self.out = site.linear("out", inner, site.dim_out) if design.out else None

    def initial(self, batch: int, condition: Tensor | None = None) -> State:
        return self.params.memory(batch, next(self.parameters())), self.params.local(batch)

    def mix(self, x: Tensor, state: State, ctx: Context) -> Out:
        recompute = BLOCK if x.shape[1] > LONG else 0
        drive, step, local = self.params.prepare(x, state[1], ctx, once=not recompute)
        h, memory, *emitted = sequential(
            step, drive, state[0], reset=ctx.reset(self.forget_at), write=gates(ctx)[1], emit=ctx.emit,
            checkpoint=recompute,
        )
        y = h.to(x.dtype)
        if self.norm is not None:
            y = self.norm(y)
        if self.out is not None:
            y = self.out(y)
        return Out(y, (memory, local), emitted=(emitted[0], None) if emitted else None)

    @classmethod
    def traits(cls, design: CellDesign) -> Traits:
        alone = design.local.kind == "none"
        return Traits(soft_gates=alone, native_emit=alone,
                      exact_gradients=resolve(design.parameterisation).exact_gradients)

    @classmethod
    def choices(cls, design: CellDesign) -> Choices:
        return resolve(design.parameterisation).four

    @classmethod
    def cost(cls, design: CellDesign, site: Any) -> Cost:
        inner, params = design.inner(site.width), resolve(design.parameterisation)
        total = params.cost(design, site) + Cost(state=4 * params.states * inner)
        if design.norm != "none":
            total += Cost(params=inner)
        if design.out:
            return total + site.linear_cost(inner, site.dim_out)
        if inner != site.dim_out:
            raise ValueError(f"{inner} cells do not fit a layer of {site.dim_out} channels; set out: true, or leave "
                             "dim_inner out")
        return total
