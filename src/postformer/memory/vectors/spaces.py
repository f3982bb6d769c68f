"""Diagonal state spaces with a fixed transition: S4D (2206.11893) and S5 (2208.04933), complex, zero-order hold.

    h_t = exp(Delta A) h_{t-1} + (exp(Delta A) - 1) / A  B x_t,    y_t = 2 Re(C h_t) + D x_t,    A = -exp(a) + i w
    S4D: N/2 complex states per channel, run as one FFT convolution; S5: P/2 complex states for the whole layer, a scan.

Then y <- W_out(glu(gelu(y))) as in S4's layer. Long inputs that restart, skip or gate tokens take the scan.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from postformer.contract.context import Context, gates
from postformer.contract.state import State
from postformer.design.choices import Choices
from postformer.design.cost import Cost
from postformer.kernels import diagonal_system
from postformer.memory.rules.gates import fp32
from postformer.memory.vectors import Unit, gated_scan, unit


class _Space(Unit):
    uses = frozenset({"dim_state"})
    four = Choices("vector, complex", "reconstruction of the past (HiPPO)", "fixed decay per state",
                   "one gradient step, fixed size",
                   "h_t = exp(Delta A) .* h_{t-1} + B x_t;  y_t = 2 Re(C h_t) + D x_t")

    def __init__(self, design: Any, site: Any) -> None:
        super().__init__()
        self.design, self.inner = design, site.width
        self.lanes = self.inner if design.parameterisation == "s4d" else 1
        self.states = max(1, design.dim_state // 2)
        shape = (self.lanes, self.states)
        self.log_dt = site.parameter("log_dt", (self.lanes, 1) if self.lanes > 1 else shape, lambda p: p.uniform_(
            math.log(1e-3), math.log(1e-1)))
        self.log_decay = site.parameter("log_decay", shape, lambda p: p.fill_(math.log(0.5)))
        turn = math.pi * torch.arange(self.states, dtype=torch.float32).expand(shape)
        self.turn = site.parameter("turn", shape, lambda p: p.copy_(turn))
        self.D = site.parameter("D", (self.inner,), lambda p: p.normal_())
        self.out = site.linear("out", self.inner, 2 * site.dim_out, bias=True)

    def _discrete(self) -> tuple[Tensor, Tensor]:
        """(Delta A, (exp(Delta A) - 1) / A), complex [lanes, states]"""
        a = torch.complex(-fp32(self.log_decay).exp(), fp32(self.turn))
        da = fp32(self.log_dt).exp() * a
        return da, torch.expm1(da) / a

    def initial(self, batch: int) -> State:
        dtype = torch.complex128 if self.D.dtype == torch.float64 else torch.complex64
        return torch.zeros(batch, self.lanes, self.states, dtype=dtype, device=self.D.device)

    def _finish(self, y: Tensor, x: Tensor) -> Tensor:
        y = F.gelu(y.to(x.dtype) + self.D.to(x.dtype) * x)
        return F.glu(self.out(y), -1)


@unit("s4d")
class S4d(_Space):
    def __init__(self, design: Any, site: Any) -> None:
        super().__init__(design, site)
        self.C = site.parameter("C", (self.inner, self.states, 2), lambda p: p.normal_(0, 0.5**0.5))

    def forward(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        da, b = self._discrete()
        c = torch.view_as_complex(fp32(self.C))
        if ctx.boundary is None and gates(ctx) == (None, None):
            y, state = diagonal_system(fp32(x), da, b, c, state)
            return self._finish(y, x), state
        log_a = da.expand(x.shape[0], x.shape[1], -1, -1)
        h = gated_scan(log_a, fp32(x)[..., None] * b, state, ctx, self.design.forget_at)
        return self._finish(2 * (h * c).sum(-1).real, x), h[:, -1]

    @classmethod
    def cost(cls, design: Any, site: Any) -> Cost:
        lanes, states = site.width, max(1, design.dim_state // 2)
        total = site.linear_cost(site.width, 2 * site.dim_out, bias=True)
        return total + Cost(params=lanes * (2 + 4 * states), state=8 * lanes * states)


@unit("s5")
class S5(_Space):
    def __init__(self, design: Any, site: Any) -> None:
        super().__init__(design, site)
        self.B = site.parameter("B", (self.states, self.inner, 2), lambda p: p.normal_(0, (2 * self.inner) ** -0.5),
                                decay=True)
        self.C = site.parameter("C", (self.inner, self.states, 2), lambda p: p.normal_(0, (2 * self.states) ** -0.5),
                                decay=True)

    def forward(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        da, b = self._discrete()
        b_in, c = torch.view_as_complex(fp32(self.B)), torch.view_as_complex(fp32(self.C))
        u = fp32(x)
        drive = torch.complex(F.linear(u, b_in.real), F.linear(u, b_in.imag))[:, :, None] * b
        log_a = da.expand(x.shape[0], x.shape[1], -1, -1)
        h = gated_scan(log_a, drive, state, ctx, self.design.forget_at)[:, :, 0]
        y = 2 * (F.linear(h.real, c.real) - F.linear(h.imag, c.imag))
        return self._finish(y, x), h[:, -1, None]

    @classmethod
    def cost(cls, design: Any, site: Any) -> Cost:
        states = design.dim_state // 2
        total = site.linear_cost(site.width, 2 * site.dim_out, bias=True)
        return total + Cost(params=3 * states + site.width * (1 + 4 * states),
                            flops_per_token=8.0 * site.width * states, state=8 * states)
