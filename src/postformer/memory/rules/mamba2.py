"""Mamba-2 (2405.21060): q = C_t, k_add = B_t, v_add = Delta_t x_t, g = -exp(A) Delta_t, with a skip D x.

heads.value is the number of heads, heads.key the groups that share B and C, dim_key the state size N, dim_value P.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from postformer.contract.affine import GDR
from postformer.contract.context import Context
from postformer.contract.state import State
from postformer.design.choices import Choices
from postformer.design.cost import Cost
from postformer.layers.local import ShortConvolution
from postformer.memory.matrix_design import MatrixDesign
from postformer.memory.rules import Rule, heads, rule
from postformer.memory.rules.gates import fp32, inverse_softplus_dt, log_uniform_a


@rule("mamba2")
class Mamba2(Rule):
    local = ("none", "conv")
    taps = True
    grouped = True
    four = Choices("matrix", "dot", "decay per head, chosen by the input", "one gradient step of size Delta_t",
                   "S_t = exp(-A Delta_t) S_{t-1} + B_t (Delta_t x_t)^T;  o_t = S_t^T C_t + D x_t")

    def __init__(self, design: MatrixDesign, site: Any) -> None:
        super().__init__()
        self.design = design
        self.heads, self.groups, self.dim_key, self.columns = design.sizes(site.width)
        inner, shared = self.heads * self.columns, self.groups * self.dim_key
        self.widths = [inner, shared, shared]
        self.xbc = site.linear("xbc", site.width, sum(self.widths))
        self.dt = site.linear("dt", site.width, self.heads, role="gate")
        self.dt_bias = site.parameter("dt_bias", (self.heads,), inverse_softplus_dt)
        self.A_log = site.parameter("A_log", (self.heads,), log_uniform_a)
        self.D = site.parameter("D", (self.heads,), lambda p: p.fill_(1))
        self.conv = ShortConvolution.of(sum(self.widths), design.local)

    def initial(self, batch: int) -> State:
        return None if self.conv is None else self.conv.initial(batch)

    def forward(self, x: Tensor, local: State, ctx: Context) -> tuple[GDR, State]:
        mixed = self.xbc(x)
        if self.conv is not None:
            mixed, local = self.conv(mixed, local, ctx, self.design.forget_at)
        else:
            mixed = F.silu(mixed)
        v, b, c = mixed.split(self.widths, -1)
        step = F.softplus(fp32(self.dt(x)) + fp32(self.dt_bias))
        g = (-fp32(self.A_log).exp() * step).transpose(1, 2)[..., None]
        repeat = self.heads // self.groups
        values = heads(v, self.heads)
        skip = (v.unflatten(-1, (self.heads, -1)) * self.D.to(v.dtype)[:, None]).flatten(-2)
        rule = GDR(heads(c, self.groups, repeat), g, k_add=heads(b, self.groups, repeat),
                   v_add=values * step.transpose(1, 2)[..., None].to(values.dtype), aux={"skip": skip})
        return rule, local

    @classmethod
    def cost(cls, design: MatrixDesign, site: Any) -> Cost:
        count, groups, dim_key, dim_value = design.sizes(site.width)
        width = count * dim_value + 2 * groups * dim_key
        total = site.linear_cost(site.width, width) + site.linear_cost(site.width, count, role="gate")
        return total + Cost(params=3 * count) + ShortConvolution.cost(width, design.local)
