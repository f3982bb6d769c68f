"""Reads gauntlet.json, in whatever state a study is, and computes every mean and spread that its page shows."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

SCHEMA = 1
LENGTHS = ("length", "tokens", "bytes", "characters")
"""Units of difficulty that count positions; any other counts things to be kept, and makes a task one of recall."""


@dataclass(frozen=True)
class Stat:
    """One figure over seeds: its values in the order of the seeds; never empty."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Their sample standard deviation (n - 1); None for a single seed, which has no spread."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def low(self) -> float:
        """The smallest."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The largest."""
        return max(self.values)


@dataclass(frozen=True)
class Trial:
    """One task: its entry of gauntlet.json, and what follows from it."""

    entry: dict[str, Any]

    @property
    def key(self) -> str:
        """Its name in the study."""
        return self.entry["key"]

    @property
    def title(self) -> str:
        """Its name on the page."""
        return str(self.entry.get("title") or self.key)

    @property
    def metric(self) -> str:
        """The headline figure."""
        return self.entry["metric"]

    @property
    def lower(self) -> bool:
        """Whether less is better."""
        return self.entry.get("better") == "lower"

    @property
    def recall(self) -> bool:
        """Whether difficulty counts things to be kept (pairs, keys), so that bytes of state must matter."""
        return not self.lower and self.entry.get("unit", "length") not in LENGTHS

    @cached_property
    def settings(self) -> list[dict[str, Any]]:
        """Evaluation settings, those inside the training distribution first."""
        return sorted(self.entry.get("settings") or [], key=lambda s: not s.get("inside"))

    def regime(self, inside: bool) -> list[dict[str, Any]]:
        """The settings inside the training distribution, or those outside."""
        return [s for s in self.settings if bool(s.get("inside")) is inside]

    def rescaled(self, value: float, setting: dict[str, Any]) -> float:
        """0 at chance and 1 when perfect; an accuracy below chance is negative."""
        chance = number(setting.get("chance")) or 0.0
        return (value - chance) / (1 - chance) if chance < 1 else 0.0


