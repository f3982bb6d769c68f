"""Leaky integrate-and-fire neurons with a reset (2109.12894): outputs are spikes, 0 or 1.

    soft:  u_t = lambda u_{t-1} + W x_t - theta s_{t-1}          hard:  u_t = lambda u_{t-1} (1 - s_{t-1}) + W x_t
    s_t = 1 if u_t > theta else 0

lambda = sigma(decay) per neuron is learned. Gradients are surrogates (layers/spike.py), and none flows through the
reset. In fp32 a potential within rounding of the threshold may spike here and not there.
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
from postformer.kernels import current
from postformer.layers.spike import spike
from postformer.memory.cells import Step, Unit, unit, zeros
from postformer.memory.rules.gates import fp32


@unit("lif")
class Lif(Unit):
    uses = frozenset({"reset", "threshold", "surrogate"})
    states = 1
    exact_gradients = False
    four = Choices("vector u, read as spikes", "dot", "fixed decay per neuron, and a reset where it spiked",
                   "one gradient step of size 1", "u_t = a .* u_{t-1} + W x_t - theta s_{t-1};  s_t = [u_t > theta]")

    def __init__(self, design: Any, site: Any) -> None:
        super().__init__()
        self.design, self.inner = design, design.inner(site.width)
        self.input = site.linear("input", site.width, self.inner, bias=True)
        self.decay = site.parameter("decay", (self.inner,), lambda p: p.uniform_(0, 3.5))

    def memory(self, batch: int, like: Tensor) -> State:
        return zeros(1, batch, self.inner, like=like)

    def prepare(self, x: Tensor, local: State, ctx: Context, once: bool) -> tuple[Tensor, Step, State]:
        design, hard, setting = self.design, self.design.reset == "hard", current()
        threshold, rounding = design.threshold, setting.rounding
        decay = torch.exp(F.logsigmoid(fp32(self.decay)) * setting.decay_scale)

        def step(drive: Tensor, state: State) -> tuple[Tensor, State]:
            (u,) = state
            before = spike(u.detach() - threshold, design.surrogate, rounding)
            if hard:
                u = torch.addcmul(drive, decay, u * (1 - before))
            else:
                u = torch.addcmul(drive.sub(before, alpha=threshold), decay, u)
            return spike(u - threshold, design.surrogate, rounding), (u,)

        return fp32(self.input(x)), step, local

    @classmethod
    def cost(cls, design: Any, site: Any) -> Cost:
        inner = design.inner(site.width)
        return site.linear_cost(site.width, inner, bias=True) + Cost(params=inner)
