"""mLSTM as in the blocks of xLSTM (2405.04517): q, k and v block-diagonal, gates that read them, nothing capped.

    q, k, v = W x in blocks of 4 channels;  i, log f = w . [q; k; v] + b, log sigma(w . [q; k; v] + b)

The recurrence, its stabiliser and the read are those of rules/mlstm.py. The block around it (projections up and down,
convolution, skip, gate) is kind: envelope.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from postformer.contract.affine import GDR
from postformer.contract.context import Context
from postformer.contract.state import State
from postformer.design.cost import Cost
from postformer.kernels import current
from postformer.layers.blocks import block_diagonal
from postformer.memory.matrix_design import MatrixDesign
from postformer.memory.rules import Rule, heads, rule
from postformer.memory.rules.gates import fp32
from postformer.memory.rules.mlstm import MLstm, stabilised

BLOCK = 4


@rule("xlstm")
class XLstm(Rule):
    soft_gates = False
    normalised = True
    inputs = ("query", "key", "value")
    four = MLstm.four
    q_weight: Tensor
    k_weight: Tensor
    v_weight: Tensor

    def __init__(self, design: MatrixDesign, site: Any) -> None:
        super().__init__()
        self.heads, _, self.dim_key, dim_value = design.sizes(site.width)
        self.forget_at, self.columns = design.forget_at, dim_value + 1
        for name in ("q", "k", "v"):
            weight = site.parameter(f"{name}_weight", (site.width // BLOCK, BLOCK, BLOCK),
                                    lambda p: p.normal_(0, BLOCK**-0.5), decay=True)
            setattr(self, f"{name}_weight", weight)
        self.i = site.linear("i", 3 * site.width, self.heads, bias=True, role="gate")
        self.f = site.linear("f", 3 * site.width, self.heads, bias=True, role="gate")
        with torch.no_grad():
            self.i.weight.zero_()
            self.f.weight.zero_()
            self.i.bias.normal_(0, 0.1)
            self.f.bias.copy_(torch.linspace(3, 6, self.heads))

    def initial(self, batch: int) -> State:
        dtype = torch.float64 if self.q_weight.dtype == torch.float64 else torch.float32
        return self.q_weight.new_zeros(batch, self.heads, dtype=dtype)

    def forward(self, x: Tensor, local: State, ctx: Context) -> tuple[GDR, State]:
        made = [block_diagonal(ctx.fed(name, x), weight) for name, weight in
                (("query", self.q_weight), ("key", self.k_weight), ("value", self.v_weight))]
        every = torch.cat(made, -1)
        i, f = fp32(self.i(every)), F.logsigmoid(fp32(self.f(every))) * current().decay_scale
        g, gain, floor, m = stabilised(i, f, local, ctx, self.forget_at)
        q, k, v = (heads(u, self.heads) for u in made)
        rule = GDR(q * self.dim_key**-0.5, g, k_add=k * gain.to(x.dtype),
                   v_add=torch.cat([v, torch.ones_like(v[..., :1])], -1), aux={"floor": floor})
        return rule, m

    @classmethod
    def cost(cls, design: MatrixDesign, site: Any) -> Cost:
        count, _, dim_key, dim_value = design.sizes(site.width)
        if not count * dim_key == count * dim_value == site.width or site.width % BLOCK:
            raise ValueError(f"parameterisation 'xlstm' maps its {site.width} channels in blocks of {BLOCK} to as many "
                             "keys and values; leave heads.dim_key and heads.dim_value out and give a width that is a "
                             f"multiple of {BLOCK}")
        total = Cost(params=3 * site.width * BLOCK, flops_per_token=6.0 * site.width * BLOCK, state=4 * count)
        gate = site.linear_cost(3 * site.width, count, bias=True, role="gate")
        return total + gate + gate
