"""Continuous depth: steps of a token's own length, which sum to one.

    d_n = softplus(w . h_{n-1} + b),  cut where the sum would pass one; step number `most` takes what is left
    h_n = h_{n-1} + d_n f(h_{n-1})    (without a residual: h_{n-1} + d_n (f(h_{n-1}) - h_{n-1}))

An explicit Euler solution of dh/dt = f(h) over one unit of time, whose steps are learned. The loss "steps" is the
price times the mean over tokens of a count that has a derivative: the whole steps, and of the last the part of d_n that
was left to do (more than one where `most` cut it short). Measured: steps and tokens. Published: `depth`, that count
[B, T]. Tokens that have arrived are left out, with gradients as well.
Limits: a token at the border of needing one step more enters one more state with a step of almost no length, so with
state: each what others read there is not continuous in it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from postformer.block.depth.base import Ran, mean_over, there, wide
from postformer.block.depth.repeat import Applications, Repeating
from postformer.contract.context import Context
from postformer.contract.mixer import Out, Traits
from postformer.contract.state import State
from postformer.kernels.tape import recording


class Continuous(Repeating):
    def __init__(self, design: Any, site: Any, sublayer: Any, able: Traits, needs: frozenset[str]) -> None:
        super().__init__(design, site, sublayer, able, needs)
        self.starting_at(math.log(math.expm1(2 / design.most)))  # half of the steps at first

    def run(self, x: Tensor, plan: dict[str, Tensor], state: State, ctx: Context) -> Ran:
        design, active = self.design, there(x, ctx)
        apply = Applications(self, x, state, ctx)
        like = x if x.dtype == torch.float64 else x.float()
        rest, count, used = (like.new_full(x.shape[:2], v) for v in (1.0, 0.0, 0.0))
        h, made = x, torch.zeros_like(x)
        for n in range(design.most):
            if not (apply.waits or recording() or bool(active.any())):
                break
            d = torch.ones_like(rest) if self.gate is None else F.softplus(wide(self.gate, h)) \
                if n + 1 < design.most or design.price else rest
            ends = (d >= rest) | (n + 1 == design.most)
            if self.declared:
                ends = torch.full_like(ends, n + 1 == design.most)
                d = torch.full_like(rest, 1 / design.most)
            cut = torch.where(ends, rest, d)
            f = apply(n, h, active)
            step = torch.where(active, cut, 0).to(f.dtype)[..., None]
            if self.replaces:
                h = torch.where(active[..., None], (1 - step) * h + step * f, h)
                made = h
            else:
                made = made + step * f
                h = x + made
            floor = 1 / (2 * design.most)
            count = count + torch.where(active, torch.where(ends, rest / d.clamp_min(floor), 1), 0)
            used = used + active
            rest, active = rest - torch.where(active, cut, 0), active & ~ends
        return Ran(made, apply.state, {"steps": count, "used": used}, apply.outs)

    def out(self, x: Tensor, plan: dict[str, Tensor], ran: Ran, ctx: Context) -> Out:
        valid, count = there(x, ctx), ran.told["steps"]
        losses = {"steps": self.design.price * mean_over(valid, count)} if self.design.price else {}
        measured = {"steps": (ran.told["used"] * valid).sum(), "tokens": valid.sum()}
        return Out(ran.y, published={"depth": count}, losses=losses, measured=measured)

    @classmethod
    def adapted(cls, able: Traits, design: Any) -> Traits:
        return replace(able, native_emit=False)
