"""Learned allocation: a router decides per token how much each of several memories, of any kinds, has to say.

    p_t = softmax(W x_t),    y_t = sum_i a_ti M_i(x_t),    a = p, or with `top: 1` one at the largest p and else zero

All memories run on every token. `writes: all` lets each learn from every token; `writes: chosen` makes a_ti the tick
and write gate of memory i as well, so that a token is written where it is read (a token that a memory does not get is
read-only to it, as in the mixture of memories of 2502.13685, whose memories are matrices of one kind). With `top: 1`
the choice is hard forwards and p's backwards (straight-through, 1308.3432).
Limits: nothing is saved by a hard choice but interference; a list of keys keeps a token whole where its weight is above
zero, so soft weights do not thin it out. `top: null` with `writes: all` is `kind: parallel` with `merge: gate`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from postformer.contract.context import Context
from postformer.contract.mixer import Out, Traits
from postformer.contract.state import State
from postformer.design import registry
from postformer.design.base import Design
from postformer.design.cost import Cost
from postformer.design.grammar import AnyMixer
from postformer.design.registry import register
from postformer.kernels.tape import recording
from postformer.memory.compose.chain import Composite, gathered


class RouterDesign(Design):
    kind: Literal["router"] = "router"
    of: tuple[AnyMixer, ...] = Field(min_length=2)
    top: Literal[1] | None = None
    """1: one memory per token; None: all, weighted"""
    writes: Literal["all", "chosen"] = "all"
    """chosen: the weight of a memory is also its tick and write gate"""
    balance: float = Field(default=0.0, ge=0)
    """Weight of the loss that keeps the memories equally busy (2101.03961); 0: none"""

    @model_validator(mode="after")
    def _gated(self) -> RouterDesign:
        if self.writes == "chosen":
            for i, child in enumerate(self.of):
                traits = registry.resolve(child.kind).traits(child)
                if traits.stateful and not traits.soft_gates:
                    raise ValueError(f"writes: chosen makes tokens read-only for memories that do not get them, and "
                                     f"of.{i} ('{child.kind}') mixes neighbouring tokens before its memory; set "
                                     "local: none there, or writes: all")
                if traits.streaming == "growing":
                    raise ValueError(f"writes: chosen keeps an unknown share of the tokens in the growing list of "
                                     f"of.{i} ('{child.kind}'); give it a window, or set writes: all")
        return self


@register(RouterDesign)
class Router(Composite):
    def __init__(self, design: RouterDesign, site: Any) -> None:
        super().__init__(design, site)
        self.router = site.linear("router", site.width, len(design.of), role="gate")

    def mix(self, x: Tensor, state: State, ctx: Context) -> Out:
        raw = self.router(x)
        share = (raw if raw.dtype == torch.float64 else raw.float()).softmax(-1)
        weight = share
        if self.design.top == 1:
            each = torch.arange(share.shape[-1], device=share.device)
            hard = (each == share.argmax(-1, keepdim=True)).to(share.dtype)
            weight = hard + (share - share.detach())
        pasts = self.pasts(state, ctx)
        outs = [child(x, past, self._gates(weight[..., i], ctx)) for i, (child, past) in enumerate(zip(self.of, pasts))]
        y = (torch.stack([out.y for out in outs], -1) * weight[..., None, :].to(x.dtype)).sum(-1)
        out = gathered(y, outs, ctx)
        if not self.design.balance or recording():
            return out
        return out._replace(losses={**out.losses, "router": self.design.balance * imbalance(share, ctx.valid)})

    def _gates(self, weight: Tensor, ctx: Context) -> Context:
        if self.design.writes == "all":
            return ctx
        tick, write = (weight if g is None else weight * g.to(weight.dtype) for g in (ctx.tick, ctx.write))
        return ctx.replace(tick=tick, write=write)

    @classmethod
    def traits(cls, design: RouterDesign) -> Traits:
        made = super().traits(design)
        return replace(made, exact_gradients=made.exact_gradients and design.top is None)

    @classmethod
    def words(cls, design: RouterDesign) -> str:
        each = "each token read from one" if design.top else "each token read from all, weighed"
        return f"{len(design.of)} side by side, {each}; {'written there' if design.writes == 'chosen' else 'all learn'}"

    @classmethod
    def cost(cls, design: RouterDesign, site: Any) -> Cost:
        """Of all children; what a windowed list does not hold after hard choices is not taken off."""
        return super().cost(design, site) + site.linear_cost(site.width, len(design.of), role="gate")


def imbalance(share: Tensor, valid: Tensor | None) -> Tensor:
    """n sum_i f_i p_i of shares [B, T, n] over the tokens that exist: f_i the part of them with their largest share at
    i, p_i their mean share; 1 where all are equally busy, n where one gets everything."""
    count = share.shape[-1]
    flat = share.flatten(0, 1) if valid is None else share[valid]
    if not flat.shape[0]:
        return share.sum() * 0
    busy = F.one_hot(flat.argmax(-1), count).to(flat.dtype).mean(0)
    return count * (busy * flat.mean(0)).sum()
