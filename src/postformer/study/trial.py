"""Trial: one training of one design on one entry with one learning rate and seed; a value that names itself."""

from __future__ import annotations

import hashlib
import json
import statistics
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from postformer.design import Recipe, load
from postformer.study.entry import Entry
from postformer.task import setting_length
from postformer.training import TrainConfig

EVALUATIONS = 12
"""During a trial, each of which may find it solved."""


class Trial(BaseModel):
    """Everything that its result depends on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    design: str
    """The design's name in its study"""
    recipe: dict[str, Any]
    """As `Recipe.said`, at the entry's size"""
    entry: Entry
    stage: Literal["sweep", "final"]
    """sweep: chooses a learning rate on the validation split; final: counts, and reads the test split, once"""
    rate: float
    seed: int
    tokens: int

    @cached_property
    def made(self) -> Recipe:
        """The design."""
        return load(self.recipe)

    @cached_property
    def cell(self) -> str:
        """The design on the entry, whatever rate and seed: a hash."""
        aside = {"learned", "note", "rates", "extend", "finalists", "first_seed"}
        entry = self.entry.model_dump(mode="json", exclude=aside, exclude_defaults=True)
        return _hash([self.made.id, entry])

    @cached_property
    def id(self) -> str:
        """Hash of what the result depends on."""
        return _hash([self.cell, self.stage, self.rate, self.seed, self.tokens])

    def config(self) -> TrainConfig:
        """How it is trained."""
        entry = self.entry
        lengths = [setting_length(s) for s in entry.make().difficulties.train]
        steps = max(1, round(self.tokens / entry.batch_size / statistics.mean(lengths)))
        return TrainConfig.model_validate({
            "steps": steps, "batch_size": entry.batch_size, "seed": self.seed, "threads": 1, "until": entry.until,
            "length": max(lengths), "optimiser": {"learning_rate": self.rate},
            "schedule": {"warmup": 0.04, "final": 0.05}, "evaluate_every": max(1, steps // EVALUATIONS),
            "evaluate_batches": entry.evaluate_batches, "checkpoint_every": steps})  # fmt: skip

    def label(self) -> str:
        """For people: "s3 mamba2 rate 0.003 seed 1"."""
        return f"{self.entry.key} {self.design} {'sweep ' if self.stage == 'sweep' else ''}rate {self.rate:g} " \
               f"seed {self.seed}"


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:20]
