"""The general parameterisation: q, k, v projections, local mixing, feature maps, rate and retention gates.

Loss l2: e = k, w = beta k, u = v (delta rule). Loss dot: k_add = beta k, v_add = v (linear attention). With R steps
each has its own k, v and beta (DeltaProduct, 2502.10297).

An implicit step of rate beta on the l2 loss, S = argmin |S - S_{t-1}|^2 + beta |S^T k - v|^2, is the gradient step of
size beta / (1 + beta |k|^2) (Longhorn, 2407.14207): it never overshoots, so keys need no norm.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from postformer.contract.affine import GDR
from postformer.contract.context import Context
from postformer.contract.state import State
from postformer.design.choices import Choices
from postformer.design.cost import Cost
from postformer.layers.local import ShortConvolution, shift_mixes
from postformer.layers.norm import l2norm
from postformer.layers.rotary import angles, rotary
from postformer.memory.matrix_design import MatrixDesign
from postformer.memory.rules import Rule, heads, rule
from postformer.memory.rules.gates import Decay, fp32

FEATURES = {
    "silu": F.silu,
    "elu1": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "softmax": lambda x: fp32(x).softmax(-1).to(x.dtype),
    "l2norm": l2norm,
}


@rule("qkv")
class Qkv(Rule):
    fixed = frozenset()
    local = ("none", "conv", "shift")
    grouped = True
    taps = True
    inputs = ("query", "key", "value")

    def __init__(self, design: MatrixDesign, site: Any) -> None:
        super().__init__()
        self.design, self.steps = design, design.update.steps
        self.value_heads, self.key_heads, self.dim_key, self.dim_value = design.sizes(site.width)
        keys, values = self.key_heads * self.dim_key, self.value_heads * self.dim_value
        self.widths = [keys, keys * self.steps, values * self.steps]
        self.q = site.linear("q", site.width, self.widths[0])
        self.k = site.linear("k", site.width, self.widths[1])
        self.v = site.linear("v", site.width, self.widths[2])
        self.rate = (site.linear("rate", site.width, self.value_heads * self.steps, role="gate")
                     if self.rated(design) else None)
        self.decay = Decay(design, site)
        self.columns = self.dim_value + (design.normaliser == "sum")
        self.conv = ShortConvolution.of(sum(self.widths), design.local)
        self.mix = (site.parameter("mix", (site.width,), lambda p: p.fill_(0.5)) if design.local.kind == "shift"
                    else None)

    def initial(self, batch: int) -> State:
        if self.conv is not None:
            return self.conv.initial(batch)
        return None if self.mix is None else self.mix.new_zeros(batch, 1, self.mix.shape[0])

    def forward(self, x: Tensor, local: State, ctx: Context) -> tuple[GDR, State]:
        x, q, k, v, local = self.project(x, local, ctx)
        return self.arguments(x, q, k, v), local

    def project(self, x: Tensor, local: State, ctx: Context) -> tuple[Tensor, Tensor, Tensor, Tensor, State]:
        """(x as the gates see it, q [B, H, T, dk], k and v [B, H, R*T, d], local state)"""
        if self.mix is not None:
            (x,), local = shift_mixes(x, local, [self.mix], ctx, self.design.forget_at)
        q, k, v = self.q(ctx.fed("query", x)), self.k(ctx.fed("key", x)), self.v(ctx.fed("value", x))
        if self.conv is not None:
            (q, k, v), local = self.conv.parts([q, k, v], local, ctx, self.design.forget_at)
        group = self.value_heads // self.key_heads
        scale = self.dim_key**-0.5 if self.design.normaliser == "none" else 1.0
        q = heads(self._features(q.unflatten(-1, (self.key_heads, -1)), ctx, scale).flatten(-2), self.key_heads, group)
        k = self._features(k.unflatten(-1, (self.steps * self.key_heads, -1)), ctx).flatten(-2)
        k, v = self._steps(k, self.key_heads, group), self._steps(v, self.value_heads)
        if self.design.normaliser != "none":
            v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        return x, q, k, v, local

    def arguments(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> GDR:
        g = self.decay(x)
        if self.design.loss == "l2":
            beta = self.size(x, k)
            return GDR(q, g, rate=beta, w=k if beta is None else None, e=k, u=v)
        return GDR(q, g, k_add=self.written(x, k), v_add=v)

    def written(self, x: Tensor, k: Tensor) -> Tensor:
        """Keys times the size of their step: [B, H, R*T, dk]"""
        beta = self.size(x, k)
        return k if beta is None else k * beta.to(k.dtype)

    def size(self, x: Tensor, k: Tensor) -> Tensor | None:
        """Of each step, [B, H, R*T, 1]; None: all are whole."""
        if self.rate is None and self.design.update.kind == "gradient":
            return None
        beta = k.new_ones(())
        if self.rate is not None:
            beta = torch.sigmoid(fp32(self.rate(x))) * (2 if self.design.reflects else 1)
            if self.design.rate == "stretched":
                beta = (1.1 * beta - 0.1).clamp(0, 2)
            beta = self._steps(beta, self.value_heads)
        if self.design.update.kind == "implicit":
            beta = beta / (1 + beta * fp32(k).square().sum(-1, keepdim=True))
        return beta

    def _features(self, x: Tensor, ctx: Context, scale: float = 1.0) -> Tensor:
        """x [B, T, heads, d] -> scale * features(x)"""
        *first, last = self.design.features or (None,)
        for name in first:
            x = FEATURES[name](x)
        if last == "l2norm":
            x = l2norm(x, scale=scale)
        else:
            x = x if last is None else FEATURES[last](x)
            x = x if scale == 1 else x * scale
        if self.design.position == "rope":
            if ctx.position is None:
                raise ValueError("position: rope needs ctx.position; the language model sets it")
            turn = angles(ctx.position, x.shape[-1], x.dtype)
            x = rotary(x.transpose(1, 2), turn, interleaved=True).transpose(1, 2)
        return x

    def _steps(self, x: Tensor, count: int, group: int = 1) -> Tensor:
        """[B, T, R * count * d] -> [B, count * group, T * R, d]: micro-steps follow each other in time."""
        if self.steps > 1:
            x = x.unflatten(-1, (self.steps, -1)).flatten(1, 2)
        return heads(x, count, group)

    @classmethod
    def check(cls, design: MatrixDesign) -> None:
        update = design.update
        if design.loss == "l2":
            if update.kind == "gradient" and not {"l2norm", "softmax"} & set(design.features):
                raise ValueError("loss l2 needs keys of bounded norm, or the state diverges: set features: l2norm, or "
                                 "update: implicit")
            if design.normaliser == "sum":
                raise ValueError("normaliser 'sum' divides by a sum of weights, which loss l2 does not have; "
                                 "set normaliser: none")
            if update.kind == "implicit" and design.reflects:
                raise ValueError("a rate up to 2 is for reflections, and an implicit step never goes past its "
                                 "target; use rate: sigmoid, or kind: gradient")
        if design.loss == "dot" and update.kind == "implicit":
            raise ValueError("loss dot is linear in S, so that an implicit step is a gradient step; use "
                             "kind: gradient, or loss: l2")
        if design.loss == "dot" and design.reflects:
            raise ValueError("a rate up to 2 reflects what loss l2 erases; with loss dot use sigmoid or one")
        if design.loss == "dot" and update.steps > 1 and design.retention.per == "none" and design.normaliser == "sum":
            raise ValueError("several steps of loss dot only add heads; use steps: 1, or loss: l2")
        if design.normaliser == "sum" and not {"elu1", "relu", "softmax"} & set(design.features):
            raise ValueError("normaliser 'sum' needs positive features, or it divides by zero: set features: elu1")

    @classmethod
    def rated(cls, design: MatrixDesign) -> bool:
        """The size of a step is chosen by the input, one number per head and step."""
        return design.rate != "one"

    @staticmethod
    def retained(design: MatrixDesign) -> tuple[str, str]:
        """The retention in words, and what it leaves of S_{t-1}."""
        r = design.retention
        words = {"none": "none"}.get(r.per) or (
            "fixed decay per head" if r.gate == "fixed" else f"decay per {r.per}, chosen by the input")
        return words, {"none": "S_{t-1}", "head": "a_t S_{t-1}", "channel": "Diag(a_t) S_{t-1}"}[r.per]

    @classmethod
    def choices(cls, design: MatrixDesign) -> Choices:
        steps, kind = design.update.steps, design.update.kind
        retention, keep = cls.retained(design)
        size = {"one": "1", "sigmoid": "in (0, 1)", "double-sigmoid": "in (0, 2)",
                "stretched": "in [0, 2]"}[design.rate]
        size = f"of size {size}" if kind == "gradient" else f"of rate {size}"
        update = f"{f'one {kind} step' if steps == 1 else f'{steps} {kind} steps'} {size}"
        rate = "" if design.rate == "one" else "b_t "
        if design.loss == "l2":
            once = "" if design.retention.per == "none" else ", decayed once"
            times = "" if steps == 1 else f"  ({steps} times per token{once})"
            step = "b_t" if kind == "gradient" else "c_t"
            rule = f"S_t = (I - {step} k_t k_t^T) {keep} + {step} k_t v_t^T{times}"
            if kind == "implicit":
                rule += f", c_t = {rate or '1 '}/ (1 + {rate}|k_t|^2)"
        else:
            rule = f"S_t = {keep} + {rate}k_t v_t^T"
        read = "o_t = S_t^T q_t" + (" / (z_t . q_t)" if design.normaliser == "sum" else "")
        return Choices("matrix" + (" and its normaliser z" if design.normaliser == "sum" else ""), design.loss,
                       retention, update, f"{rule};  {read}")

    @classmethod
    def flops(cls, design: MatrixDesign) -> float:
        return 2.0 + (4.0 if design.loss == "l2" else 2.0) * design.update.steps

    @classmethod
    def cost(cls, design: MatrixDesign, site: Any) -> Cost:
        value_heads, key_heads, dim_key, dim_value = design.sizes(site.width)
        steps = design.update.steps
        widths = [key_heads * dim_key, key_heads * dim_key * steps, value_heads * dim_value * steps]
        total = sum((site.linear_cost(site.width, w) for w in widths), Cost()) + Decay.cost(design, site)
        if cls.rated(design):
            total += site.linear_cost(site.width, value_heads * steps, role="gate")
        total += ShortConvolution.cost(sum(widths), design.local)
        if design.local.kind == "shift":
            total += Cost(params=site.width, state=4 * site.width)
        return total


class OneStep(Qkv):
    """What the papers share that change how one delta-rule step a token erases or writes."""

    @classmethod
    def check(cls, design: MatrixDesign) -> None:
        super().check(design)
        name = design.parameterisation
        if design.loss != "l2":
            raise ValueError(f"parameterisation '{name}' says how to erase, and loss {design.loss} erases nothing; "
                             "set loss: l2")
        if design.update.kind != "gradient" or design.update.steps > 1:
            raise ValueError(f"parameterisation '{name}' takes one gradient step a token; leave update.kind and "
                             "update.steps out, or use parameterisation: qkv")
        if design.reflects:
            raise ValueError(f"a rate up to 2 can make the state of parameterisation '{name}' grow; use sigmoid")
