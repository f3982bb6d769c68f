"""Parameterisations of the vector memory: x -> elementwise recurrence -> y, one file each."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from postformer.contract.context import Context, gates
from postformer.contract.state import State
from postformer.design.base import nearest
from postformer.design.choices import Choices
from postformer.design.cost import Cost
from postformer.kernels import current, scan

T = TypeVar("T", bound="type[Unit]")
BUILT_IN = {"mamba1": "mamba1", "rglru": "rglru", "hgrn": "gated", "mingru": "gated", "s4d": "spaces", "s5": "spaces"}
_units: dict[str, Any] = {}


class Unit(nn.Module):
    """x [B, T, D] -> (y [B, T, D_out], state)."""

    uses: ClassVar[frozenset[str]] = frozenset()
    """Fields of the design that mean something here; others are refused"""
    four: ClassVar[Choices]
    """The four choices in words"""

    def forward(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        raise NotImplementedError

    def initial(self, batch: int) -> State:
        raise NotImplementedError

    @classmethod
    def cost(cls, design: Any, site: Any) -> Cost:
        raise NotImplementedError


def unit(name: str) -> Callable[[T], T]:
    """Class decorator: register a parameterisation."""
    def add(cls: T) -> T:
        _units[name] = cls
        return cls
    return add


def resolve(name: str) -> Any:
    """The parameterisation of this name. ValueError for an unknown one."""
    if name not in _units and name in BUILT_IN:
        import_module(f"{__name__}.{BUILT_IN[name]}")
    if name not in _units:
        raise ValueError(f"unknown parameterisation '{name}'.{nearest(name, {*_units, *BUILT_IN})}")
    return _units[name]


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
