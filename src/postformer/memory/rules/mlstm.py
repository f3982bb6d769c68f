"""mLSTM as in xLSTM-7B (2405.04517, 2503.13427): exponential input gate, sigmoid forget gate, stabiliser.

    m_t = max(log f_t + m_{t-1}, i_t);  g_t = log f_t + m_{t-1} - m_t <= 0;  k_add = exp(i_t - m_t) k_t
    h_t = S_t^T q_t / max(|n_t . q_t|, exp(-m_t))          n is the state's column of ones

m starts at 0, as the reference's does. The output depends on m only through the 1e-6 in the read's denominator, so m
carries no gradient. Gates are soft-capped at 15.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from postformer.contract.affine import GDR
from postformer.contract.context import Context, gates
from postformer.contract.state import State
from postformer.design.choices import Choices
from postformer.design.cost import Cost
from postformer.kernels import current, max_plus_scan
from postformer.memory.matrix_design import MatrixDesign
from postformer.memory.rules import Rule, heads, rule
from postformer.memory.rules.gates import fp32

NEVER, CAP = -1e30, 15.0


def soft_cap(x: Tensor) -> Tensor:
    return CAP * torch.tanh(x / CAP)


def stabilised(i: Tensor, log_f: Tensor, m0: Tensor, ctx: Context, forget_at: str
               ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Raw input gates i and log forget gates [B, T, H] (scaled for checks already), running maximum m0 [B, H] ->

    (g and weight of the write as the kernel takes them [B, H, T, 1], floor of the denominator [B, H, T, 1], m [B, H]).
    """
    tick, write = gates(ctx)
    with torch.no_grad():
        seen = i if write is None else torch.where(write[..., None] > 0, i, NEVER)
        time = log_f if tick is None else log_f * tick[..., None].to(log_f.dtype)
        reset = ctx.reset(forget_at)
        if reset is not None:
            seen = torch.where(reset[..., None], torch.maximum(seen, time), seen)
        m = max_plus_scan(time.detach(), seen.detach(), m0, reset=reset)
        before = torch.cat([m0[:, None], m[:, :-1]], 1)
        if reset is not None:
            before = before.masked_fill(reset[..., None], 0)
        shift = before - m
    g = _at_most_zero(log_f + shift) / max(current().decay_scale, 1e-30)  # the kernel scales; the shift is no decay
    gain, floor = torch.exp(_at_most_zero(i - m)), torch.exp(-m.clamp(-80, 80))
    first, second, third = (v.transpose(1, 2)[..., None] for v in (g, gain, floor))
    return first, second, third, m[:, -1]


def _at_most_zero(x: Tensor) -> Tensor:
    """x without the rounding error above zero; the gradient passes (a clamp would stop it at random)."""
    return x - x.detach().clamp_min(0)


@rule("mlstm")
class MLstm(Rule):
    soft_gates = False
    normalised = True
    inputs = ("query", "key", "value")
    four = Choices("matrix and its normaliser n", "dot", "decay f_t per head, chosen by the input",
                   "one gradient step of exponential size exp(i_t)",
                   "S_t = f_t S_{t-1} + exp(i_t) k_t v_t^T;  o_t = S_t^T q_t / max(|n_t . q_t|, 1)")

    def __init__(self, design: MatrixDesign, site: Any) -> None:
        super().__init__()
        self.heads, _, self.dim_key, dim_value = design.sizes(site.width)
        self.forget_at, self.columns = design.forget_at, dim_value + 1
        self.q = site.linear("q", site.width, self.heads * self.dim_key)
        self.k = site.linear("k", site.width, self.heads * self.dim_key)
        self.v = site.linear("v", site.width, self.heads * dim_value)
        self.i = site.linear("i", site.width, self.heads, bias=True, role="gate")
        self.f = site.linear("f", site.width, self.heads, bias=True, role="gate")
        with torch.no_grad():
            self.i.bias.fill_(-10)
            self.f.bias.copy_(torch.linspace(3, 6, self.heads))

    def initial(self, batch: int) -> State:
        dtype = torch.float64 if self.i.weight.dtype == torch.float64 else torch.float32
        return self.i.weight.new_zeros(batch, self.heads, dtype=dtype)

    def forward(self, x: Tensor, local: State, ctx: Context) -> tuple[GDR, State]:
        i = soft_cap(fp32(self.i(x)))
        f = F.logsigmoid(soft_cap(fp32(self.f(x)))) * current().decay_scale
        g, gain, floor, m = stabilised(i, f, local, ctx, self.forget_at)
        q = heads(self.q(ctx.fed("query", x)), self.heads) * self.dim_key**-0.5
        k, v = heads(self.k(ctx.fed("key", x)), self.heads), heads(self.v(ctx.fed("value", x)), self.heads)
        rule = GDR(q, g, k_add=k * gain.to(x.dtype), v_add=torch.cat([v, torch.ones_like(v[..., :1])], -1),
                   aux={"floor": floor})
        return rule, m

    @classmethod
    def cost(cls, design: MatrixDesign, site: Any) -> Cost:
        count, _, dim_key, dim_value = design.sizes(site.width)
        total = sum((site.linear_cost(site.width, count * d) for d in (dim_key, dim_key, dim_value)), Cost())
        total += site.linear_cost(site.width, count, bias=True, role="gate")
        total += site.linear_cost(site.width, count, bias=True, role="gate")
        return total + Cost(state=4 * count)
