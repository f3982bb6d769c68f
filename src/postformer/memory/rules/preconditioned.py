"""Preconditioned DeltaNet (2604.21100): the delta rule's step divided by a running estimate of its curvature.

    A_t = exp(g'_t) A_{t-1} + b'_t k_t^2,    M_t = x^(-softsign(log(A_t + eps) - c)) in (1/x, x),    x = 3/2
    S_t = (I - b_t (M_t .* k_t) k_t^T) Diag(exp g_t) S_{t-1} + b_t (M_t .* k_t) v_t^T

K1: e = k, w = b M k, u = v; A, one number per key channel with a decay g' and a rate b' of its own, is K2 and part of
the state. b M < 2, so that the step is stable for keys of norm one.
"""

from __future__ import annotations

import math
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
from postformer.memory.rules import rule
from postformer.memory.rules.gates import fp32, inverse_softplus_dt, log_uniform_a
from postformer.memory.rules.qkv import OneStep
from postformer.memory.vectors import gated_scan

SPREAD, CENTRE, EPS = 1.5, -0.2, 1e-6
"""x, where c starts, eps"""


@rule("preconditioned")
class Preconditioned(OneStep):
    taps = False

    def __init__(self, design: MatrixDesign, site: Any) -> None:
        super().__init__(design, site)
        count = self.key_heads
        self.curvature_decay = site.linear("curvature_decay", site.width, count, role="gate")
        self.curvature_rate = site.linear("curvature_rate", site.width, count, role="gate")
        self.curvature_A_log = site.parameter("A_log", (count,), log_uniform_a)
        self.curvature_dt_bias = site.parameter("dt_bias", (count,), inverse_softplus_dt)
        self.centre = site.parameter("centre", (count,), lambda p: p.fill_(CENTRE))

    def initial(self, batch: int) -> State:
        dtype = torch.float64 if self.centre.dtype == torch.float64 else torch.float32
        curvature = self.centre.new_zeros(batch, self.key_heads, self.dim_key, dtype=dtype)
        return super().initial(batch), curvature

    def forward(self, x: Tensor, local: State, ctx: Context) -> tuple[GDR, State]:
        before, curvature = local
        x, q, k, v, before = self.project(x, before, ctx)
        step = F.softplus(fp32(self.curvature_decay(x)) + fp32(self.curvature_dt_bias))
        g = -fp32(self.curvature_A_log).exp() * step
        rate = torch.sigmoid(fp32(self.curvature_rate(x)))
        group = self.value_heads // self.key_heads
        squares = fp32(k[:, ::group]).square().transpose(1, 2)
        A = gated_scan(g[..., None], rate[..., None] * squares, curvature, ctx, self.design.forget_at)
        excess = (A + EPS).log() - fp32(self.centre)[:, None]
        gain = torch.exp(-math.log(SPREAD) * F.softsign(excess)).transpose(1, 2).repeat_interleave(group, 1)
        rule = GDR(q, self.decay(x), w=self.written(x, k) * gain.to(k.dtype), e=k, u=v)
        return rule, (before, A[:, -1])

    @classmethod
    def choices(cls, design: MatrixDesign) -> Choices:
        retention, keep = cls.retained(design)
        rate = "" if design.rate == "one" else "b_t "
        return Choices("matrix, and the curvature A of its keys", "l2", retention,
                       "one gradient step, preconditioned by a bounded power M of the curvature",
                       f"S_t = (I - {rate}(M_t .* k_t) k_t^T) {keep} + {rate}(M_t .* k_t) v_t^T, "
                       "A_t = a'_t A_{t-1} + b'_t k_t^2;  o_t = S_t^T q_t")

    @classmethod
    def cost(cls, design: MatrixDesign, site: Any) -> Cost:
        _, count, dim_key, _ = design.sizes(site.width)
        total = super().cost(design, site) + site.linear_cost(site.width, count, role="gate") + \
            site.linear_cost(site.width, count, role="gate")
        return total + Cost(params=3 * count, state=4 * count * dim_key)
