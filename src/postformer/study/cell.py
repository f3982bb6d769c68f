"""Cell: one design on one entry, and the trials that judge it.

The learning rates are halved by their validation scores until at most three are left; those get a quarter of the
budget. The best two get all of it, since a rate that is best for a quarter may be too high for the whole; while the
best then lies at an end of what was tried, the next rate beyond it is tried too, some times. The best gets the whole
budget, once per seed. Only these final trials read the test split.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from postformer.design import Recipe
from postformer.study.entry import Entry
from postformer.study.ledger import Outcome
from postformer.study.trial import Trial
from postformer.task import setting_name

SHARE = 4
"""The sweep's last round has one part in so many of the budget."""
SWEEP_SEED = 1_000_000
"""Of sweeps: no final trial has the luck that its rate was chosen by."""


@dataclass
class Cell:
    design: str
    entry: Entry
    recipe: Recipe
    """At the entry's size"""
    seeds: int
    budget: int = 0
    """Training tokens of a trial that counts; 0: the entry's"""
    _made: dict[tuple[Any, ...], Trial] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """The budget."""
        return self.budget or self.entry.tokens

    def trial(self, stage: str, rate: float, seed: int, tokens: int) -> Trial:
        """One of this cell; the same object every time."""
        key = (stage, rate, seed, tokens)
        if key not in self._made:
            self._made[key] = Trial(design=self.design, recipe=self.recipe.said(), entry=self.entry,
                                    stage=stage, rate=rate, seed=seed, tokens=tokens)  # type: ignore[arg-type]
        return self._made[key]

    def sweep(self, outcomes: Mapping[str, Outcome]) -> list[list[Trial]]:
        """The rounds of the sweep as far as they are known; each round's trials by rate."""
        rates: Sequence[float] = sorted(self.entry.rates)
        sizes = [len(rates)]
        while sizes[-1] > 3:
            sizes.append(max(1, sizes[-1] // 2))
        rounds: list[list[Trial]] = []
        for left in range(len(sizes) - 1, -1, -1):
            tokens = max(1, self.tokens // (SHARE * 2**left))
            rounds.append([self.trial("sweep", rate, SWEEP_SEED, tokens) for rate in rates])
            if not left:
                break
            ranked = self._ranked(rounds[-1], outcomes)
            if ranked is None:
                break
            rates = sorted(t.rate for t in ranked[: sizes[len(rounds)]])
        if len(rounds) == len(sizes):
            ranked = self._ranked(rounds[-1], outcomes)
            if ranked and self.entry.finalists > 1:
                rounds.append(self._finalists(ranked, outcomes))
            rounds[-1] += self._beyond(rounds[-1], outcomes)
        return rounds

    def _finalists(self, ranked: list[Trial], outcomes: Mapping[str, Outcome]) -> list[Trial]:
        """The best with the whole budget; the next best in the place of one that failed there."""
        found, left = [], self.entry.finalists
        for trial in ranked:
            found.append(self.trial("sweep", trial.rate, SWEEP_SEED, self.tokens))
            outcome = outcomes.get(found[-1].id)
            left -= outcome is None or outcome.status == "finished"
            if not left:
                break
        return found

    def _beyond(self, last: list[Trial], outcomes: Mapping[str, Outcome]) -> list[Trial]:
        """Trials past an end of the sweep, as long as the best one lies there."""
        rates, found = sorted(self.entry.rates), []
        for _ in range(self.entry.extend):
            ranked = self._ranked([*last, *found], outcomes)
            if not ranked or len(rates) < 2 or ranked[0].rate not in (rates[0], rates[-1]):
                break
            upwards = ranked[0].rate == rates[-1]
            edge, inner = (rates[-1], rates[-2]) if upwards else (rates[0], rates[1])
            found.append(self.trial("sweep", float(f"{edge**2 / inner:.3g}"), SWEEP_SEED, last[0].tokens))
            rates = sorted([*rates, found[-1].rate])
        return found

    def rate(self, outcomes: Mapping[str, Outcome]) -> float | None:
        """The best rate; None while it is not known, or if every rate failed."""
        ranked = self._ranked(self.sweep(outcomes)[-1], outcomes)
        return ranked[0].rate if ranked else None

    def finals(self, outcomes: Mapping[str, Outcome]) -> list[Trial]:
        """Those that count; none while the rate is not known."""
        rate = self.rate(outcomes)
        first = self.entry.first_seed
        return [] if rate is None else [self.trial("final", rate, seed, self.tokens)
                                        for seed in range(first, first + self.seeds)]

    def wanted(self, outcomes: Mapping[str, Outcome]) -> list[Trial]:
        """All trials that are known to be needed."""
        return [t for part in self.sweep(outcomes) for t in part] + self.finals(outcomes)

    def unknown(self, outcomes: Mapping[str, Outcome]) -> int:
        """How many more will be needed, about."""
        if self.finals(outcomes) or self.failed(outcomes):
            return 0
        chosen = self.sweep(outcomes)[-1][0].tokens == self.tokens
        return self.seeds + (0 if chosen or self.entry.finalists < 2 else self.entry.finalists)

    def failed(self, outcomes: Mapping[str, Outcome]) -> bool:
        """Whether no rate could be trained."""
        last = self.sweep(outcomes)[-1]
        return all(t.id in outcomes and outcomes[t.id].status != "finished" for t in last)

    def score(self, outcome: Outcome) -> float:
        """The task's metric on the validation split, the mean over all evaluation settings."""
        task = self.entry.make()
        found = outcome.data["result"]["validation"]
        return statistics.mean(found[f"{setting_name(s)}/{task.metric}"] for s in task.difficulties.evaluate)

    def _ranked(self, trials: list[Trial], outcomes: Mapping[str, Outcome]) -> list[Trial] | None:
        """Best first, without those that failed; None while some are not known."""
        if any(t.id not in outcomes for t in trials):
            return None
        sign = -1 if self.entry.make().better == "higher" else 1

        def key(trial: Trial) -> tuple[float, int, float]:
            result = outcomes[trial.id].data["result"]
            # Where several solve the task, the one that needed least of it; where none has begun to, the least loss.
            return sign * round(self.score(outcomes[trial.id]), 6), result["tokens"], result["validation"]["loss"]

        return sorted((t for t in trials if outcomes[t.id].status == "finished"), key=key)
