"""Children side by side on the same input: outputs summed, averaged after a norm (Hymba, 2411.13676), gated, joined
or gates of the first.

    sum: sum_i y_i     mean-norm: mean_i s_i rms(y_i)     gate: sum_i softmax(W x)_i y_i     concat: W [y_1; ...; y_n]
    product: s_1 rms(y_1) prod_{i>1} sigmoid(s_i rms(y_i)), the others gate the first (Titans' MAG, 2501.00663)
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
    merge: Literal["sum", "mean-norm", "gate", "concat", "product"] = "sum"


class Product(nn.Module):
    """y_1, ..., y_n [B, T, D] -> s_1 rms(y_1) prod_{i>1} sigmoid(s_i rms(y_i)), with a weight s_i [D] each."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(count))

    def forward(self, ys: list[Tensor]) -> Tensor:
        first, *others = (norm(y) for norm, y in zip(self.norms, ys))
        for other in others:
            first = first * torch.sigmoid(other)
        return first

    @staticmethod
    def cost(count: int, width: int) -> Cost:
        return Cost(params=count * width)


@register(ParallelDesign)
class Parallel(Composite):
    def __init__(self, design: ParallelDesign, site: Any) -> None:
        super().__init__(design, site)
        self.merge, count = design.merge, len(design.of)
        self.norms = nn.ModuleList(RMSNorm(site.dim_out) for _ in design.of) if self.merge == "mean-norm" else None
        self.gate = site.linear("gate", site.width, count, role="gate") if self.merge == "gate" else None
        self.product = Product(count, site.dim_out) if self.merge == "product" else None
        self.join = site.linear("join", count * site.dim_out, site.dim_out) if self.merge == "concat" else None

    def mix(self, x: Tensor, state: State, ctx: Context) -> Out:
        outs = [child(x, past, ctx) for child, past in zip(self.of, self.pasts(state, ctx))]
        ys = [out.y for out in outs]
        if self.norms is not None:
            y = torch.stack([norm(v) for norm, v in zip(self.norms, ys)]).mean(0)
        elif self.gate is not None:
            weight = self.gate(x).softmax(-1)
            y = (torch.stack(ys, -1) * weight[..., None, :]).sum(-1)
        elif self.product is not None:
            y = self.product(ys)
        elif self.join is not None:
            y = self.join(torch.cat(ys, -1))
        else:
            y = torch.stack(ys).sum(0)
        return gathered(y, outs, ctx)

    @classmethod
    def words(cls, design: ParallelDesign) -> str:
        how = {"sum": "summed", "mean-norm": "normed and averaged", "gate": "weighed by a gate", "concat": "joined",
               "product": "the first gated by the others"}[design.merge]
        return f"{len(design.of)} side by side, {how}"

    @classmethod
    def cost(cls, design: ParallelDesign, site: Any) -> Cost:
        total = super().cost(design, site)
        count = len(design.of)
        if design.merge == "mean-norm":
            total += Cost(params=count * site.dim_out)
        elif design.merge == "product":
            total += Product.cost(count, site.dim_out)
        elif design.merge == "gate":
            total += site.linear_cost(site.width, count, role="gate")
        elif design.merge == "concat":
            total += site.linear_cost(count * site.dim_out, site.dim_out)
        return total
