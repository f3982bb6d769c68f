"""Mixture-of-Depths (2404.02258): a token takes the sublayer if its score passes, and goes around it otherwise.

    s_t = w . x_t    or    a mean_h log(eps + v_th) + b of a publication v;   m_t = 1 if t is chosen, else 0
    y_t = x_t + m_t sigmoid(s_t) f(x)_t      (without a residual: x_t + m_t sigmoid(s_t) (f(x)_t - x_t))

choose: threshold (default): m_t = [s_t > b], the same in training and in evaluation, one token at a time. b is moved
between steps as the biases of experts are (2408.15664), in units of the scores' spread, so that it suits any scale:

    b <- b + rate * std(s) * (share of tokens chosen - capacity)

choose: top (the paper's): in training the ceil(capacity T) tokens of largest score in the sequence, which looks at the
future; in evaluation those with a predictor u . x_t + c > 0, which learned that choice by its cross-entropy (loss
"predictor", no gradient to x). Measured: on how many tokens the two agree.

A skipped token freezes the mixer's state (the tokens that run stand side by side: real savings), lets time pass
(clock), or writes (write); with the last two every token is run, and only outputs are left out. A mixer without state
always gets only the tokens that run.
Limits: at a step of decoding a batch is run whole as soon as one of its rows runs, unless the mixer has no state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from postformer.block.depth.base import Depth, Ran, mean_over, there, wide
from postformer.block.depth.compaction import Flat, Rows, following
from postformer.contract.context import Context, placed
from postformer.contract.mixer import Out, Traits
from postformer.contract.state import State
from postformer.design.depth import SELF

EPS = 1e-6
"""Beside a publication, inside the logarithm."""


class Skipped(NamedTuple):
    """With skip: freeze, around a mixer that has a state."""

    of: State
    next: Tensor
    """[B, 2] int64: position after the last token, and after the last that ran"""


class Skipping(Depth):
    threshold: Tensor
    """[1], a buffer that is saved with the weights; only `after_step` changes it."""

    def __init__(self, design: Any, site: Any, sublayer: Any, able: Traits, needs: frozenset[str]) -> None:
        super().__init__(design, site, sublayer, able, needs)
        self.frozen = design.skip == "freeze" and able.stateful
        self.passes_on = design.skip != "freeze"
        own = design.score == SELF
        self.score = site.linear("score", self.width, 1, role="gate") if own else None
        self.slope = None if own else site.parameter("slope", (1,), lambda p: p.fill_(1))
        self.offset = None if own else site.parameter("offset", (1,), lambda p: p.zero_())
        top = design.choose == "top"
        self.predictor = site.linear("predictor", self.width, 1, bias=True, role="gate") if top else None
        self.register_buffer("threshold", None if top else torch.zeros(1))

    def initial(self, batch: int, condition: Tensor | None = None) -> State:
        state = self.of.initial(batch)
        if not self.frozen:
            return state
        device = next(self.sublayer.parameters()).device
        return Skipped(state, torch.zeros(batch, 2, dtype=torch.long, device=device))

    def scored(self, x: Tensor, ctx: Context) -> Tensor:
        """[B, T], in fp32 or better."""
        if self.score is not None:
            return wide(self.score, x)
        name, told = self.design.score, ctx.shared[self.design.score]
        if not isinstance(told, Tensor) or told.shape[:2] != x.shape[:2] or told.ndim > 3:
            raise ValueError(f"'{name}' cannot be the score of a depth: it must be [B, T] or [B, T, H], one entry per "
                             f"token, e.g. a filter's variance; it is {tuple(getattr(told, 'shape', ()))}")
        told = told if told.dtype == torch.float64 else told.float()
        mean = torch.log(EPS + told.clamp_min(0)).flatten(2).mean(-1) if told.ndim == 3 else \
            torch.log(EPS + told.clamp_min(0))
        assert self.slope is not None
        assert self.offset is not None
        return self.slope * mean + self.offset

    def plan(self, x: Tensor, ctx: Context) -> dict[str, Tensor]:
        score, valid, found = self.scored(x, ctx), there(x, ctx), {}
        if self.predictor is not None:
            found["predicted"] = wide(self.predictor, x.detach())
        if self.declared:
            assert ctx.position is not None
            both = torch.stack([ctx.position, ctx.position + 1]).double()
            before, after = (self.design.capacity * both).floor()
            chosen = after > before
        elif self.design.capacity == 1:
            chosen = valid
        elif self.predictor is None:
            chosen = score > self.threshold.to(score.dtype)
        elif self.training:
            chosen = best(score.detach(), valid, self.design.capacity)
        else:
            chosen = found["predicted"] > 0
        return {**found, "score": score, "chosen": chosen & valid}

    def run(self, x: Tensor, plan: dict[str, Tensor], state: State, ctx: Context) -> Ran:
        chosen, full = plan["chosen"], self.sublayer.inputs(x, ctx)
        if self.able.stateful and not self.frozen:
            if self.design.skip == "clock":
                mask = chosen.to(x.dtype)
                ctx = ctx.replace(write=mask if ctx.write is None else ctx.write * mask)
            out = self.sublayer.branch(full, None if ctx.fresh else state, ctx)
            return Ran(out.y, out.state, {}, [out])
        least, after, past = int(torch.is_grad_enabled()), None, state
        if self.frozen:
            position, end = placed(state.next[:, 0], x.shape[1], ctx)
            ctx, past = ctx.replace(position=position), state.of
            after = following(chosen, ctx, state.next[:, 1])
            by: Rows | Flat = Rows(chosen, ctx, after, least)
            state = Skipped(past, torch.stack([end, after], 1))
        else:
            by = Flat(chosen, least)
        if by.empty:
            return Ran(x.new_zeros(x.shape), state, {}, [])
        out = self.sublayer.branch(by.take(full), None if ctx.fresh else past, by.context(ctx, self.needs))
        state = Skipped(out.state, state.next) if self.frozen else out.state
        return Ran(by.put(out.y), state, {}, [out])

    def out(self, x: Tensor, plan: dict[str, Tensor], ran: Ran, ctx: Context) -> Out:
        valid, chosen, score, y = there(x, ctx), plan["chosen"], plan["score"], ran.y
        weight = torch.where(chosen, torch.sigmoid(score), 0).to(y.dtype)[..., None]
        y = x + weight * (y - x) if self.replaces else weight * y
        told = score.detach() * valid
        measured, losses = {"steps": chosen.sum(), "tokens": valid.sum()}, {}
        if self.predictor is None:
            measured |= {"score": told.sum(), "square": told.square().sum()}
        else:
            agreed = (plan["predicted"] > 0) == chosen
            measured["agreed"] = (agreed & valid).sum()
            if self.training:
                wrong = F.binary_cross_entropy_with_logits(plan["predicted"], chosen.to(score.dtype), reduction="none")
                losses["predictor"] = mean_over(valid, wrong)
        return Out(y, published={"depth": chosen.to(score.dtype)}, losses=losses, measured=measured)

    def after_step(self, measured: Mapping[str, Tensor]) -> None:
        if self.predictor is not None or self.design.capacity == 1:
            return
        tokens = measured["tokens"].to(self.threshold).clamp_min(1)
        mean, square = measured["score"].to(tokens) / tokens, measured["square"].to(tokens) / tokens
        spread = (square - mean.square()).clamp_min(EPS**2).sqrt()
        share = measured["steps"].to(tokens) / tokens
        self.threshold += self.design.strength * spread * (share - self.design.capacity)

    @classmethod
    def adapted(cls, able: Traits, design: Any) -> Traits:
        return replace(able, native_emit=False, same_in_training=able.same_in_training and design.choose != "top")


def best(score: Tensor, valid: Tensor, capacity: float) -> Tensor:
    """[B, T] bool: of each row's tokens that exist, the ceil(capacity * their number) of largest score."""
    order = score.masked_fill(~valid, -math.inf).argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1) < torch.ceil(capacity * valid.sum(1, keepdim=True))
