"""RWKV-7 time mix (2503.14456): token-shifted projections, vector rates a, an erase key of its own, value residual.

    S_t = Diag(w_t) S_{t-1} - (kappa_t .* a_t)(kappa_t^T S_{t-1}) + k_t v_t^T,    kappa = L2(k .* k_k)

K1 with erase_before_decay: e = kappa, w = a kappa, u = 0, k_add = k (1 + (a - 1) k_a), v_add = v.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from postformer.contract.affine import GDR
from postformer.contract.context import Context
from postformer.contract.state import State
from postformer.design.choices import Choices
from postformer.design.cost import Cost
from postformer.layers.local import shift_mixes
from postformer.layers.norm import l2norm
from postformer.memory.matrix_design import MatrixDesign
from postformer.memory.rules import Rule, heads, rule
from postformer.memory.rules.gates import fp32

STREAMS = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}


def rank(width: int, factor: float, power: float = 0.5) -> int:
    return max(32, round(factor * width**power / 32) * 32)


def shift_weights(width: int, layer: int, layers: int, power: float) -> Tensor:
    """1 - (i / width)^(power * (1 - layer / layers)): the paper's starting mix, by channel and depth."""
    return 1 - (torch.arange(width) / width) ** (power * (1 - layer / layers))


class Lora(nn.Module):
    """x -> b + act(x A) B, A starting at zero."""

    def __init__(self, site: Any, name: str, rank: int, out: int, bias: Tensor | None, act: Any) -> None:
        super().__init__()
        self.a = site.linear(f"{name}_a", site.width, rank, role="gate")
        self.b = site.linear(f"{name}_b", rank, out, role="gate")
        nn.init.zeros_(self.a.weight)
        nn.init.orthogonal_(self.b.weight, 0.1)
        self.bias = None if bias is None else site.parameter(f"{name}_bias", bias.shape, lambda p: p.copy_(bias))
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.act(self.a(x)))
        return y if self.bias is None else y + self.bias.to(y.dtype)


@rule("rwkv7")
class Rwkv7(Rule):
    local = ("shift",)
    taps = True
    four = Choices("matrix", "l2", "decay per channel, chosen by the input",
                   "one gradient step, a rate a_t for every channel",
                   "S_t = (Diag(w_t) - (a_t .* c_t) c_t^T) S_{t-1} + k_t v_t^T;  o_t = S_t^T r_t")

    def __init__(self, design: MatrixDesign, site: Any) -> None:
        super().__init__()
        self.design = design
        self.heads, _, self.dim_key, self.columns = design.sizes(site.width)
        self.width = site.width
        width, keys, values = site.width, self.heads * self.dim_key, self.heads * self.columns
        for name, power in STREAMS.items():
            start = shift_weights(width, site.layer, site.num_layers, power)
            setattr(self, f"x_{name}", site.parameter(f"x_{name}", (width,), lambda p, s=start: p.copy_(s)))
        self.r, self.k = site.linear("r", width, keys), site.linear("k", width, keys)
        self.v = site.linear("v", width, values)
        depth = site.layer / max(1, site.num_layers - 1)
        speed = -6.5 + 5 * (torch.arange(keys) / max(1, keys - 1)) ** (0.85 + depth**0.5)
        none = nn.Identity()
        self.decay = Lora(site, "decay", rank(width, 1.8), keys, speed, torch.tanh)
        self.rate = Lora(site, "rate", rank(width, 1.8), keys, torch.zeros(keys), none)
        self.gate = Lora(site, "gate", rank(width, 0.6, 0.8), values, None, torch.sigmoid)
        self.residual = (Lora(site, "residual", rank(width, 1.3), values, torch.ones(values), none)
                         if design.value_residual else None)
        self.k_k = site.parameter("k_k", (keys,), lambda p: p.fill_(0.85))
        self.k_a = site.parameter("k_a", (keys,), lambda p: p.fill_(1))
        self.r_k = site.parameter("r_k", (self.heads, self.dim_key), lambda p: p.zero_())

    def initial(self, batch: int) -> State:
        return self.k_k.new_zeros(batch, 1, self.width)

    def forward(self, x: Tensor, local: State, ctx: Context) -> tuple[GDR, State]:
        shares = [getattr(self, f"x_{name}") for name in STREAMS]
        (r, w, k, v, a, g), local = shift_mixes(x, local, shares, ctx, self.design.forget_at)
        r, k, v_in, v = self.r(r), self.k(k), v, self.v(v)
        decay = -math.exp(-0.5) * torch.sigmoid(fp32(self.decay(w)))
        first = v
        if self.residual is not None:
            first = ctx.shared[self.design.value_residual]  # type: ignore[index]
            v = v + (first - v) * torch.sigmoid(self.residual(v_in))
        a = torch.sigmoid(self.rate(a))
        kappa = l2norm((k * self.k_k.to(k.dtype)).unflatten(-1, (self.heads, -1)), 1e-12).flatten(-2)
        k = k * (1 + (a - 1) * self.k_a.to(k.dtype))
        weight = (r * k).unflatten(-1, (self.heads, -1)) * self.r_k.to(k.dtype)
        bonus = (weight.sum(-1, keepdim=True) * v.unflatten(-1, (self.heads, -1))).flatten(-2)
        kappas = heads(kappa, self.heads)
        rule = GDR(heads(r, self.heads), heads(decay, self.heads), w=kappas * heads(a, self.heads), e=kappas,
                   k_add=heads(k, self.heads), v_add=heads(v, self.heads), erase_before_decay=True,
                   aux={"bonus": bonus, "gate": self.gate(g), "value": first})
        return rule, local

    @classmethod
    def flops(cls, design: MatrixDesign) -> float:
        return 8.0

    @classmethod
    def cost(cls, design: MatrixDesign, site: Any) -> Cost:
        count, _, dim_key, dim_value = design.sizes(site.width)
        width, keys, values = site.width, count * dim_key, count * dim_value
        ranks = [(rank(width, 1.8), keys), (rank(width, 1.8), keys), (rank(width, 0.6, 0.8), values)]
        if design.value_residual:
            ranks.append((rank(width, 1.3), values))
        total = sum((site.linear_cost(width, r, role="gate") + site.linear_cost(r, out, role="gate")
                     for r, out in ranks), Cost())
        total += sum((site.linear_cost(width, d) for d in (keys, keys, values)), Cost())
        biases = 2 * keys + (values if design.value_residual else 0)
        return total + Cost(params=len(STREAMS) * width + biases + 3 * keys, state=4 * width)
