"""Results of a gauntlet as claims read them: means over seeds with their range."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

FEWEST_SEEDS = 3


@dataclass(frozen=True)
class Score:
    """A design's metric at one setting, over seeds; `sign` is -1 where less is better."""

    design: str
    values: tuple[float, ...]
    sign: int

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def enough(self) -> bool:
        return len(self.values) >= FEWEST_SEEDS

    def beats(self, other: Score) -> bool:
        """Whether every seed of this one is better than every seed of the other, with seeds enough on both sides."""
        worst, best = min(self.sign * v for v in self.values), max(other.sign * v for v in other.values)
        return self.enough and other.enough and worst > best

    def beats_itself(self, other: Score) -> bool:
        """Whether every trained model is better here than the same model is at another setting."""
        pairs = zip(self.values, other.values, strict=True)
        return self.enough and all(self.sign * here > self.sign * there for here, there in pairs)


class Results:
    """The dict of a gauntlet's results, or None.

    {"designs": [{"key"}],
    "tasks": [{"key", "metric", "better", "settings": [{"setting", "name", "inside", "chance", "shortcut"}]}],
    "cells": [{"design", "task", "params", "flops_per_token", "state_bytes": {setting name: bytes},
    "seeds": [{"seed", "test": {setting name: {metric: value}}}], "failures": []}]}
    """

    def __init__(self, data: dict[str, Any] | None) -> None:
        data = data or {"designs": [], "tasks": [], "cells": []}
        if missing := [key for key in ("designs", "tasks", "cells") if key not in data]:
            raise ValueError(f"these are no results of a gauntlet: {missing[0]!r} is missing; give the dict that a "
                             "gauntlet wrote")
        self.tasks = {task["key"]: task for task in data["tasks"]}
        self.cells = {(cell["design"], cell["task"]): cell for cell in data["cells"]}
        self.designs = [design["key"] for design in data["designs"]]

    def task(self, names: Sequence[str]) -> str | None:
        """The first of these tasks that was run."""
        return next((name for name in names if name in self.tasks), None)

    def settings(self, task: str, inside: bool | None = None) -> list[dict[str, Any]]:
        """The settings of a task, in its order; inside: only those that training covers (True), or does not (False)."""
        return [s for s in self.tasks[task]["settings"] if inside is None or bool(s["inside"]) == inside]

    def score(self, design: str, task: str, setting: str, metric: str | None = None) -> Score | None:
        """Its metric (the task's, or another) at a setting's name; None where no seed has one."""
        metric = metric or self.tasks[task]["metric"]
        seeds = self.cells.get((design, task), {}).get("seeds", [])
        values = [seed["test"][setting][metric] for seed in seeds if metric in seed.get("test", {}).get(setting, {})]
        return Score(design, tuple(values), -1 if self.tasks[task]["better"] == "lower" else 1) if values else None

    def learned(self, score: Score, task: str, setting: str) -> bool:
        """Whether it is better than the best answer that avoids what the task is about (or than chance)."""
        found = next(s for s in self.tasks[task]["settings"] if s["name"] == setting)
        return score.sign * score.mean > score.sign * found.get("shortcut", found["chance"])

    def scores(self, designs: Iterable[str], task: str, setting: str) -> list[Score]:
        """Of those designs that have one, in the order given."""
        found = (self.score(design, task, setting) for design in designs)
        return [score for score in found if score is not None]

    def state_bytes(self, design: str, task: str, setting: str) -> int | None:
        """None where the design does not declare them."""
        return self.cells[design, task]["state_bytes"].get(setting)

    def fixed(self, design: str, task: str) -> bool:
        """Whether its state is as large at every setting."""
        return len(set(self.cells[design, task]["state_bytes"].values())) == 1
