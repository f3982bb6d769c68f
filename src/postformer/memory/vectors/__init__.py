"""Parameterisations of the vector memory: x -> elementwise recurrence -> y, one file each."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from postformer.contract.context import Context, gates
from postformer.contract.state import State
from postformer.design.choices import Choices
from postformer.design.cost import Cost
from postformer.kernels import current, scan
from postformer.memory.named import Named


class Unit(nn.Module):
    """x [B, T, D] -> (y [B, T, D_out], state)."""

    uses: ClassVar[frozenset[str]] = frozenset()
    """Fields of the design that mean something here; others are refused"""
    four: ClassVar[Choices]
    """The four choices in words"""
    exact_gradients: ClassVar[bool] = True
    """False: surrogate gradients"""

    def forward(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        raise NotImplementedError

    def initial(self, batch: int) -> State:
        raise NotImplementedError

    @classmethod
    def cost(cls, design: Any, site: Any) -> Cost:
        raise NotImplementedError


_family = Named(__name__, {"mamba1": "mamba1", "rglru": "rglru", "hgrn": "gated", "mingru": "gated", "mlgru": "gated",
                           "s4d": "spaces", "s5": "spaces", "lif": "lif"})
unit, resolve = _family.register, _family.resolve


def gated_scan(log_a: Tensor, b: Tensor, h0: Tensor, ctx: Context, forget_at: str) -> Tensor:
    """h_t = exp(log_a_t) h_{t-1} + b_t with the context's gates and resets: log_a * tick, b * write. [B, T, ...]."""
    tick, write = gates(ctx)
    extra = (1,) * (b.ndim - 2)
    log_a = log_a * current().decay_scale
    if tick is not None:
        log_a = log_a * tick.view(*tick.shape, *extra).to(log_a.real.dtype)
    if write is not None:
        b = b * write.view(*write.shape, *extra).to(b.real.dtype)
    return scan(log_a.exp(), b, h0, ctx.reset(forget_at))
