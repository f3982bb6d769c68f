"""HGRN2 (2404.07904): k_add = 1 - f_t, decay f_t = lb + (1 - lb) sigma(.), lower bounds lb rising with depth.

The bounds of all layers come from one [layers, channels] parameter that the stack owns: a cumulative softmax over
depth, zero in the first layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from postformer.contract.affine import GDR
from postformer.contract.context import Context
from postformer.contract.state import State
from postformer.design.choices import Choices
from postformer.design.cost import Cost
from postformer.memory.matrix_design import MatrixDesign
from postformer.memory.rules import Rule, heads, rule
from postformer.memory.rules.gates import fp32


@rule("hgrn2")
class Hgrn2(Rule):
    four = Choices("matrix", "dot", "decay f_t per channel, with a floor that rises with depth",
                   "one gradient step of size 1 - f_t",
                   "S_t = Diag(f_t) S_{t-1} + (1 - f_t) v_t^T;  o_t = S_t^T q_t")

    def __init__(self, design: MatrixDesign, site: Any) -> None:
        super().__init__()
        self.heads, _, self.dim_key, self.columns = design.sizes(site.width)
        inner = self.heads * self.dim_key
        self.q = site.linear("q", site.width, inner)
        self.f = site.linear("f", site.width, inner, role="gate")
        self.v = site.linear("v", site.width, self.heads * self.columns)
        self.rank = site.rank
        self.bounds = site.tied("lower_bounds", (site.count, inner), lambda p: p.zero_())

    def forward(self, x: Tensor, local: State, ctx: Context) -> tuple[GDR, State]:
        share = fp32(self.bounds()).softmax(0)
        bound = share[1 : self.rank + 1].sum(0)
        raw = fp32(self.f(x))
        keep = bound + (1 - bound) * torch.sigmoid(raw)
        write = (1 - bound) * torch.sigmoid(-raw)
        g = F.logsigmoid(raw) if self.rank == 0 else keep.log()
        q = F.silu(self.q(x))
        return GDR(heads(q, self.heads), heads(g, self.heads), k_add=heads(write.to(x.dtype), self.heads),
                   v_add=heads(self.v(x), self.heads)), local

    @classmethod
    def cost(cls, design: MatrixDesign, site: Any) -> Cost:
        count, _, dim_key, dim_value = design.sizes(site.width)
        inner = count * dim_key
        total = site.linear_cost(site.width, inner) + site.linear_cost(site.width, inner, role="gate")
        total += site.linear_cost(site.width, count * dim_value)
        return total + Cost(params=site.count * inner if site.rank == 0 else 0)
