"""One plain sentence or two per figure, computed from its numbers. Nothing here knows which architecture should win.

Where a demo declares what the literature leads one to expect, the text says whether the numbers show it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from postformer.report import numbers

SOLVED = 0.99
"""Accuracy from which a test counts as solved."""
APART = 0.05
"""Accuracies closer than this are not called different: one seed, a few thousand test positions."""


def tracking(points: Mapping[str, Sequence[tuple[float, float]]], trained: float, unit: str) -> str:
    """What accuracy against difficulty shows: {name: [(difficulty, accuracy), ...]}."""
    if not points:
        return "No run finished, so there is nothing to see."
    far = max(at for p in points.values() for at, _ in p)
    ends = {name: dict(p).get(far) for name, p in points.items()}
    ends = {name: a for name, a in ends.items() if a is not None}
    if far <= trained:
        best = max(ends, key=lambda n: ends[n])
        return f"Up to {far:g} {unit}, all of it covered by training, {best} reads {numbers.accuracy(ends[best])}."
    factor = (
        f"{far / trained:g} times the trained number"
        if unit != "tokens"
        else f"{far / trained:g} times the trained length"
    )
    solved = [n for n, a in ends.items() if a >= SOLVED]
    failed = [n for n in ends if n not in solved]
    out = []
    if solved:
        values = ", ".join(numbers.accuracy(ends[n]) for n in solved)
        verb = "holds" if len(solved) == 1 else "hold"
        out.append(f"At {far:g} {unit}, {factor}, {numbers.listing(solved)} still {verb} ({values}).")
    else:
        best = max(ends, key=lambda n: ends[n])
        out.append(
            f"At {far:g} {unit}, {factor}, no architecture is above {SOLVED:g}; the best is {best} with "
            f"{numbers.accuracy(ends[best])}."
        )
    inside = {n: max((p for p in points[n] if p[0] <= trained), default=None) for n in failed}
    fell = [n for n in failed if inside[n] is not None]
    if fell:
        falls = [f"{n} from {numbers.accuracy(inside[n][1])} to {numbers.accuracy(ends[n])}" for n in fell]  # type: ignore[index]
        same = {inside[n][0] for n in fell}  # type: ignore[index]
        place = (
            f"Between {next(iter(same)):g} and {far:g} {unit}" if len(same) == 1 else f"On the way to {far:g} {unit}"
        )
        out.append(f"{place}, {numbers.listing(falls)}.".replace(" from ", " goes from ", 1))
    return " ".join(out)


def expectation(
    expected: Mapping[str, Any] | None, points: Mapping[str, Sequence[tuple[float, float]]], unit: str
) -> str:
    """Whether the separation that a demo declares as expected showed.

    expected: {"holds": names, "falls": names, "at": difficulty, "level": accuracy, 0.99 if not given}: there the first
    should reach the level, and the others stay at least 0.05 below the worst of them.
    """
    if not expected:
        return ""
    at, level = expected["at"], expected.get("level", SOLVED)
    found = {name: dict(p)[at] for name, p in points.items() if at in dict(p)}
    holds, falls = list(expected.get("holds", [])), list(expected.get("falls", []))
    missing = [n for n in holds + falls if n not in found]
    if missing:
        return f"The expected separation cannot be checked: {numbers.listing(missing)} gave no number at {at:g} {unit}."
    low = [f"{n} reaches only {numbers.accuracy(found[n])}" for n in holds if found[n] < level]
    high = [
        f"{n} reaches {numbers.accuracy(found[n])}" for n in falls if found[n] > min(found[h] for h in holds) - APART
    ]
    claim = f"at {at:g} {unit}, {numbers.listing(holds)} at {level:g} or above, {numbers.listing(falls)} clearly below"
    if not low and not high:
        return f"This is what the paper leads one to expect: {claim}."
    return f"Expected from the paper: {claim}. This run does not show that: {'; '.join(low + high)}."


def state(points: Sequence[tuple[str, tuple[float, float], tuple[float, float]]], first: str, second: str) -> str:
    """What accuracy against bytes of state shows: (name, (bytes, accuracy) at two difficulties)."""
    if not points:
        return "No run finished, so there is nothing to see."
    fixed = [p for p in points if p[1][0] == p[2][0]]
    growing = [p for p in points if p[1][0] != p[2][0]]
    out = []
    if fixed:
        small, large = min(fixed, key=lambda p: p[2][0]), max(fixed, key=lambda p: p[2][0])
        text = f"The smallest fixed state is {small[0]}'s, {numbers.size(small[2][0])}: "
        text += f"{numbers.accuracy(small[2][1])} at {second}"
        if large[2][0] > small[2][0]:
            text += f"; the largest is {large[0]}'s, {numbers.size(large[2][0])}: {numbers.accuracy(large[2][1])}"
        out.append(text + ".")
    for name, a, b in growing:
        out.append(
            f"{name} keeps {numbers.size(a[0])} for {first} and {numbers.size(b[0])} for {second}: what it stores "
            "grows with the text."
        )
    return " ".join(out)


def text(bits: Mapping[str, float], tokens: Mapping[str, float]) -> str:
    """What the loss curves end at: {name: validation bits per byte}, {name: training tokens}."""
    if not bits:
        return "No run finished, so there is nothing to see."
    order = sorted(bits, key=lambda n: bits[n])
    best, worst = order[0], order[-1]
    out = []
    if len(set(tokens.values())) > 1:
        low, high = min(tokens.values()), max(tokens.values())
        out.append(
            f"The runs did not see equally many tokens ({numbers.short(low)} to {numbers.short(high)}), so compare the "
            "curves at one place on the horizontal axis, not their ends."
        )
    if len(order) == 1:
        return " ".join([*out, f"{best} ends at {numbers.bits(bits[best])} bits per byte."])
    gap = bits[worst] - bits[best]
    out.append(
        f"{best} ends lowest, at {numbers.bits(bits[best])} bits per byte, and {worst} highest, at "
        f"{numbers.bits(bits[worst])}: {numbers.bits(gap)} apart."
    )
    if bits[order[1]] - bits[best] < 0.03:
        near = [n for n in order[1:] if bits[n] - bits[best] < 0.03]
        out.append(
            f"{numbers.listing(near)} end within 0.03 of the best, which one seed cannot rank."
            if len(near) > 1
            else f"{near[0]} ends within 0.03 of it, which one seed cannot rank."
        )
    return " ".join(out)


def growth(values: Mapping[str, Sequence[tuple[float, float]]], what: str, tolerance: float) -> str:
    """How a cost of decoding grows: {name: [(context, cost), ...]}.

    what: the noun of the cost. tolerance: a factor up to which a change over the whole range counts as constant.
    """
    usable = {n: sorted(p) for n, p in values.items() if len(p) > 1 and min(v for _, v in p) > 0}
    if not usable:
        return "Nothing was measured, so there is nothing to see."
    low = min(p[0][0] for p in usable.values())
    high = max(p[-1][0] for p in usable.values())
    factor = {n: p[-1][1] / p[0][1] for n, p in usable.items()}
    flat = [n for n, f in factor.items() if 1 / tolerance <= f <= tolerance]
    grows = sorted((n for n, f in factor.items() if f > tolerance), key=lambda n: -factor[n])
    shrinks = [n for n, f in factor.items() if f < 1 / tolerance]
    span = f"From {low:,} to {high:,} tokens of context"

    def reach(name: str) -> str:
        last = usable[name][-1][0]
        return "" if last == high else f" (by {last:,}, as far as it was measured)"

    parts = []
    if grows:
        parts.append(
            f"{what} grows {numbers.listing([f'{numbers.ratio(factor[n])} for {n}{reach(n)}' for n in grows])}"
        )
    if flat:
        same = "stays the same" if tolerance < 1.01 else f"stays within a factor of {tolerance:g}"
        parts.append(f"{same if parts else f'{what} {same}'} for {numbers.listing(flat)}")
    if shrinks:
        falls = f"falls for {numbers.listing(shrinks)}, which only noise explains"
        parts.append(falls if parts else f"{what} {falls}")
    return f"{span}, {', and '.join(parts)}."


def declared(values: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Whether the state bytes that a design declares are those measured on the running model."""
    off = sorted(
        {
            name
            for name, points in values.items()
            for p in points
            if p.get("measured_bytes") is not None
            and not math.isclose(p["measured_bytes"], p["declared_bytes"], rel_tol=1e-9)
        }
    )
    if off:
        return f"Declared and measured bytes differ for {numbers.listing(off)}."
    measured = any(p.get("measured_bytes") is not None for points in values.values() for p in points)
    return "The bytes that each design declares are exactly those measured on the running model." if measured else ""
