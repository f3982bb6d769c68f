"""The read of memories with heads: a norm, an output gate that sees x, and a linear map over all heads' channels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from postformer.contract.mixer import Mixer
from postformer.design.cost import Cost
from postformer.layers.activation import activated
from postformer.layers.norm import HeadNorm
from postformer.memory.rules.gates import LowRank, gate_rank
from postformer.memory.shared_design import Read


class HeadRead(Mixer):
    """A mixer whose design has a `read`. The parts are the mixer's own (`norm`, `gate`, `out`), None where unwanted."""

    norm: HeadNorm | None
    gate: nn.Module | None
    out: nn.Module | None

    def make_read(self, read: Read, site: Any, heads: int, dim_value: int, groups: int = 1) -> None:
        """groups: heads that share a key"""
        inner, parts, rank = heads * dim_value, _parts(read, heads, groups), gate_rank(read.gate_rank, dim_value)
        self.norm = None if read.norm == "none" else HeadNorm(
            parts, inner // parts, read.norm, read.eps, read.weight != "none", read.bias, read.weight == "shared")
        self.gate = None
        if read.gate != "none":
            self.gate = (site.linear("gate", site.width, inner, role="gate") if rank is None
                         else LowRank(site, "gate", site.width, rank, inner))
        self.out = site.linear("out", inner, site.dim_out) if read.out else None

    def finish(self, o: Tensor, x: Tensor, *, gate: Tensor | None = None, bonus: Tensor | None = None) -> Tensor:
        """o [B, T, heads * dim_value], x [B, T, D] -> y [B, T, D_out].

        gate: in place of the read's own, where it has none; bonus: added after the norm; both like o.
        """
        read: Read = self.design.read
        activation = "none"
        if self.gate is not None:
            gate, activation = self.gate(x), read.gate
        first = gate is not None and read.order == "gate-norm"
        if gate is not None and self.norm is not None and (first or bonus is None):
            o, gate = self.norm(o, gate, activation, read.order), None
        elif self.norm is not None:
            o = self.norm(o)
        elif gate is not None and first:
            o, gate = activated(gate, activation, o), None
        if bonus is not None:
            o = o + bonus
        o = o if gate is None else activated(gate, activation, o)
        return o if self.out is None else self.out(o)

    @staticmethod
    def read_cost(read: Read, site: Any, heads: int, dim_value: int, groups: int = 1) -> Cost:
        total, inner, rank = Cost(), heads * dim_value, gate_rank(read.gate_rank, dim_value)
        if read.out:
            total += site.linear_cost(inner, site.dim_out)
        elif inner != site.dim_out:
            raise ValueError(f"{inner} channels of all heads do not fit a width of {site.dim_out}; set read.out: true, "
                             "or leave heads.dim_value out")
        if read.gate != "none":
            total += (site.linear_cost(site.width, inner, role="gate") if rank is None
                      else LowRank.cost(site, site.width, rank, inner))
        if read.norm != "none" and read.weight != "none":
            weights = inner // _parts(read, heads, groups) if read.weight == "shared" else inner
            total += Cost(params=weights * (2 if read.bias else 1))
        return total


def _parts(read: Read, heads: int, groups: int) -> int:
    """How many groups of channels are normed apart"""
    return {"head": heads, "group": groups, "all": 1}[read.per]
