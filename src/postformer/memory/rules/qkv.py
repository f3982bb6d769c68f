"""The general parameterisation: q, k, v projections, local mixing, feature maps, rate and retention gates.

Loss l2: e = k, w = beta k, u = v (delta rule). Loss dot: k_add = beta k, v_add = v (linear attention). With R steps
each has its own k, v and beta (DeltaProduct, 2502.10297).
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
from postformer.layers.local import ShortConvolution, token_shift
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
    local = ("none", "conv", "shift")
    grouped = True

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
                     if design.rate != "one" else None)
        self.decay = Decay(design, site)
        self.columns = self.dim_value + (design.normaliser == "sum")
        local = design.local
        self.conv = (ShortConvolution(sum(self.widths), local.size, local.bias, local.activation)
                     if local.kind == "conv" else None)
        self.mix = (site.parameter("mix", (site.width,), lambda p: p.fill_(0.5)) if local.kind == "shift" else None)

    def initial(self, batch: int) -> State:
        if self.conv is not None:
            return self.conv.initial(batch)
        return None if self.mix is None else self.mix.new_zeros(batch, 1, self.mix.shape[0])

    def forward(self, x: Tensor, local: State, ctx: Context) -> tuple[GDR, State]:
        if self.mix is not None:
            before, local = token_shift(x, local, ctx, self.design.forget_at)
            x = torch.lerp(x, before, self.mix.to(x.dtype))
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.conv is not None:
            mixed, local = self.conv(torch.cat([q, k, v], -1), local, ctx, self.design.forget_at)
            q, k, v = mixed.split(self.widths, -1)
        group = self.value_heads // self.key_heads
        q = heads(self._features(q.unflatten(-1, (self.key_heads, -1)), ctx).flatten(-2), self.key_heads, group)
        k = self._features(k.unflatten(-1, (self.steps * self.key_heads, -1)), ctx).flatten(-2)
        k, v = self._steps(k, self.key_heads, group), self._steps(v, self.value_heads)
        if self.design.normaliser == "none":
            q = q * self.dim_key**-0.5
        else:
            v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        g = self.decay(x)
        beta = 1.0
        if self.rate is not None:
            beta = torch.sigmoid(fp32(self.rate(x))) * (2 if self.design.rate == "double-sigmoid" else 1)
            beta = self._steps(beta, self.value_heads).to(k.dtype)
        if self.design.loss == "l2":
            return GDR(q, g, w=k * beta, e=k, u=v), local
        return GDR(q, g, k_add=k * beta, v_add=v), local

    def _features(self, x: Tensor, ctx: Context) -> Tensor:
        """x [B, T, heads, d]"""
        for name in self.design.features:
            x = FEATURES[name](x)
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
    def choices(cls, design: MatrixDesign) -> Choices:
        r, steps = design.retention, design.update.steps
        retention = {"none": "none"}.get(r.per) or (
            "fixed decay per head" if r.gate == "fixed" else f"decay per {r.per}, chosen by the input")
        size = {"one": "1", "sigmoid": "in (0, 1)", "double-sigmoid": "in (0, 2)"}[design.rate]
        update = f"{'one gradient step' if steps == 1 else f'{steps} gradient steps'} of size {size}"
        keep = {"none": "S_{t-1}", "head": "a_t S_{t-1}", "channel": "Diag(a_t) S_{t-1}"}[r.per]
        rate = "" if design.rate == "one" else "b_t "
        if design.loss == "l2":
            times = "" if steps == 1 else f"  ({steps} times per token)"
            rule = f"S_t = (I - b_t k_t k_t^T) {keep} + b_t k_t v_t^T{times}"
        else:
            rule = f"S_t = {keep} + {rate}k_t v_t^T"
        read = "o_t = S_t^T q_t" + (" / (z_t . q_t)" if design.normaliser == "sum" else "")
        return Choices("matrix" + (" and its normaliser z" if design.normaliser == "sum" else ""), design.loss,
                       retention, update, f"{rule};  {read}")

    @classmethod
    def cost(cls, design: MatrixDesign, site: Any) -> Cost:
        value_heads, key_heads, dim_key, dim_value = design.sizes(site.width)
        steps = design.update.steps
        widths = [key_heads * dim_key, key_heads * dim_key * steps, value_heads * dim_value * steps]
        total = sum((site.linear_cost(site.width, w) for w in widths), Cost()) + Decay.cost(design, site)
        if design.rate != "one":
            total += site.linear_cost(site.width, value_heads * steps, role="gate")
        total += ShortConvolution.cost(sum(widths), design.local)
        if design.local.kind == "shift":
            total += Cost(params=site.width, state=4 * site.width)
        return total
