"""Comba (2506.02475): the delta rule as closed-loop control, a scalar plus a low-rank transition.

    S_t = (a_t - b_t p_t k_t^T)^T S_{t-1} + b_t k_t v_t^T,    o_t = S_t^T (q_t - D p_t),    p_t = sigma(c) k_t

What is erased is read before the decay and weaker than what is written (state feedback, c per head); the query is
corrected by the key (output feedback, D per head). K1 with erase_before_decay: e = p, w = b k, u = v.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from postformer.contract.affine import GDR
from postformer.design.choices import Choices
from postformer.design.cost import Cost
from postformer.memory.matrix_design import MatrixDesign
from postformer.memory.rules import rule
from postformer.memory.rules.qkv import OneStep


@rule("comba")
class Comba(OneStep):
    def __init__(self, design: MatrixDesign, site: Any) -> None:
        super().__init__(design, site)
        self.feedback = site.parameter("feedback", (self.value_heads,), lambda p: p.fill_(1))
        self.correction = site.parameter("correction", (self.value_heads,), lambda p: p.fill_(1))

    def arguments(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> GDR:
        p = k * torch.sigmoid(self.feedback).to(k.dtype)[:, None, None]
        correction = self.correction.to(k.dtype)[:, None, None] * self.dim_key**-0.5
        return GDR(q - correction * p, self.decay(x), w=self.written(x, k), e=p, u=v, erase_before_decay=True)

    @classmethod
    def check(cls, design: MatrixDesign) -> None:
        super().check(design)
        if design.retention.per == "channel":
            raise ValueError("parameterisation 'comba' erases before it decays, which a decay per channel can turn "
                             "into growth; set retention.per: head")

    @classmethod
    def choices(cls, design: MatrixDesign) -> Choices:
        retention, keep = cls.retained(design)
        keep = keep.removesuffix("S_{t-1}").strip() or "I"
        rate = "" if design.rate == "one" else "b_t "
        return Choices("matrix", "l2", retention, "one gradient step, what it erases scaled by a learned c per head",
                       f"S_t = ({keep} - {rate}c k_t k_t^T) S_{{t-1}} + {rate}k_t v_t^T;  "
                       "o_t = S_t^T (q_t - d c k_t)")

    @classmethod
    def cost(cls, design: MatrixDesign, site: Any) -> Cost:
        return super().cost(design, site) + Cost(params=2 * design.sizes(site.width)[0])
