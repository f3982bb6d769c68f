"""Children side by side on the same input: outputs summed, averaged after a norm (Hymba, 2411.13676), gated or joined.

    sum: sum_i y_i     mean-norm: mean_i s_i rms(y_i)     gate: sum_i softmax(W x)_i y_i     concat: W [y_1; ...; y_n]
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from postformer.contract.context import Context
from postformer.contract.mixer import Out
from postformer.contract.state import State
from postformer.design.base import Design
from postformer.design.cost import Cost
from postformer.design.grammar import AnyMixer
from postformer.design.registry import register
from postformer.layers.norm import RMSNorm
from postformer.memory.compose.chain import Composite, gathered


class ParallelDesign(Design):
    kind: Literal["parallel"] = "parallel"
    of: tuple[AnyMixer, ...] = Field(min_length=1)
    merge: Literal["sum", "mean-norm", "gate", "concat"] = "sum"


@register(ParallelDesign)
class Parallel(Composite):
    def __init__(self, design: ParallelDesign, site: Any) -> None:
        super().__init__(design, site)
        self.merge, count = design.merge, len(design.of)
        self.norms = nn.ModuleList(RMSNorm(site.dim_out) for _ in design.of) if self.merge == "mean-norm" else None
        self.gate = site.linear("gate", site.width, count, role="gate") if self.merge == "gate" else None
        self.join = site.linear("join", count * site.dim_out, site.dim_out) if self.merge == "concat" else None

    def mix(self, x: Tensor, state: State, ctx: Context) -> Out:
        outs = [child(x, past, ctx) for child, past in zip(self.of, state)]
        ys = [out.y for out in outs]
        if self.norms is not None:
            y = torch.stack([norm(v) for norm, v in zip(self.norms, ys)]).mean(0)
        elif self.gate is not None:
            weight = self.gate(x).softmax(-1)
            y = (torch.stack(ys, -1) * weight[..., None, :]).sum(-1)
        elif self.join is not None:
            y = self.join(torch.cat(ys, -1))
        else:
            y = torch.stack(ys).sum(0)
        return gathered(y, outs, ctx)

    @classmethod
    def cost(cls, design: ParallelDesign, site: Any) -> Cost:
        total = super().cost(design, site)
        count = len(design.of)
        if design.merge == "mean-norm":
            total += Cost(params=count * site.dim_out)
        elif design.merge == "gate":
            total += site.linear_cost(site.width, count, role="gate")
        elif design.merge == "concat":
            total += site.linear_cost(count * site.dim_out, site.dim_out)
        return total
