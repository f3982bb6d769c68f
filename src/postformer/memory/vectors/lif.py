"""Leaky integrate-and-fire neurons that do not reset, so that all tokens go at once (2304.12760).

    u_t = lambda u_{t-1} + W x_t;  s_t = 1 if u_t > theta else 0;  y_t = W_o s_t

lambda = sigma(decay) per neuron is learned. Gradients are surrogates (layers/spike.py). The scan and the walk over the
tokens round differently: in fp32 a potential within rounding of the threshold may spike in one and not in the other.
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
from postformer.memory.rules.gates import fp32
from postformer.memory.vectors import Unit, gated_scan, unit


@unit("lif")
class Lif(Unit):
    uses = frozenset({"dim_inner", "bias", "threshold", "surrogate"})
    exact_gradients = False
    four = Choices("vector u, read as spikes", "dot", "fixed decay per neuron", "one gradient step of size 1",
                   "u_t = a .* u_{t-1} + W x_t;  s_t = [u_t > theta]")

    def __init__(self, design: Any, site: Any) -> None:
        super().__init__()
        self.design, self.inner = design, design.inner(site.width)
        self.input = site.linear("input", site.width, self.inner, bias=design.bias)
        self.decay = site.parameter("decay", (self.inner,), lambda p: p.uniform_(0, 3.5))
        self.out = site.linear("out", self.inner, site.dim_out, bias=design.bias)

    def initial(self, batch: int) -> State:
        dtype = torch.float64 if self.decay.dtype == torch.float64 else torch.float32
        return self.decay.new_zeros(batch, self.inner, dtype=dtype)

    def forward(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        drive = fp32(self.input(x))
        log_decay = F.logsigmoid(fp32(self.decay)).expand(drive.shape)
        u = gated_scan(log_decay, drive, state, ctx, self.design.forget_at)
        s = spike(u - self.design.threshold, self.design.surrogate, current().rounding)
        return self.out(s.to(x.dtype)), u[:, -1]

    @classmethod
    def cost(cls, design: Any, site: Any) -> Cost:
        inner = design.inner(site.width)
        total = site.linear_cost(site.width, inner, bias=design.bias)
        total += site.linear_cost(inner, site.dim_out, bias=design.bias)
        return total + Cost(params=inner, state=4 * inner)
