"""Gated linear recurrent units without a state-dependent gate: HGRN (2311.04823), minGRU (2410.01201) and MLGRU, the
token mixer of the MatMul-free language model (2406.02528).

    HGRN:   f = lb + (1 - lb) sigma(W_f x);  h_t = f h_{t-1} + (1 - f) silu(W_c x);  y = W_o (rms(h) silu(W_g x))
    minGRU: z = sigma(W_z x);  h_t = (1 - z) h_{t-1} + z c(W_h x);  y = W_o h,  c(x) = x + 1/2 if x >= 0 else sigma(x)
    MLGRU:  f = sigma(W_f x);  h_t = f h_{t-1} + (1 - f) silu(W_c x);  y = W_o (sigma(W_g x) h)

MLGRU needs no matrix product where `linear: {projection: ternary, gate: ternary}` makes its four maps sums of inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from postformer.contract.context import Context
from postformer.contract.state import State
from postformer.design.choices import Choices
from postformer.design.cost import Cost
from postformer.layers.activation import activated
from postformer.layers.norm import RMSNorm
from postformer.memory.rules.gates import fp32
from postformer.memory.vectors import Unit, gated_scan, unit


class _Gated(Unit):
    uses = frozenset({"dim_inner", "bias"})
    four = Choices("vector", "dot", "decay f_t per channel, chosen by the input", "one gradient step of size 1 - f_t",
                   "h_t = f_t .* h_{t-1} + (1 - f_t) .* c_t;  y_t = h_t")

    def __init__(self, design: Any, site: Any) -> None:
        super().__init__()
        self.design, self.inner = design, design.inner(site.width)
        self.f = site.linear("f", site.width, self.inner, bias=design.bias, role="gate")
        self.c = site.linear("c", site.width, self.inner, bias=design.bias)
        self.out = site.linear("out", self.inner, site.dim_out, bias=design.bias)

    def initial(self, batch: int) -> State:
        dtype = torch.float64 if self.out.weight.dtype == torch.float64 else torch.float32
        return self.out.weight.new_zeros(batch, self.inner, dtype=dtype)


@unit("hgrn")
class Hgrn(_Gated):
    def __init__(self, design: Any, site: Any) -> None:
        super().__init__(design, site)
        self.gate = site.linear("gate", site.width, self.inner, bias=design.bias, role="gate")
        self.norm = RMSNorm(self.inner, design.eps)
        self.rank = site.rank
        self.bounds = site.tied("lower_bounds", (site.count, self.inner), lambda p: p.zero_())

    def forward(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        bound, raw = fp32(self.bounds()).softmax(0)[1 : self.rank + 1].sum(0), fp32(self.f(x))
        log_f = F.logsigmoid(raw) if self.rank == 0 else (bound + (1 - bound) * torch.sigmoid(raw)).log()
        write = (1 - bound) * torch.sigmoid(-raw)
        h = gated_scan(log_f, write * fp32(F.silu(self.c(x))), state, ctx, self.design.forget_at)
        return self.out(activated(self.gate(x), "silu", self.norm(h.to(x.dtype)))), h[:, -1]

    @classmethod
    def cost(cls, design: Any, site: Any) -> Cost:
        inner = design.inner(site.width)
        maps = [site.linear_cost(site.width, inner, bias=design.bias, role=r) for r in ("gate", "projection", "gate")]
        total = sum(maps, Cost()) + site.linear_cost(inner, site.dim_out, bias=design.bias)
        return total + Cost(params=inner + (site.count * inner if site.rank == 0 else 0), state=4 * inner)


@unit("mingru")
class MinGru(_Gated):
    def forward(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        raw, c = fp32(self.f(x)), fp32(self.c(x))
        value = torch.where(c >= 0, c + 0.5, torch.sigmoid(c))
        h = gated_scan(F.logsigmoid(-raw), torch.sigmoid(raw) * value, state, ctx, self.design.forget_at)
        return self.out(h.to(x.dtype)), h[:, -1]

    @classmethod
    def cost(cls, design: Any, site: Any) -> Cost:
        inner = design.inner(site.width)
        maps = [site.linear_cost(site.width, inner, bias=design.bias, role=r) for r in ("gate", "projection")]
        total = sum(maps, Cost()) + site.linear_cost(inner, site.dim_out, bias=design.bias)
        return total + Cost(state=4 * inner)


@unit("mlgru")
class Mlgru(_Gated):
    def __init__(self, design: Any, site: Any) -> None:
        super().__init__(design, site)
        self.gate = site.linear("gate", site.width, self.inner, bias=design.bias, role="gate")

    def forward(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        raw, c = fp32(self.f(x)), fp32(F.silu(self.c(x)))
        h = gated_scan(F.logsigmoid(raw), torch.sigmoid(-raw) * c, state, ctx, self.design.forget_at)
        return self.out(activated(self.gate(x), "sigmoid", h.to(x.dtype))), h[:, -1]

    @classmethod
    def cost(cls, design: Any, site: Any) -> Cost:
        inner = design.inner(site.width)
        maps = [site.linear_cost(site.width, inner, bias=design.bias, role=r) for r in ("gate", "projection", "gate")]
        total = sum(maps, Cost()) + site.linear_cost(inner, site.dim_out, bias=design.bias)
        return total + Cost(state=4 * inner)
