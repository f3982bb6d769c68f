"""The record of a claim, and the list of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from postformer.study.claims.results import Results
from postformer.study.entry import tier

Verdict = Literal["holds", "does not hold", "undecided", "needs results", "not testable here"]
HERE = "postformer gauntlet --claims"


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Figure(_Data):
    """A number of ours; low and high are the range over seeds."""

    name: str
    value: float
    unit: str = ""
    low: float | None = None
    high: float | None = None


class Claim(_Data):
    """What is claimed, and what came out here."""

    id: str
    title: str
    statement: str
    source: str
    papers: tuple[str, ...] = ()
    """arXiv ids"""
    from_notes: bool = False
    """Whether the statement's wording is from notes and not from the papers themselves"""
    test: str
    figures: tuple[Figure, ...] = ()
    verdict: Verdict
    """holds, does not hold: decided by the test. undecided: tested, but the figures cannot tell (the reason says what
    would). needs results: the gauntlet has not run what it reads."""
    reason: str
    misread: str | None = None
    """How it is often quoted wrongly"""
    command: str = HERE
    """What makes the figures"""


Maker = Callable[[Results, bool], Claim]
_MAKERS: dict[str, Maker] = {}


def claim(id: str) -> Callable[[Maker], Maker]:
    """Adds a function of (results, quick) to the list under an id; the same id again replaces it."""

    def add(maker: Maker) -> Maker:
        _MAKERS[id] = maker
        return maker

    return add


def claims(results: dict[str, Any] | None = None, quick: bool = False) -> list[Claim]:
    """Every claim in the order of their numbers.

    Args:
        results: what a gauntlet found; None: none.
        quick: shorter sequences and fewer repeats, some seconds instead of some minutes.

    Raises ValueError for results that lack `designs`, `tasks` or `cells`.
    """
    read = Results(results)
    return [_MAKERS[id](read, quick) for id in sorted(_MAKERS, key=_number)]


def _number(id: str) -> tuple[str, int]:
    head = id.rstrip("0123456789")
    return head, int(id[len(head):] or 0)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent p of the best fit y ~ x^p, by least squares of the logarithms."""
    a, b = [math.log(v) for v in x], [math.log(v) for v in y]
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    across = sum((u - mean_a) * (v - mean_b) for u, v in zip(a, b, strict=True))
    return across / sum((u - mean_a) ** 2 for u in a)


def gauntlet(designs: Sequence[str], tasks: Sequence[str]) -> str:
    """The command that makes the results of these designs on the first of these tasks that the standard tier has."""
    task = next((task for task in tasks if task in tier("standard")), tasks[0])
    return f"postformer gauntlet {' '.join(designs)} --tier standard --tasks {task} --claims"
