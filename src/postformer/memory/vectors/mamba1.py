"""Mamba's selective scan (2312.00752), the whole block: in-projection, short convolution, scan, skip, gate, out.

    Delta_t = softplus(W_2 W_1 x + b);  h_t = exp(Delta_t A) h_{t-1} + Delta_t x_t B_t;  y = C_t h_t + D x_t
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from postformer.contract.context import Context, gates
from postformer.contract.state import State
from postformer.design.choices import Choices
from postformer.design.cost import Cost
from postformer.kernels import selective_scan
from postformer.layers.activation import activated
from postformer.layers.local import ShortConvolution
from postformer.layers.norm import RMSNorm
from postformer.memory.rules.gates import fp32, inverse_softplus_dt
from postformer.memory.vectors import Unit, unit


def step_rank(design: Any, width: int) -> int:
    return design.rank or math.ceil(width / 16)


@unit("mamba1")
class Mamba1(Unit):
    uses = frozenset({"dim_inner", "dim_state", "rank", "inner_norm", "bias", "local"})
    four = Choices("vector, N states per channel", "dot", "decay per channel and state, chosen by the input",
                   "one gradient step of size Delta_t",
                   "h_t = exp(Delta_t A) .* h_{t-1} + Delta_t x_t B_t;  y_t = C_t . h_t + D x_t")

    def __init__(self, design: Any, site: Any) -> None:
        super().__init__()
        self.design, self.inner, states = design, design.inner(site.width), design.dim_state
        self.widths = [step_rank(design, site.width), states, states]
        self.x = site.linear("x", site.width, self.inner, bias=design.bias)
        self.z = site.linear("z", site.width, self.inner, bias=design.bias)
        self.conv = ShortConvolution.of(self.inner, design.local)
        self.bcdt = site.linear("bcdt", self.inner, sum(self.widths), role="gate")
        self.dt = site.linear("dt", self.widths[0], self.inner, bias=True, role="gate")
        with torch.no_grad():
            nn.init.uniform_(self.dt.weight, -self.widths[0] ** -0.5, self.widths[0] ** -0.5)
            inverse_softplus_dt(self.dt.bias)
        start = torch.log(torch.arange(1, states + 1, dtype=torch.float32)).expand(self.inner, -1)
        self.A_log = site.parameter("A_log", (self.inner, states), lambda p: p.copy_(start))
        self.D = site.parameter("D", (self.inner,), lambda p: p.fill_(1))
        self.norms = nn.ModuleList(RMSNorm(w, design.eps) for w in self.widths) if design.inner_norm else None
        self.out = site.linear("out", self.inner, site.dim_out, bias=design.bias)

    def initial(self, batch: int) -> State:
        dtype = torch.float64 if self.A_log.dtype == torch.float64 else torch.float32
        memory = self.A_log.new_zeros(batch, *self.A_log.shape, dtype=dtype)
        return memory, None if self.conv is None else self.conv.initial(batch)

    def forward(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        memory, local = state
        z, u = self.z(x), self.x(x)
        if self.conv is not None:
            u, local = self.conv(u, local, ctx, self.design.forget_at)
        else:
            u = F.silu(u)
        dt, b, c = self.bcdt(u).split(self.widths, -1)
        if self.norms is not None:
            dt, b, c = (norm(v) for norm, v in zip(self.norms, (dt, b, c)))
        step = F.softplus(fp32(self.dt(dt)))
        tick, write = gates(ctx)
        if tick is not None:
            step = step * tick[..., None].to(step.dtype)
        if write is not None:
            b = b * write[..., None].to(b.dtype)
        y, memory = selective_scan(u, step, -fp32(self.A_log).exp(), b, c, memory, ctx.reset(self.design.forget_at),
                                   skip=self.D)
        return self.out(activated(z, "silu", y)), (memory, local)

    @classmethod
    def cost(cls, design: Any, site: Any) -> Cost:
        inner, states, rank = design.inner(site.width), design.dim_state, step_rank(design, site.width)
        total = site.linear_cost(site.width, inner, bias=design.bias) + \
            site.linear_cost(site.width, inner, bias=design.bias)
        total += site.linear_cost(inner, rank + 2 * states, role="gate")
        total += site.linear_cost(rank, inner, bias=True, role="gate")
        total += site.linear_cost(inner, site.dim_out, bias=design.bias)
        return total + ShortConvolution.cost(inner, design.local) + Cost(
            params=inner * states + inner + design.inner_norm * (rank + 2 * states),
            flops_per_token=4.0 * inner * states, state=4 * inner * states)
