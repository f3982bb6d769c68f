"""Parameterisations of the cell: what is known of all tokens beforehand, and one step. One file each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from postformer.contract.context import Context
from postformer.contract.state import State
from postformer.design.choices import Choices
from postformer.design.cost import Cost
from postformer.memory.named import Named

Step = Callable[[Tensor, State], tuple[Tensor, State]]
"""(what is known of a token [B, ...], state) -> (h [B, inner], state)"""


class Unit(nn.Module):
    """One kind of cell. Everything that needs no earlier state is done for all tokens at once, in `prepare`."""

    uses: ClassVar[frozenset[str]] = frozenset()
    """Fields of the design that mean something here; others are refused"""
    four: ClassVar[Choices]
    """The four choices in words"""
    states: ClassVar[int]
    """Numbers that the state holds per cell"""
    exact_gradients: ClassVar[bool] = True
    """False: surrogate gradients"""

    def prepare(self, x: Tensor, local: State, ctx: Context, once: bool) -> tuple[Tensor, Step, State]:
        """x [B, T, D] -> (what is known of the tokens [B, T, ...], the step, local state).

        once: each token's step is taken exactly once; False: some may be taken again in the backward pass.
        """
        raise NotImplementedError

    def memory(self, batch: int, like: Tensor) -> State:
        """Zeros: the state of the recurrence before the first token."""
        raise NotImplementedError

    def local(self, batch: int) -> State:
        return None

    @classmethod
    def cost(cls, design: Any, site: Any) -> Cost:
        """All but the state of the recurrence, the norm and the map after it."""
        raise NotImplementedError


_family = Named(__name__, {name: name for name in ("lstm", "gru", "slstm", "lif")})
unit, resolve = _family.register, _family.resolve


def zeros(count: int, *shape: int, like: Tensor) -> tuple[Tensor, ...]:
    """Accumulators of at least fp32."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return tuple(torch.zeros(*shape, dtype=dtype, device=like.device) for _ in range(count))
