"""Griffin's recurrent block (2402.19427): two branches, short convolution, RG-LRU, gate, out.

    r = sigma(W_a x), i = sigma(W_x x), log a_t = -8 softplus(Lambda) r_t,
    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t)          (the first token of a document enters whole)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from postformer.contract.context import Context, positions
from postformer.contract.state import State
from postformer.design.choices import Choices
from postformer.design.cost import Cost
from postformer.layers.activation import activated
from postformer.layers.local import ShortConvolution
from postformer.memory.rules.gates import fp32
from postformer.memory.vectors import Unit, gated_scan, unit


def decay_range(p: Tensor) -> Tensor:
    """In place: Lambda such that a^8 is uniform in [0.9, 0.999] at r = 1."""
    a = torch.rand_like(p) * (0.999 - 0.9) + 0.9
    return p.copy_(torch.log(torch.expm1(-a.log() / 8)))


def bounded_sqrt(x: Tensor) -> Tensor:
    """sqrt(x) for x >= 0, with a derivative of at most 1000 as in the paper's code: finite where a gate is shut."""
    slope = x * (0.5 * x.detach().clamp_min(2.5e-7).rsqrt())
    return slope + (x.sqrt() - slope).detach()


def written(ctx: Context) -> Context:
    """The context in which tokens that only read do not exist: none of them is the first to enter."""
    if ctx.tick is None or ctx.write is None:
        return ctx
    taking = (ctx.tick > 0) | (ctx.write > 0)
    return ctx.replace(valid=taking if ctx.valid is None else taking & ctx.valid)


@unit("rglru")
class RgLru(Unit):
    uses = frozenset({"dim_inner", "blocks", "bias", "local"})
    four = Choices("vector", "dot", "decay per channel, chosen by the input",
                   "one gradient step of size sqrt(1 - a_t^2) i_t",
                   "h_t = a_t .* h_{t-1} + sqrt(1 - a_t^2) .* i_t .* x_t;  y_t = h_t")

    def __init__(self, design: Any, site: Any) -> None:
        super().__init__()
        self.design, self.inner, self.blocks = design, design.inner(site.width), design.blocks
        block = self.inner // self.blocks
        self.y = site.linear("y", site.width, self.inner, bias=design.bias)
        self.x = site.linear("x", site.width, self.inner, bias=design.bias)
        local = design.local
        self.conv = ShortConvolution(self.inner, local.size, local.bias, None) if local.kind == "conv" else None
        for name in ("input", "recurrence"):
            weight = site.parameter(f"{name}_weight", (self.blocks, block, block),
                                    lambda p: p.normal_(0, block**-0.5), decay=True)
            bias = site.parameter(f"{name}_bias", (self.blocks, block), lambda p: p.zero_())
            setattr(self, f"{name}_weight", weight)
            setattr(self, f"{name}_bias", bias)
        self.decay = site.parameter("decay", (self.inner,), decay_range)
        self.out = site.linear("out", self.inner, site.dim_out, bias=design.bias)

    def initial(self, batch: int) -> State:
        dtype = torch.float64 if self.decay.dtype == torch.float64 else torch.float32
        memory = self.decay.new_zeros(batch, self.inner, dtype=dtype)
        seen = torch.zeros(batch, dtype=torch.long, device=memory.device)
        return memory, None if self.conv is None else self.conv.initial(batch), seen

    def _gate(self, x: Tensor, name: str) -> Tensor:
        weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
        parts = x.unflatten(-1, (self.blocks, -1))
        raw = torch.einsum("bthi,hij->bthj", parts, weight.to(x.dtype)) + bias.to(x.dtype)
        return torch.sigmoid(raw.flatten(-2))

    def forward(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        memory, local, seen = state
        branch = self.y(x)
        u = self.x(x)
        if self.conv is not None:
            u, local = self.conv(u, local, ctx, self.design.forget_at)
        log_a = -8 * fp32(self._gate(u, "recurrence")) * F.softplus(fp32(self.decay))
        scale = bounded_sqrt(-torch.expm1(2 * log_a))
        age, seen = positions(seen, x.shape[1], written(ctx), self.design.forget_at)
        scale = torch.where((age == 0)[..., None], 1.0, scale)
        h = gated_scan(log_a, fp32(u * self._gate(u, "input")) * scale, memory, ctx, self.design.forget_at)
        return self.out(activated(branch, "gelu-tanh", h.to(x.dtype))), (h[:, -1], local, seen)

    @classmethod
    def cost(cls, design: Any, site: Any) -> Cost:
        inner = design.inner(site.width)
        block = inner // design.blocks
        total = site.linear_cost(site.width, inner, bias=design.bias) + \
            site.linear_cost(site.width, inner, bias=design.bias)
        total += site.linear_cost(inner, site.dim_out, bias=design.bias)
        return total + ShortConvolution.cost(inner, design.local) + Cost(
            params=2 * inner * block + 3 * inner, flops_per_token=4.0 * inner * block, state=4 * inner + 8)
