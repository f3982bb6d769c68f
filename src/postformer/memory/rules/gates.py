"""Standard log-decay gates, all g <= 0 in fp32; their raw parameters are excluded from weight decay."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from postformer.design.cost import Cost
from postformer.memory.matrix_design import MatrixDesign


def fp32(x: Tensor) -> Tensor:
    """At least fp32."""
    return x if x.dtype == torch.float64 else x.float()


def inverse_softplus_dt(x: Tensor) -> Tensor:
    """In place: softplus^-1 of step sizes drawn log-uniformly from [1e-3, 1e-1] (Mamba, 2312.00752)."""
    dt = torch.exp(torch.rand_like(x) * (math.log(0.1) - math.log(1e-3)) + math.log(1e-3)).clamp_min(1e-4)
    return x.copy_(dt + torch.log(-torch.expm1(-dt)))


def log_uniform_a(x: Tensor) -> Tensor:
    """In place: log of U(1, 16)."""
    return x.copy_(torch.log(torch.rand_like(x) * 15 + 1))


class LowRank(nn.Module):
    """x W_a W_b (+ b): a projection through a bottleneck."""

    def __init__(self, site: Any, name: str, d_in: int, rank: int, d_out: int, bias: bool = False) -> None:
        super().__init__()
        self.a = site.linear(f"{name}_a", d_in, rank, role="gate")
        self.b = site.linear(f"{name}_b", rank, d_out, bias=bias, role="gate")

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))

    @staticmethod
    def cost(site: Any, d_in: int, rank: int, d_out: int, bias: bool = False) -> Cost:
        return site.linear_cost(d_in, rank, role="gate") + site.linear_cost(rank, d_out, bias=bias, role="gate")


def gate_rank(rank: int | str | None, dim_value: int) -> int | None:
    return dim_value if rank == "dim-value" else rank  # type: ignore[return-value]


class Decay(nn.Module):
    """The retention gate of a design: x [B, T, D] -> g [B, H, T, 1] or [B, H, T, dk] (None: nothing is forgotten)."""

    def __init__(self, design: MatrixDesign, site: Any) -> None:
        super().__init__()
        r = design.retention
        self.kind, self.per = r.gate, r.per
        self.heads, _, dim_key, dim_value = design.sizes(site.width)
        self.channels = self.heads * (dim_key if r.per == "channel" else 1)
        if r.per == "none" or r.gate == "fixed":
            return
        rank, bias = gate_rank(r.rank, dim_value), r.gate != "mamba"
        self.map = (site.linear("decay", site.width, self.channels, bias=bias, role="gate") if rank is None
                    else LowRank(site, "decay", site.width, rank, self.channels, bias))
        if r.gate == "stretched":  # begins where it forgets 3 % a token, and still learns
            last = self.map.b if isinstance(self.map, LowRank) else self.map
            torch.nn.init.constant_(last.bias, 2.5)
        if r.gate == "mamba":
            self.A_log = site.parameter("A_log", (self.heads,), log_uniform_a)
            self.dt_bias = site.parameter("dt_bias", (self.channels,), inverse_softplus_dt)

    def forward(self, x: Tensor) -> Tensor | None:
        if self.kind == "fixed":
            dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
            power = -5.0 - torch.arange(self.heads, dtype=dtype, device=x.device)
            return torch.log1p(-torch.exp2(power)).view(1, -1, 1, 1).expand(x.shape[0], -1, x.shape[1], 1)
        if self.per == "none":
            return None
        raw = fp32(self.map(x))
        if self.kind == "mamba":
            rate = fp32(self.A_log).exp().repeat_interleave(self.channels // self.heads)
            g = -rate * F.softplus(raw + fp32(self.dt_bias))
        elif self.kind == "stretched":
            g = (F.logsigmoid(raw) + math.log(1.05)).clamp_max(0)
        else:
            g = F.logsigmoid(raw) / (16 if self.kind == "gla" else 1)
        return g.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    @classmethod
    def cost(cls, design: MatrixDesign, site: Any) -> Cost:
        r = design.retention
        if r.per == "none" or r.gate == "fixed":
            return Cost()
        heads, _, dim_key, dim_value = design.sizes(site.width)
        channels, rank, bias = heads * (dim_key if r.per == "channel" else 1), gate_rank(r.rank, dim_value), \
            r.gate != "mamba"
        total = (site.linear_cost(site.width, channels, bias=bias, role="gate") if rank is None
                 else LowRank.cost(site, site.width, rank, channels, bias))
        return total + Cost(params=heads + channels if r.gate == "mamba" else 0)
