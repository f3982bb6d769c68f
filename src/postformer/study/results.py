"""gauntlet.json: what a gauntlet has found so far, for reports, claims and other programs."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from postformer.design import DesignError
from postformer.study.cell import Cell
from postformer.study.entry import good
from postformer.study.ledger import Ledger, Outcome
from postformer.task import Task, setting_length, setting_name
from postformer.training.files import write_json

if TYPE_CHECKING:
    from postformer.study.gauntlet import Plan

SCHEMA = 1


def now() -> str:
    """The time, to the second."""
    return moment(None)


def moment(seconds: float | None) -> str:
    """A time since 1970, or now."""
    when = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return when.isoformat(timespec="seconds")


def dumps(value: Any) -> str:
    """JSON without NaN."""
    return json.dumps(value, allow_nan=False)


def read(directory: Path) -> dict[str, Any] | None:
    """gauntlet.json of a directory, if there is one."""
    file = directory / "gauntlet.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def write(directory: Path, found: dict[str, Any], name: str = "gauntlet.json") -> None:
    """Write a study's results, as one action."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / name, found)


def claims_only() -> dict[str, Any]:
    """The frame of a result without designs, for claims that need none."""
    return {"schema": SCHEMA, "kind": "gauntlet", "title": "Claims", "command": "postformer gauntlet --claims",
            "started": now(), "ended": now(), "environment": environment(), "tier": "", "match": None, "seeds": 0,
            "designs": [], "tasks": [], "cells": [], "costs": [], "published": []}


def results(plan: Plan, ledger: Ledger, started: str) -> dict[str, Any]:
    """The content of gauntlet.json."""
    outcomes = ledger.outcomes()
    cells = [_cell(cell, outcomes) for cell in plan.cells]
    over = all(not cell.unknown(outcomes) and all(t.id in outcomes for t in cell.wanted(outcomes))
               for cell in plan.cells)
    first = next(iter(plan.entries))
    reference = next(iter(plan.designs))
    return {
        "schema": SCHEMA, "kind": "gauntlet", "title": f"Gauntlet: {plan.tier}", "command": plan.command,
        "started": started, "ended": moment(ledger.ended()) if over else None, "environment": environment(),
        "tier": plan.tier, "seeds": plan.seeds,
        "match": {"on": plan.match, "reference": reference} if plan.match else None,
        "designs": [
            {"key": key, "name": key, "recipe": recipe.name, "id": recipe.id, "paper": recipe.paper,
             "summary": recipe.summary,
             "layers": {c.entry.key: len(c.recipe.model.stack) for c in plan.cells if c.design == key},
             "width": {c.entry.key: c.recipe.model.width for c in plan.cells if c.design == key}}
            for key, recipe in plan.designs.items()],
        "tasks": [_task(key, entry, cells) for key, entry in plan.entries.items()],
        "cells": cells,
        "costs": [_costs(cell, ledger, cells) for cell in plan.cells if cell.entry.key == first],
        "published": [],
    }  # fmt: skip


def environment() -> dict[str, str]:
    """Where and with what."""
    found = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}",
             "cores": str(os.cpu_count()), "threads per trial": "1"}
    for package in ("postformer", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _task(key: str, entry: Any, cells: list[dict[str, Any]]) -> dict[str, Any]:
    task: Task = entry.make()
    settings = [{"setting": s, "name": setting_name(s), "inside": s in task.difficulties.inside,
                 "chance": task.chance(s), "shortcut": task.shortcut(s)} for s in task.difficulties.evaluate]
    about = task.describe()
    return {
        "key": key, "task": entry.task, "title": key, "about": about, "paper": None, "metric": task.metric,
        "better": task.better, "unit": task.unit, "settings": settings, "train": list(task.difficulties.train),
        "tokens": entry.tokens, "batch_size": entry.batch_size, "rates": list(entry.rates), "width": entry.width,
        "layers": entry.layers, "local": entry.local, "note": entry.note,
        "learned": entry.learned is not None or _somebody(key, task, cells),
    }  # fmt: skip


def _somebody(key: str, task: Task, cells: list[dict[str, Any]]) -> bool:
    """Whether a design of this study has learned the easiest setting."""
    easiest = (task.difficulties.inside or task.difficulties.evaluate)[0]
    return any(good(task, easiest, seed["test"][setting_name(easiest)][task.metric])
               for cell in cells if cell["task"] == key for seed in cell["seeds"])


def _cell(cell: Cell, outcomes: dict[str, Outcome]) -> dict[str, Any]:
    task, recipe = cell.entry.make(), cell.recipe
    lengths = {setting_name(s): setting_length(s) for s in task.difficulties.evaluate}
    trained = max(map(setting_length, task.difficulties.train))
    try:
        cost = recipe.cost()
        counted: dict[str, Any] = {"params": cost.params, "flops_per_token": cost.flops(trained) / trained,
                                   "state_bytes": {name: cost.state_bytes(n) for name, n in lengths.items()}}
    except DesignError:
        counted = {"params": None, "flops_per_token": None, "state_bytes": {}}
    sweep, seeds, failures = [], [], []
    for trial in cell.wanted(outcomes):
        found = outcomes.get(trial.id)
        if found is None:
            continue
        if found.status == "failed":
            failures.append({"stage": trial.stage, "rate": trial.rate, "seed": trial.seed, "why": found.data["error"],
                             "log": found.data["log"]})
        if trial.stage == "sweep":
            score = cell.score(found) if found.status == "finished" else None
            sweep.append({"rate": trial.rate, "tokens": trial.tokens, "validation": score, "status": found.status})
        elif found.status == "finished":
            result = found.data["result"]
            counted["params"] = counted["params"] or result["params"]
            seeds.append({
                "seed": trial.seed, "validation": result["validation"], "test": found.data["test"],
                "tokens": result["tokens"], "steps": result["step"], "seconds": result["elapsed_s"],
                "tokens_per_s": result["tokens_per_s"],
                "stopped": "solved" if result["reason"] == "solved" else "budget"})  # fmt: skip
    return {"design": cell.design, "task": cell.entry.key, **counted, "rate": cell.rate(outcomes), "sweep": sweep,
            "seeds": seeds, "failures": failures, "status": _status(cell, outcomes)}


def _status(cell: Cell, outcomes: dict[str, Outcome]) -> str:
    finals = cell.finals(outcomes)
    if cell.failed(outcomes) or (finals and all(
            t.id in outcomes and outcomes[t.id].status == "failed" for t in finals)):
        return "failed"
    return "finished" if finals and all(t.id in outcomes for t in finals) else "running"


def _costs(cell: Cell, ledger: Ledger, cells: list[dict[str, Any]]) -> dict[str, Any]:
    speeds = [s["tokens_per_s"] for c in cells if c["design"] == cell.design and c["task"] == cell.entry.key
              for s in c["seeds"]]
    measured = json.loads(ledger.about(f"cost {cell.recipe.id}") or "[]")
    return {"design": cell.design, "train_tokens_per_s": sum(speeds) / len(speeds) if speeds else None, "decode": [
        {"context": p["context"], "seconds_per_token": p["seconds_per_token"], "state_bytes": p["measured_bytes"]}
        for p in measured]}
