"""sLSTM (xLSTM, 2405.04517): exponential input gate, normaliser, memory mixing inside each head.

    i, f, z, o = W x_t + R h_{t-1} + b, all block-diagonal, a block per head; i and f read conv(x), z and o read x
    m_t = max(log sigma(f) + m_{t-1}, i);  f' = exp(log sigma(f) + m_{t-1} - m_t);  i' = exp(i - m_t)
    c_t = f' c_{t-1} + i' tanh(z);  n_t = f' n_{t-1} + i';  h_t = sigma(o) c_t / n_t

The first token of a document has m_t = i (n = 0 says that there was none), so that n >= 1 ever after; h does not depend
on m, which carries no gradient, but where a write gate leaves a state between two. Weights are parameters, not linear
maps: ternary and low-rank maps do not reach them.
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
from postformer.layers.blocks import block_diagonal
from postformer.layers.local import ShortConvolution
from postformer.memory.cells import Step, Unit, unit, zeros
from postformer.memory.cells.feedback import by_head
from postformer.memory.rules.gates import fp32

NEVER = -1e30


@unit("slstm")
class SLstm(Unit):
    gate_weight: Tensor
    value_weight: Tensor
    recurrent_weight: Tensor
    uses = frozenset({"heads", "local"})
    states = 4
    four = Choices("cell c, its normaliser n and its output h", "none: gates",
                   "decay f_t per cell, chosen by the input and by h_{t-1}", "gated: c_t gains exp(i_t) z_t",
                   "c_t = f_t .* c_{t-1} + exp(i_t) .* z_t;  n_t = f_t .* n_{t-1} + exp(i_t);  h_t = o_t .* c_t / n_t")

    def __init__(self, design: Any, site: Any) -> None:
        super().__init__()
        self.forget_at, inner, self.heads = design.forget_at, design.inner(site.width), design.heads
        self.dim, wide = inner // self.heads, site.width // self.heads
        self.conv = ShortConvolution.of(site.width, design.local)
        for name, rows, columns in (("gate", wide, 2), ("value", wide, 2), ("recurrent", self.dim, 4)):
            std = 0.0 if name == "recurrent" else (2 / (5 * site.width)) ** 0.5
            weight = site.parameter(f"{name}_weight", (self.heads, rows, columns * self.dim),
                                    lambda p, std=std: p.normal_(0, std), decay=True)
            setattr(self, f"{name}_weight", weight)
        # The forget gate's bias falls from 5 to -7 over the cells of a head, and the faster the higher the layer.
        power = 0.3 + 1.3 * site.layer / max(1, site.num_layers - 1)
        forget = 5 - 12 * torch.linspace(0, 1, self.dim) ** power
        start = torch.stack([torch.zeros(self.dim), forget, torch.zeros(self.dim), torch.zeros(self.dim)]).flatten()
        self.bias = site.parameter("bias", (self.heads, 4 * self.dim), lambda p: p.copy_(start.expand_as(p)))

    def memory(self, batch: int, like: Tensor) -> State:
        return zeros(4, batch, self.heads, self.dim, like=like)

    def local(self, batch: int) -> State:
        return None if self.conv is None else self.conv.initial(batch)

    def prepare(self, x: Tensor, local: State, ctx: Context, once: bool) -> tuple[Tensor, Step, State]:
        seen = x
        if self.conv is not None:
            seen, local = self.conv(x, local, ctx, self.forget_at)
        parts = [block_diagonal(u, w).unflatten(-1, (self.heads, -1))
                 for u, w in ((seen, self.gate_weight), (x, self.value_weight))]
        drive, scale = fp32(torch.cat(parts, -1)) + fp32(self.bias), current().decay_scale
        drive, add = by_head(drive, self.recurrent_weight, once)
        # A state between the old and the new one has an m between theirs, and there h depends on it.
        partly = ctx.write is not None

        def step(drive: Tensor, state: State) -> tuple[Tensor, State]:
            h, c, n, m = state
            i, f, z, o = add(drive, h).chunk(4, -1)
            log_f = F.logsigmoid(f) * scale
            kept = log_f + torch.where(n == 0, NEVER, m)
            m = torch.maximum(kept, i) if partly else torch.maximum(kept.detach(), i.detach())
            keep, gain = torch.exp(kept - m), torch.exp(i - m)
            c = torch.addcmul(keep * c, gain, torch.tanh(z))
            n = torch.addcmul(gain, keep, n)
            h = torch.sigmoid(o) * (c / n)
            return h.flatten(1), (h, c, n, m)

        return drive, step, local

    @classmethod
    def cost(cls, design: Any, site: Any) -> Cost:
        inner, heads, width = design.inner(site.width), design.heads, site.width
        weights = (4 * width * inner + 4 * inner * inner) // heads
        return ShortConvolution.cost(width, design.local) + Cost(params=weights + 4 * inner,
                                                                 flops_per_token=2.0 * weights)
