"""A matrix memory of one's own on the delta rule's fast kernel: what is written decides how much is forgotten.

pip install -e examples/coupled && postformer verify examples/coupled/coupled.yaml
"""

from typing import Literal

import torch
import torch.nn.functional as F

from postformer.contract.affine import GDR, AffineMemory
from postformer.design import Cost, Design, register


class CoupledDesign(Design):
    kind: Literal["coupled"] = "coupled"
    heads: int = 4
    dim: int = 16


@register(CoupledDesign)
class Coupled(AffineMemory):
    """S <- (1 - b/2) S, then one delta step of rate b: S <- S + b k (v - S^T k)^T; read with q."""

    def __init__(self, design, site):
        super().__init__()
        self.heads, self.dim = design.heads, design.dim
        inner = design.heads * design.dim
        self.shape = (design.heads, design.dim, design.dim)
        self.qkv = site.linear("qkv", site.width, 3 * inner)
        self.gate = site.linear("rate", site.width, design.heads, bias=True, role="gate")
        self.out = site.linear("out", inner, site.dim_out)

    def rule(self, x, state, ctx):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.dim)).permute(2, 0, 3, 1, 4)
        b = self.gate(x).sigmoid().transpose(1, 2)[..., None]
        k = F.normalize(k, dim=-1)
        return GDR(q, torch.log1p(-b.to(torch.promote_types(b.dtype, torch.float32)) / 2), w=b * k, e=k, u=v), None

    def read(self, o, x, rule):
        return self.out(o.transpose(1, 2).flatten(-2))

    @classmethod
    def cost(cls, design, site):  # optional: what `explain` and matched comparisons compute without building
        inner = design.heads * design.dim
        maps = [site.linear_cost(site.width, 3 * inner), site.linear_cost(inner, site.dim_out),
                site.linear_cost(site.width, design.heads, bias=True, role="gate")]
        kernel = Cost(flops_per_token=6.0 * inner * design.dim, state=4 * inner * design.dim)
        return sum(maps, kernel)
