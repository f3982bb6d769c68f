"""The plan by which an affine step runs in blocks: which state leaves belong together, and their transition's form."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..sequential import _map

Tree = Any


@dataclass(frozen=True)
class Group:
    """State leaves that act on each other, and the form of their common transition.

    Axes are counted without the batch. Along a `separate` axis entries do not mix; along a `shared` axis all entries
    are mapped alike; the rest, flattened and joined over the leaves, is what the transition maps: a leaf is seen as
    [rows, P separate, K mapped, V shared] and A is [rows, P, K, K].
    """

    leaves: tuple[int, ...]
    level: int
    separate: tuple[int, ...] = ()
    shared: tuple[int, ...] = ()
    zero: bool = False
    """The new value does not depend on the old: the token before, a window's newest entry."""

    def _order(self, leaf: Tensor) -> tuple[list[int], list[int]]:
        """(axes in the order separate, mapped, shared; their sizes), the batch left out."""
        mapped = [a for a in range(leaf.ndim - 1) if a not in self.separate and a not in self.shared]
        axes = [*self.separate, *mapped, *self.shared]
        return axes, [leaf.shape[1 + a] for a in axes]

    def size(self, leaf: Tensor) -> tuple[int, int, int]:
        """(P, K, V) of one leaf."""
        axes, sizes = self._order(leaf)
        p, v = len(self.separate), len(axes) - len(self.shared)
        return math.prod(sizes[:p]), math.prod(sizes[p:v]), math.prod(sizes[v:])

    def shape(self, state: Sequence[Tensor]) -> tuple[int, int, int]:
        """(P, K, V) of the group."""
        sizes = [self.size(state[i]) for i in self.leaves]
        return sizes[0][0], sum(k for _, k, _ in sizes), sizes[0][2]

    def runs(self, state: Sequence[Tensor]) -> int:
        """How many runs the transition takes: V basis states are carried at once."""
        _, k, v = self.shape(state)
        return -(-k // v)

    def pack(self, state: Sequence[Tensor]) -> Tensor:
        """The group's leaves as one [rows, P, K, V]."""
        parts = []
        for leaf in (state[i] for i in self.leaves):
            axes, _ = self._order(leaf)
            parts.append(leaf.permute(0, *(1 + a for a in axes)).reshape(leaf.shape[0], *self.size(leaf)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def unpack(self, packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """Inverse of `pack`, one tensor for each leaf; rows as in `packed`."""
        leaves, at = [], 0
        for leaf in (like[i] for i in self.leaves):
            axes, sizes = self._order(leaf)
            k = self.size(leaf)[1]
            back = [0] * (len(axes) + 1)
            for place, a in enumerate(axes):
                back[1 + a] = 1 + place
            leaves.append(packed[:, :, at : at + k].reshape(packed.shape[0], *sizes).permute(back).contiguous())
            at += k
        return leaves


@dataclass(frozen=True)
class Plan:
    """How a step's state is advanced in blocks: the groups, lower levels before those that depend on them."""

    groups: tuple[Group, ...]

    @property
    def levels(self) -> int:
        return 1 + max(g.level for g in self.groups)

    def at(self, level: int) -> list[Group]:
        return [g for g in self.groups if g.level == level]

    def runs(self, state: Sequence[Tensor]) -> int:
        """Runs over the tokens besides the last one: an offset and the transitions for every level."""
        found = 0
        for level in range(self.levels):
            groups = self.at(level)
            if not (level == 0 and all(g.zero for g in groups)):
                found += 1 + max(g.runs(state) for g in groups)
        return found


def flat(state: Tree) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Tree]]:
    """(leaves, what puts such leaves back into the containers)."""
    found: list[Tensor] = []
    _map(found.append, state)

    def rebuild(leaves: Sequence[Tensor]) -> Tree:
        following = iter(leaves)
        return _map(lambda _: next(following), state)

    return found, rebuild


def smooth(x: Tensor) -> bool:
    """Whether gradients pass through it."""
    return x.dtype.is_floating_point or x.dtype.is_complex