class Study:
    """A gauntlet as far as it has come: designs, tasks, and one cell for each pair of them."""

    def __init__(self, directory: str | Path) -> None:
        """Raises ValueError where gauntlet.json is missing, broken, or of another schema."""
        self.directory = Path(directory)
        path = self.directory / "gauntlet.json"
        try:
            self.raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{path} is missing; `postformer gauntlet` writes one.") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read ({error}); run `postformer gauntlet` again.") from None
        if not isinstance(self.raw, dict) or self.raw.get("kind") != "gauntlet":
            raise ValueError(f"{path} does not describe a gauntlet; `postformer gauntlet` writes one.")
        if self.raw.get("schema") != SCHEMA:
            raise ValueError(
                f"{path} has schema {self.raw.get('schema')!r}, and this version reads {SCHEMA}; "
                "use the version of postformer that wrote it."
            )
        for key in ("designs", "tasks", "cells"):
            if not isinstance(self.raw.get(key), list):
                raise ValueError(f"{path} has no list of {key}; run `postformer gauntlet` again.")
        self.seeds = int(self.raw.get("seeds") or 0)
        self.designs: list[dict[str, Any]] = self.raw["designs"]
        self.names = {d["key"]: str(d.get("name") or d["key"]) for d in self.designs}
        self.trials = [Trial(t) for t in self.raw["tasks"]]
        self.cells = {(c["design"], c["task"]): c for c in self.raw["cells"]}

    def cell(self, design: str, trial: Trial) -> dict[str, Any]:
        """The cell of a design and a task; empty where it has not begun."""
        return self.cells.get((design, trial.key), {})

    def stat(self, design: str, trial: Trial, setting: dict[str, Any], metric: str | None = None) -> Stat | None:
        """A figure of the test split at one setting over the seeds that have it; the headline unless named."""
        found = [number((s.get("test") or {}).get(setting["name"], {}).get(metric or trial.metric))
                 for s in self.cell(design, trial).get("seeds") or []]
        values = tuple(v for v in found if v is not None)
        return Stat(values) if values else None

    def regime(self, design: str, trial: Trial, inside: bool, rescale: bool = False) -> Stat | None:
        """The headline averaged over the settings inside, or over those outside, seed by seed.

        A seed that lacks one of the settings does not count: its mean would be of something else.
        """
        settings, values = trial.regime(inside), []
        for seed in self.cell(design, trial).get("seeds") or []:
            test = seed.get("test") or {}
            at = [number(test.get(s["name"], {}).get(trial.metric)) for s in settings]
            if at and None not in at:
                values.append(statistics.fmean(trial.rescaled(v, s) if rescale else v  # type: ignore[arg-type]
                                               for v, s in zip(at, settings)))
        return Stat(tuple(values)) if values else None

    def status(self, design: str, trial: Trial) -> str:
        """"done", "partial", "failed" (it has failures and not one seed) or "missing"."""
        cell = self.cell(design, trial)
        done = sum(bool(s.get("test")) for s in cell.get("seeds") or [])
        if done:
            return "done" if done >= self.seeds else "partial"
        return "failed" if cell.get("failures") else "missing"

    def statuses(self) -> dict[str, int]:
        """How many cells are in each status."""
        found: dict[str, int] = dict.fromkeys(("done", "partial", "failed", "missing"), 0)
        for design in self.names:
            for trial in self.trials:
                found[self.status(design, trial)] += 1
        return found

    def state(self, design: str, trial: Trial, setting: dict[str, Any] | None = None) -> float | None:
        """Bytes of state at a setting; without one, the most over the task's settings."""
        sizes = self.cell(design, trial).get("state_bytes") or {}
        if setting is not None:
            return number(sizes.get(setting["name"]))
        return max((v for v in map(number, sizes.values()) if v is not None), default=None)

    def quantity(self, on: str, design: str, trial: Trial) -> float | None:
        """"params", "flops" (per token) or "state" (the most bytes) of a cell."""
        if on == "state":
            return self.state(design, trial)
        return number(self.cell(design, trial).get({"params": "params", "flops": "flops_per_token"}[on]))

    def mismatch(self, design: str, trial: Trial) -> float | None:
        """How far the matched quantity is from the reference's, as a fraction; None where nothing is matched."""
        match = self.raw.get("match") or {}
        if not match:
            return None
        own = self.quantity(match["on"], design, trial)
        wanted = self.quantity(match["on"], match.get("reference", ""), trial)
        return None if own is None or not wanted else own / wanted - 1

    def failures(self) -> list[dict[str, Any]]:
        """Every recorded failure with its design and task, in the study's order."""
        return [
            {"design": self.names[design], "task": trial.title} | failure
            for trial in self.trials
            for design in self.names
            for failure in self.cell(design, trial).get("failures") or []
        ]

    def long(self) -> str:
        """Every figure of the test split as one tidy CSV: a row per design, task, setting, seed and metric."""
        rows: list[Sequence[Any]] = []
        for trial in self.trials:
            for design in self.names:
                cell = self.cell(design, trial)
                for seed in cell.get("seeds") or []:
                    for s in trial.settings:
                        for metric, value in (seed.get("test") or {}).get(s["name"], {}).items():
                            where = (design, trial.key, s["name"], int(bool(s.get("inside"))), seed.get("seed"))
                            cost = (cell.get("params"), number(cell.get("flops_per_token")))
                            rows.append((*where, metric, number(value), *cost, self.state(design, trial, s)))
        return as_csv(("design", "task", "setting", "inside", "seed", "metric", "value", "params", "flops",
                       "state_bytes"), rows)  # fmt: skip


def as_csv(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows under their column names; what is None stays empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return buffer.getvalue()


def number(value: Any) -> float | None:
    """A finite number, or None."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if good else None
