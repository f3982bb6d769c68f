"""A sublayer applied until the token halts (PonderNet, 2107.05407; Mixture-of-Recursions, 2507.10524).

    h_0 = x,  h_n = h_{n-1} + f(h_{n-1}), or f(h_{n-1}) without a residual      n = 1..most, one f for all n
    l_n = sigmoid(w . h_n + b),  p_n = l_n prod_{j<n} (1 - l_j); the last takes the rest
    halt: hard      y = h_N, N the first n with p_1 + ... + p_n >= 1/2
    halt: expected  y = sum_n p_n h_n; at depth n the token is there for the state as far as it has not halted before

With least: 0 the choice begins at h_0 = x: a token may take nothing, and the first application runs for its state.
hard: forward is the same in training and in evaluation, so that a model decodes as it learned; backward goes through
sum_n p_n h_n and sum_n n p_n (straight through the choice of N). With gradients every token takes every step, those
after N only reading the states; without, tokens that have halted are left out, and the loop ends when all have.
Losses: "steps", price * mean N, and with a prior "prior", its weight times KL(p || geometric) (with gradients, or
halt: expected). Measured: steps and tokens. Published: `depth`, N or its expectation [B, T].
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from postformer.block.depth.base import Ran, mean_over, there, wide
from postformer.block.depth.repeat import Applications, Repeating
from postformer.contract.context import Context
from postformer.contract.mixer import Out, Traits
from postformer.contract.state import State
from postformer.kernels.tape import recording

TINY = 1e-30
"""Probabilities are at least this inside a logarithm."""


class Halting(Repeating):
    def __init__(self, design: Any, site: Any, sublayer: Any, able: Traits, needs: frozenset[str]) -> None:
        super().__init__(design, site, sublayer, able, needs)
        self.starting_at(-math.log(design.most))  # l = 1 / (most + 1): most of the steps are taken at first

    def run(self, x: Tensor, plan: dict[str, Tensor], state: State, ctx: Context) -> Ran:
        design, valid = self.design, there(x, ctx)
        hard = design.halt == "hard"
        every = torch.is_grad_enabled() or not hard
        apply = Applications(self, x, state, ctx)
        like = x if x.dtype == torch.float64 else x.float()
        rest, expected, divergence = (like.new_full(x.shape[:2], v) for v in (1.0, 0.0, 0.0))
        steps, active, h = torch.zeros_like(rest), valid, x
        y, mean, made = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x)
        for n in range(design.least, design.most + 1):
            if n:
                running = valid if every or n == 1 else active  # whatever it then takes, a token is written once
                if not (every or apply.waits or recording() or bool(running.any())):
                    break
                f = apply(n - 1, h, running, None if n == 1 or not every else active if hard else rest)
                if self.replaces:
                    made = f if every else torch.where(running[..., None], f, h)
                else:
                    made = f if n == 1 else made + f
                steps = steps + active
            elif self.replaces:
                made = x
            h = made if self.replaces else x + made
            p, left = rest, torch.zeros_like(rest)
            if self.gate is not None and n < design.most:
                halting = torch.sigmoid(wide(self.gate, h))
                p, left = halting * rest, (1 - halting) * rest
            stops = active & (left <= (0.0 if self.declared else 0.5))
            y, active = torch.where(stops[..., None], made, y), active & ~stops
            if every:
                mean, expected = mean + p.to(made.dtype)[..., None] * made, expected + n * p
                if design.prior is not None:
                    divergence = divergence + p * (p.clamp_min(TINY).log() - self._prior(n))
            rest = left
        if not hard:
            y, steps = mean, expected
        elif torch.is_grad_enabled():
            y, steps = y.detach() + (mean - mean.detach()), steps + (expected - expected.detach())
        told = {"steps": steps}
        if design.prior is not None and every:
            told["divergence"] = divergence
        return Ran(y, apply.state, told, apply.outs)

    def _prior(self, n: int) -> float:
        """Logarithm of the probability of n steps, from `least` on, cut at `most`."""
        design = self.design
        return (n - design.least) * math.log1p(-design.prior) + (math.log(design.prior) if n < design.most else 0.0)

    def out(self, x: Tensor, plan: dict[str, Tensor], ran: Ran, ctx: Context) -> Out:
        valid, steps = there(x, ctx), ran.told["steps"]
        losses = {"steps": self.design.price * mean_over(valid, steps)} if self.design.price else {}
        if "divergence" in ran.told:
            losses["prior"] = self.design.strength * mean_over(valid, ran.told["divergence"])
        measured = {"steps": (steps.detach() * valid).sum(), "tokens": valid.sum()}
        return Out(ran.y, published={"depth": steps}, losses=losses, measured=measured)

    @classmethod
    def adapted(cls, able: Traits, design: Any) -> Traits:
        exact = design.halt == "expected" or not design.decisions
        return replace(able, native_emit=False, exact_gradients=able.exact_gradients and exact)
