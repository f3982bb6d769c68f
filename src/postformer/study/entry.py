"""Entries: a task with the size of model, the budget and the learning rates at which designs are compared on it.

A tier is a YAML file of entries by name, `study/tiers/NAME.yaml`.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from postformer.design import DesignError, Recipe, load, registry
from postformer.design.base import nearest
from postformer.design.loading import narrow_heads
from postformer.task import Setting, Task
from postformer.task import load as load_task

TIERS = ("sprint", "recall", "palimpsest", "standard", "paper")
MOST_LAYERS = 24


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Learned(_Data):
    """A recipe that reaches 0.9 at the task's easiest setting, within `tokens` at `rate`: the task can be learned."""

    recipe: str
    rate: float
    tokens: int
    setting: Setting
    level: float | None = None
    """What counts as learned; None: 0.9, and at least half of the way from the shortcut to 1; where less is better,
    three quarters of the shortcut's figure"""

    def reached(self, task: Task, found: float) -> bool:
        """Whether a figure of the task's metric is that good."""
        return good(task, self.setting, found, self.level)


def good(task: Task, setting: Setting, found: float, level: float | None = None) -> bool:
    """Whether a task counts as learned at a setting by a figure of its metric."""
    if task.better == "lower":
        return found <= (0.75 * task.shortcut(setting) if level is None else level)
    return found >= (max(0.9, (1 + task.shortcut(setting)) / 2) if level is None else level)


class Entry(_Data):
    """One row of a tier. Every design trains on the same problems, with the same number of tokens."""

    key: str
    """Its name in the tier, the ledger and the report"""
    task: str
    options: dict[str, Any] = {}
    """Keywords of the task's constructor"""
    width: int = 32
    head: int = 16
    """Channels of a head where a recipe has more, which then has more heads instead"""
    layers: int = 2
    """Layers of a feed-forward and a mixer; where a recipe's pattern needs more, it gets the fewest that hold it"""
    local: bool = True
    """Whether recipes keep their short convolutions; what has no form without (RWKV-7's token shift) keeps it anyhow"""
    batch_size: int = 64
    tokens: int = Field(gt=0)
    """Training budget of one trial; the sweep of learning rates begins with a quarter of it"""
    equal: Literal["tokens", "flops"] = "tokens"
    """flops: the first design has the tokens, every other as many as cost the same training FLOPs"""
    rates: tuple[float, ...] = Field(default=(1e-3, 3e-3, 1e-2), min_length=3)
    extend: int = Field(default=2, ge=0)
    """How often a sweep whose best rate lies at an end may go one step further there"""
    finalists: int = Field(default=2, ge=1)
    """How many of the best rates get the whole budget before one is chosen; 1: a quarter of it decides"""
    first_seed: int = Field(default=0, ge=0)
    """Of the trials that count: designs that were developed by what seeds 0, 1, 2 showed are judged on others"""
    until: float | None = 0.995
    """A trial stops early where validation is so good at every setting (negative where less is better)"""
    evaluate_batches: int = 8
    """Validation batches per setting and evaluation"""
    test_batches: int = 16
    learned: Learned | None = None
    """None: marked as unlearned in every report"""
    note: str = ""

    def make(self) -> Task:
        """The task. Raises TaskError."""
        return load_task(self.task, **self.options)

    def sized(self, recipe: Recipe | str, width: int | None = None) -> Recipe:
        """The design at this entry's size (or another width), with the task's vocabulary. Raises DesignError."""
        base = narrow_heads(load(recipe), self.head)
        overrides = [f"model.vocab={self.make().vocab}"]
        if not self.local:
            overrides += _without_local(base)
        return fitted(base, width or self.width, self.layers, overrides)


def _without_local(recipe: Recipe) -> list[str]:
    """Overrides that take away local mixing from every mixer, nested ones included, that can be without."""
    found = []
    for name, mixer in recipe.model.mixers.items():
        for where, inner in [(name, mixer), *registry.inside(mixer, name)]:
            if "local" in type(inner).model_fields:
                try:
                    load(recipe, [change := f"model.mixers.{where}.local=none"])
                except DesignError:
                    continue
                found.append(change)
    return found


def fitted(recipe: Recipe | str, width: int, layers: int, overrides: list[str]) -> Recipe:
    """The recipe with so many layers, or the fewest more that hold its whole pattern. Raises DesignError."""
    number = layers
    while True:
        try:
            return load(recipe, overrides, width, number)
        except DesignError as error:
            if "stands in no layer" not in error.message or number >= MOST_LAYERS:
                raise
        number += 1


@cache
def tier(name: str) -> dict[str, Entry]:
    """The entries of a tier by key, in order. Raises ValueError for a tier that does not exist."""
    if name not in TIERS:
        raise ValueError(f"no tier is named {name!r}.{nearest(name, TIERS)}")
    text = files("postformer").joinpath("study", "tiers", f"{name}.yaml").read_text(encoding="utf-8")
    found = {}
    for key, value in yaml.safe_load(text).items():
        try:
            found[key] = Entry.model_validate({"key": key, **value})
        except ValidationError as error:
            raise ValueError(f"tier {name}, entry {key}: {error}") from None
    return found
