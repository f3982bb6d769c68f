"""LSTM (Hochreiter and Schmidhuber 1997, with the forget gate of Gers 2000; as in 1409.2329).

    i, f, o = sigma(W x_t + R h_{t-1} + b);  g = tanh(W_g x_t + R_g h_{t-1} + b_g)
    c_t = f c_{t-1} + i g;  h_t = o tanh(c_t)

R is dense. The forget gate's bias starts at 1. No peepholes.
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


@unit("lstm")
class Lstm(Unit):
    states = 2
    four = Choices("cell c and its output h", "none: gates", "decay f_t per cell, chosen by the input and by h_{t-1}",
                   "gated: c_t gains i_t g_t",
                   "c_t = f_t .* c_{t-1} + i_t .* tanh(W x_t + R h_{t-1});  h_t = o_t .* tanh(c_t)")

    def __init__(self, design: Any, site: Any) -> None:
        super().__init__()
        self.inner = design.inner(site.width)
        self.gates = site.linear("gates", site.width, 3 * self.inner, bias=True, role="gate")
        self.value = site.linear("value", site.width, self.inner, bias=True)
        self.recurrent = site.linear("recurrent", self.inner, 4 * self.inner, role="gate")
        with torch.no_grad():
            self.gates.bias[self.inner : 2 * self.inner] = 1.0

    def memory(self, batch: int, like: Tensor) -> State:
        return zeros(2, batch, self.inner, like=like)

    def prepare(self, x: Tensor, local: State, ctx: Context, once: bool) -> tuple[Tensor, Step, State]:
        inner = self.inner
        drive = fp32(torch.cat([self.gates(x), self.value(x)], -1))
        drive, add = dense(drive, self.recurrent, x.dtype, once)

        def step(drive: Tensor, state: State) -> tuple[Tensor, State]:
            h, c = state
            raw = add(drive, h)
            i, f, o = torch.sigmoid(raw[:, : 3 * inner]).chunk(3, -1)
            c = torch.addcmul(f * c, i, torch.tanh(raw[:, 3 * inner :]))
            h = o * torch.tanh(c)
            return h, (h, c)

        return drive, step, local

    @classmethod
    def cost(cls, design: Any, site: Any) -> Cost:
        inner = design.inner(site.width)
        total = site.linear_cost(site.width, 3 * inner, bias=True, role="gate")
        total += site.linear_cost(site.width, inner, bias=True)
        return total + site.linear_cost(inner, 4 * inner, role="gate")
