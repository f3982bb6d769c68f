"""The gauntlet: designs x tasks, learning rates swept, seeds repeated, everything in one ledger and one result.

    run_gauntlet(ask(["transformer", "gated-deltanet"], "sprint"), "runs/gauntlet")      # ask: postformer.study.asking

    ledger.sqlite      trials and outcomes; several runners may share it
    ledger.jsonl       the same as text, written at the end of a session
    trials/ID/         the run of each trial
    gauntlet.json      the result so far; what the report reads
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from postformer.design import Recipe
from postformer.study import results
from postformer.study.cell import Cell
from postformer.study.entry import Entry
from postformer.study.ledger import Ledger, Outcome
from postformer.study.match import Quantity, amount, matched
from postformer.study.pool import Job, Pool
from postformer.study.ray_pool import RayPool
from postformer.study.trial import Trial
from postformer.training.files import write_text

CONTEXTS = (128, 512, 2048, 8192)
LIMIT = 3600.0
"""Seconds after which a trial is taken to hang, unless told otherwise."""


@dataclass
class Plan:
    """What is asked of a gauntlet."""

    designs: Mapping[str, Recipe]
    """By the name in the report"""
    entries: Mapping[str, Entry]
    seeds: int = 3
    match: Quantity | None = None
    """The first design is the measure of the others"""
    tier: str = "sprint"
    command: str = "postformer gauntlet"
    cells: list[Cell] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Size all designs. Raises DesignError, TaskError, ValueError: what cannot be compared is refused first."""
        if not self.designs or not self.entries or self.seeds < 1:
            raise ValueError("a gauntlet needs at least one design, one task and one seed")
        for entry in self.entries.values():
            first = entry.sized(next(iter(self.designs.values())))
            for number, (name, recipe) in enumerate(self.designs.items()):
                sized = entry.sized(recipe)
                if self.match and number:
                    sized = matched(recipe, entry, self.match, amount(first, entry, self.match))
                share = amount(first, entry, "flops") / amount(sized, entry, "flops") if entry.equal == "flops" else 1
                self.cells.append(Cell(name, entry, sized, self.seeds, round(entry.tokens * share)))


    def lines(self) -> list[str]:
        """What will be done, for people; deeper models than the entry asks for are named."""
        rates = max(len(entry.rates) for entry in self.entries.values())
        finalists = max(entry.finalists for entry in self.entries.values())
        again = f"the best {finalists} on all of it, " if finalists > 1 else ""
        out = [f"{len(self.designs)} designs x {len(self.entries)} tasks: {rates} learning rates on a quarter of the "
               f"budget, {again}then {self.seeds} seed{'s' * (self.seeds > 1)} at the best"]
        if self.match:
            first = next(iter(self.designs))
            out.append(f"matched in {self.match} to {first}: " + "; ".join(
                f"{c.design} on {c.entry.key} at width {c.recipe.model.width}" for c in self.cells
                if c.design != first))
        return out + [f"{cell.design} has {layers} layers on {cell.entry.key}, not {cell.entry.layers}: its pattern "
                      "needs them" for cell in self.cells
                      if (layers := len(cell.recipe.model.stack)) > cell.entry.layers]


