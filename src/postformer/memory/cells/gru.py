"""Gated recurrent unit (1406.1078), with the reset gate after the recurrent map as in cuDNN and PyTorch.

    r, z = sigma(W x_t + R h_{t-1} + b);  n = tanh(W_n x_t + b_n + r (R_n h_{t-1} + b'_n));  h_t = (1 - z) n + z h_{t-1}
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from postformer.contract.context import Context
from postformer.contract.state import State
from postformer.design.choices import Choices
from postformer.design.cost import Cost
from postformer.memory.cells import Step, Unit, unit, zeros
from postformer.memory.cells.feedback import dense
from postformer.memory.rules.gates import fp32


@unit("gru")
class Gru(Unit):
    states = 1
    four = Choices("vector h", "none: gates", "decay z_t per cell, chosen by the input and by h_{t-1}",
                   "gated: h_t moves by 1 - z_t towards n_t",
                   "h_t = z_t .* h_{t-1} + (1 - z_t) .* tanh(W x_t + r_t .* R h_{t-1});  y_t = h_t")

    def __init__(self, design: Any, site: Any) -> None:
        super().__init__()
        self.inner = design.inner(site.width)
        self.gates = site.linear("gates", site.width, 2 * self.inner, bias=True, role="gate")
        self.value = site.linear("value", site.width, self.inner, bias=True)
        self.recurrent = site.linear("recurrent", self.inner, 3 * self.inner, role="gate")
        self.recurrent_bias = site.parameter("recurrent_bias", (self.inner,), lambda p: p.zero_())

    def memory(self, batch: int, like: Tensor) -> State:
        return zeros(1, batch, self.inner, like=like)

    def prepare(self, x: Tensor, local: State, ctx: Context, once: bool) -> tuple[Tensor, Step, State]:
        inner, bias = self.inner, self.recurrent_bias.expand(*x.shape[:2], -1)
        drive = fp32(torch.cat([self.gates(x), bias.to(x.dtype), self.value(x)], -1))
        drive, add = dense(drive, self.recurrent, x.dtype, once)

        def step(drive: Tensor, state: State) -> tuple[Tensor, State]:
            (h,) = state
            raw = add(drive[:, : 3 * inner], h)
            r, z = torch.sigmoid(raw[:, : 2 * inner]).chunk(2, -1)
            new = torch.tanh(torch.addcmul(drive[:, 3 * inner :], r, raw[:, 2 * inner :]))
            h = torch.lerp(new, h, z)
            return h, (h,)

        return drive, step, local

    @classmethod
    def cost(cls, design: Any, site: Any) -> Cost:
        inner = design.inner(site.width)
        total = site.linear_cost(site.width, 2 * inner, bias=True, role="gate")
        total += site.linear_cost(site.width, inner, bias=True)
        return total + site.linear_cost(inner, 3 * inner, role="gate") + Cost(params=inner)
