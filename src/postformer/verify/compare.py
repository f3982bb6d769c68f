"""Differences between results: relative, leaf by leaf, infinite where shapes, kinds or finiteness differ."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from postformer.contract import state as states
from postformer.contract.state import Growing, State


def error(a: Tensor, b: Tensor, floor: float = 0.0) -> float:
    """max |a - b| / max(|b|, floor); inf where one is not finite or shapes differ."""
    if a.shape != b.shape:
        return math.inf
    if not a.numel():
        return 0.0
    if not a.dtype.is_floating_point and not a.dtype.is_complex:
        return 0.0 if torch.equal(a, b) else math.inf
    gap = (a - b).abs().max().item()
    if not math.isfinite(gap):
        return math.inf
    scale = max(b.abs().max().item(), floor)
    return gap / scale if scale else gap


def used(state: State) -> list[Tensor]:
    """Leaves of a state, growing lists cut to what is in use (entries beyond a row's length zeroed)."""
    found: list[Tensor] = []

    def walk(node: State) -> None:
        if node is None:
            return
        if isinstance(node, Growing):
            longest = int(node.length.max()) if node.length.numel() else 0
            mask = torch.arange(longest, device=node.length.device) < node.length[:, None]
            data = node.data[:, :longest]
            found.extend([data * mask.view(*mask.shape, *(1,) * (data.ndim - 2)), node.length])
        elif isinstance(node, Tensor):
            found.append(node)
        else:
            for child in node.values() if isinstance(node, dict) else node:
                walk(child)

    walk(state)
    return found


def state_error(a: State, b: State) -> float:
    """Largest relative difference over the leaves of two states, relative to the largest value of the state."""
    left, right = used(a), used(b)
    if len(left) != len(right):
        return math.inf
    return max((error(x, y, 1e-3) for x, y in zip(left, right)), default=0.0)


def gradient_error(a: Mapping[str, Tensor | None], b: Mapping[str, Tensor | None]) -> tuple[float, str]:
    """(largest relative difference, its name); a gradient far below the largest one is compared with 1e-6 of that."""
    largest = max((g.abs().max().item() for g in b.values() if g is not None and g.numel()), default=1.0)
    worst, where = 0.0, ""
    for name in b:
        x, y = a[name], b[name]
        if x is None or y is None:
            gap = 0.0 if (x is None or not x.any()) and (y is None or not y.any()) else math.inf
        else:
            gap = error(x, y, 1e-6 * largest)
        if gap > worst or not where:
            worst, where = gap, name
    return worst, where


def finite(values: Iterable[Tensor | None]) -> bool:
    return all(v is None or bool(torch.isfinite(v).all()) for v in values)


def emitted_at(emitted: State, index: int) -> State:
    """The index-th of the emitted states (leaves [B, n, ...])."""
    return states.map_state(lambda leaf: leaf[:, index], emitted)
