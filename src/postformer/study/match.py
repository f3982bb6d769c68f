"""Designs made equal in one of params, FLOPs or state bytes, by their width and then their feed-forwards."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from postformer.design import DesignError, Recipe, load
from postformer.study.entry import Entry
from postformer.task import setting_length

Quantity = Literal["params", "flops", "state"]
QUANTITIES = ("params", "flops", "state")
WIDTHS = (8, 1024)


def amount(recipe: Recipe, entry: Entry, on: Quantity) -> float:
    """params: their number; flops: per token, forward, at the longest training length; state: bytes at the longest
    sequence evaluated, key-value lists included. Raises NotDeclared for a memory without a declared cost."""
    cost, difficulties = recipe.cost(), entry.make().difficulties
    if on == "params":
        return cost.params
    if on == "flops":
        length = max(map(setting_length, difficulties.train))
        return cost.flops(length) / length
    return cost.state_bytes(max(map(setting_length, difficulties.evaluate)))


def matched(recipe: Recipe, entry: Entry, on: Quantity, target: float) -> Recipe:
    """The design, at the entry's depth, whose amount is nearest to the target.

    Widths are multiples of 8; what they leave is made up by the hidden channels of the feed-forwards, which change no
    state. Raises DesignError if no width builds.
    """
    def distance(candidate: Recipe) -> float:
        return abs(math.log(amount(candidate, entry, on) / target))

    found = min(_builds(recipe, entry), key=distance, default=None)
    if found is None:
        raise DesignError(f"{recipe.name} builds at no width from {WIDTHS[0]} to {WIDTHS[1]}; leave it out of a "
                          "matched comparison")
    return found if on == "state" else min([found, *_hidden(found)], key=distance)


def _builds(recipe: Recipe, entry: Entry) -> list[Recipe]:
    """The design at every width around the entry's that builds; 8 to 256 for the usual 32."""
    found = []
    for width in range(WIDTHS[0], min(WIDTHS[1], 8 * entry.width) + 1, 8):
        try:
            found.append(entry.sized(recipe, width))
        except (DesignError, ValueError):
            continue
    return found


def _hidden(recipe: Recipe) -> list[Recipe]:
    """The design with feed-forwards from a quarter to three times as wide."""
    model = recipe.model
    sizes: dict[str, Callable[[int], int]] = {
        name: mixer.hidden for name, mixer in model.mixers.items() if hasattr(mixer, "dim_hidden")}  # type: ignore
    if not sizes:
        return []
    most = max(size(model.width) for size in sizes.values())
    found = []
    for hidden in range(max(4, most // 4), 3 * most + 1, 4):
        changes = []
        for name in sizes:
            changes += [f"model.mixers.{name}.expand=null", f"model.mixers.{name}.dim_hidden={hidden}"]
        found.append(load(recipe, changes))
    return found
