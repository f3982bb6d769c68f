"""Parameterisations: how a paper maps x to the arguments of kernel K1. One file each; they return arguments only."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from postformer.contract.affine import GDR
from postformer.contract.context import Context
from postformer.contract.state import State
from postformer.design.choices import Choices
from postformer.design.cost import Cost
from postformer.memory.named import Named


class Rule(nn.Module):
    """x [B, T, D] -> (GDR, local state). Reads what earlier sites published only through ctx.shared."""

    fixed: ClassVar[frozenset[str]] = frozenset({"loss", "retention", "update", "features", "position", "normaliser"})
    """Choices of the design that the paper's mapping makes itself"""
    local: ClassVar[tuple[str, ...]] = ("none",)
    """Kinds of local mixing it can have"""
    grouped: ClassVar[bool] = False
    """Several heads may share a key head"""
    soft_gates: ClassVar[bool] = True
    """Besides local mixing, nothing in it looks at neighbouring tokens or carries a state of its own"""
    taps: ClassVar[bool] = False
    """The local state is what its local mixing has seen, and nothing else"""
    normalised: ClassVar[bool] = False
    """The state has a column of ones, by which the read divides"""
    inputs: ClassVar[tuple[str, ...]] = ()
    """Its inputs that a wrapper may feed apart from x"""
    four: ClassVar[Choices]
    """The four choices in words"""
    columns: int
    """Columns of the state per head: dim_value, + 1 with a normaliser"""

    def forward(self, x: Tensor, local: State, ctx: Context) -> tuple[GDR, State]:
        raise NotImplementedError

    def initial(self, batch: int) -> State:
        return None

    @classmethod
    def check(cls, design: Any) -> None:
        """ValueError with a remedy for choices that make no sense together."""

    @classmethod
    def choices(cls, design: Any) -> Choices:
        return cls.four

    @classmethod
    def flops(cls, design: Any) -> float:
        """Per dim_key x dim_value and token of the recurrence: 2 each for erase, write, add, read."""
        return 4.0

    @classmethod
    def cost(cls, design: Any, site: Any) -> Cost:
        """Projections, local mixing and its state; without the kernel and the read."""
        raise NotImplementedError


_family = Named(__name__, {
    "qkv": "qkv", "mamba2": "mamba2", "rwkv7": "rwkv7", "hgrn2": "hgrn2", "mlstm": "mlstm", "xlstm": "xlstm",
    "comba": "comba", "gated-deltanet-2": "gated_deltanet2", "preconditioned": "preconditioned",
})
rule, resolve = _family.register, _family.resolve


def heads(x: Tensor, count: int, repeat: int = 1) -> Tensor:
    """[B, T, count * d] -> [B, count * repeat, T, d], each head repeated for its group."""
    x = x.unflatten(-1, (count, -1)).transpose(1, 2)
    return x.repeat_interleave(repeat, 1) if repeat > 1 else x
