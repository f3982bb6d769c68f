"""Gated DeltaNet-2 (2605.22791): what is erased and what is written have a gate each, per channel.

    S_t = (I - k_t (b_t .* k_t)^T) Diag(exp g_t) S_{t-1} + k_t (w_t .* v_t)^T,    b_t = sigma(.), w_t = sigma(.)

K1: e = b k, w = k, u = w v. With b = w = one number per head it is KDA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from postformer.contract.affine import GDR
from postformer.design.choices import Choices
from postformer.design.cost import Cost
from postformer.memory.matrix_design import MatrixDesign
from postformer.memory.rules import heads, rule
from postformer.memory.rules.qkv import OneStep


@rule("gated-deltanet-2")
class GatedDeltaNet2(OneStep):
    fixed = frozenset({"update"})

    def __init__(self, design: MatrixDesign, site: Any) -> None:
        super().__init__(design, site)
        self.erase = site.linear("erase", site.width, self.value_heads * self.dim_key, role="gate")
        self.write = site.linear("write", site.width, self.value_heads * self.dim_value, role="gate")

    def arguments(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> GDR:
        erase, write = (heads(torch.sigmoid(gate(x)), self.value_heads) for gate in (self.erase, self.write))
        return GDR(q, self.decay(x), w=k, e=k * erase, u=v * write)

    @classmethod
    def rated(cls, design: MatrixDesign) -> bool:
        return False

    @classmethod
    def choices(cls, design: MatrixDesign) -> Choices:
        retention, keep = cls.retained(design)
        return Choices("matrix", "l2", retention, "one gradient step, a gate for every channel erased and written",
                       f"S_t = (I - k_t (b_t .* k_t)^T) {keep} + k_t (w_t .* v_t)^T;  o_t = S_t^T q_t")

    @classmethod
    def cost(cls, design: MatrixDesign, site: Any) -> Cost:
        count, _, dim_key, dim_value = design.sizes(site.width)
        return super().cost(design, site) + site.linear_cost(site.width, count * dim_key, role="gate") + \
            site.linear_cost(site.width, count * dim_value, role="gate")