def run_gauntlet(
    plan: Plan, directory: str | Path, *, workers: int | Literal["ray"] | None = None, limit: float = LIMIT,
    costs: bool = True, merge: str | None = None, progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run what the ledger of the directory does not have yet -> the content of gauntlet.json.

    workers: processes of one thread each; None: one per core; "ray": those of a Ray cluster. limit: seconds that a
    trial may take. costs: measure decoding too, at the end. merge: an exported ledger to take over first.

    A trial that fails is recorded and the others go on. Raises LedgerError, TestSplitRead; KeyboardInterrupt after
    saving what runs.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with Ledger(directory / "ledger.sqlite") as ledger:
        if merge is not None:
            ledger.merge(merge)
        session = _Session(plan, directory, ledger, limit, progress or (lambda line: print(line, flush=True)))
        return session.run(workers or os.cpu_count() or 1, costs)


class _Session:
    def __init__(self, plan: Plan, directory: Path, ledger: Ledger, limit: float, say: Callable[[str], None]) -> None:
        self.plan, self.directory, self.ledger, self.limit, self.say = plan, directory, ledger, limit, say
        self.started = ledger.note("started", results.now())
        self.outcomes: dict[str, Outcome] = {}
        self.written = 0.0
        self.at_once = 1
        """Trials that run beside each other, for the time left"""

    def run(self, workers: int | Literal["ray"], costs: bool) -> dict[str, Any]:
        self.at_once = workers if isinstance(workers, int) else os.cpu_count() or 1
        ended = threading.Event()
        renewing = threading.Thread(target=self._renew, args=(ended,), daemon=True)
        renewing.start()
        try:
            while self._open():
                with self._pool(workers) as pool:
                    pool.run(self._take, self._done)
                if self._open():
                    time.sleep(1)  # another runner of this ledger works on what is left
            if costs:
                # Alone, so that nothing else takes the time that is measured.
                with Pool(1, self.directory / "logs") as pool:
                    jobs = iter(self._cost_jobs())
                    pool.run(lambda: next(jobs, None), self._measured)
        finally:
            ended.set()
            renewing.join()
            found = self.write()
            write_text(self.directory / "ledger.jsonl", self.ledger.export())
        return found

    def _pool(self, workers: int | Literal["ray"]) -> Pool | RayPool:
        logs = self.directory / "logs"
        return RayPool(logs) if workers == "ray" else Pool(min(workers, max(1, len(self._open()))), logs)

    def _renew(self, ended: threading.Event) -> None:
        while not ended.wait(10):
            with contextlib.suppress(Exception):  # a busy ledger: the next time will do
                self.ledger.renew()

    def _open(self) -> list[Trial]:
        """Trials that are needed and have no outcome yet, in order; they are in the ledger then."""
        self.outcomes = self.ledger.outcomes()
        found = [t for cell in self.plan.cells for t in cell.wanted(self.outcomes) if t.id not in self.outcomes]
        self.ledger.add(found)
        return found

    def _take(self) -> Job | None:
        trial = self.ledger.take(self._open())
        if trial is None:
            return None
        if test := trial.stage == "final":
            self.ledger.open_test(trial)
        return {"kind": "trial", "trial": trial.model_dump_json(exclude_unset=True), "directory": str(self._run(trial)),
                "test": test, "command": self.plan.command, "limit": self.limit, "spec": trial.id}

    def _run(self, trial: Trial) -> Path:
        return self.directory / "trials" / trial.id

    def _trial(self, job: Job) -> Trial:
        return next(t for cell in self.plan.cells for t in cell.wanted(self.outcomes) if t.id == job["spec"])

    def _done(self, job: Job, outcome: dict[str, Any]) -> None:
        trial = self._trial(job)
        if outcome.get("interrupted"):
            self.ledger.release(trial)
            return
        if "error" in outcome:
            log = self._run(trial) / "train.log"
            where = log if log.exists() else self.directory / "logs"
            ended = Outcome("failed", {"error": outcome["error"], "log": os.path.relpath(where, self.directory)})
        else:
            ended = Outcome("finished", outcome)
        self.ledger.finish(trial, ended)
        self.outcomes[trial.id] = ended  # the whole ledger is read before the next trial is taken
        if trial.stage == "sweep":
            shutil.rmtree(self._run(trial) / "checkpoints", ignore_errors=True)
        self.say(self._line(trial, ended))
        if time.monotonic() - self.written > 5:
            self.write()

    def _line(self, trial: Trial, ended: Outcome) -> str:
        done, total = self._progress()
        cell = next(c for c in self.plan.cells if c.design == trial.design and c.entry.key == trial.entry.key)
        if ended.status == "failed":
            what = f"FAILED, {ended.data['error']} (see {ended.data['log']})"
        else:
            result = ended.data["result"]
            how = "solved" if result["reason"] == "solved" else f"{result['tokens']:,} tokens"
            what = (f"{cell.entry.make().metric} {cell.score(ended):.3f} on validation, {how}, "
                    f"{result['elapsed_s']:.0f} s")
        return f"[{done}/{total}] {trial.label()}: {what}{self._left()}"

    def _progress(self) -> tuple[int, int]:
        wanted = [t for cell in self.plan.cells for t in cell.wanted(self.outcomes)]
        more = sum(cell.unknown(self.outcomes) for cell in self.plan.cells)
        return sum(t.id in self.outcomes for t in wanted), len(wanted) + more

    def _left(self) -> str:
        """Estimated time left, by the seconds per token of what is finished: of the same cell, task, or any."""
        speeds: dict[Any, list[float]] = {}
        for cell in self.plan.cells:
            for trial in cell.wanted(self.outcomes):
                if (found := self.outcomes.get(trial.id)) and found.status == "finished":
                    pace = found.data["result"]["elapsed_s"] / trial.tokens
                    for key in ((cell.design, cell.entry.key), cell.entry.key, None):
                        speeds.setdefault(key, []).append(pace)
        seconds = 0.0
        for cell in self.plan.cells:
            keys = ((cell.design, cell.entry.key), cell.entry.key, None)
            pace = next((statistics.mean(speeds[key]) for key in keys if key in speeds), 0.0)
            tokens = sum(t.tokens for t in cell.wanted(self.outcomes) if t.id not in self.outcomes)
            seconds += pace * (tokens + cell.unknown(self.outcomes) * cell.tokens)
        seconds /= self.at_once
        return f"; about {seconds / 60:.0f} min left" if seconds >= 30 else ""

    def _cost_jobs(self) -> list[Job]:
        entry = next(iter(self.plan.entries.values()))
        return [{"kind": "cost", "design": cell.design, "recipe": cell.recipe.said(), "contexts": list(CONTEXTS),
                 "time_limit": 20.0, "limit": 60.0} for cell in self.plan.cells
                if cell.entry is entry and self.ledger.about(f"cost {cell.recipe.id}") is None]

    def _measured(self, job: Job, outcome: dict[str, Any]) -> None:
        if "error" in outcome:
            self.say(f"decoding {job['design']}: FAILED, {outcome['error']}")
            return
        cell = next(c for c in self.plan.cells if c.design == job["design"])
        self.ledger.note(f"cost {cell.recipe.id}", results.dumps(outcome["decode"]))

    def write(self) -> dict[str, Any]:
        """Write gauntlet.json as far as it is known."""
        found = results.results(self.plan, self.ledger, self.started)
        results.write(self.directory, found)
        self.written = time.monotonic()
        return found


def command_line(default: str) -> str:
    """What the user typed, for the record; `default` where Python was asked."""
    import shlex

    name = Path(sys.argv[0]).name
    return shlex.join(["postformer", *sys.argv[1:]]) if name.startswith("postformer") else default
