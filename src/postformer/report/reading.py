"""Reads what a demo or a training run left on disk. A missing or broken run is reported as failed, never raised."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


@dataclass
class RunFiles:
    """One run directory as far as it could be read."""

    directory: Path
    name: str
    run: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    problem: str | None = None

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """(tokens, value) of the lines of metrics.jsonl that hold a finite `key`."""
        points = [(m["tokens"], m[key]) for m in self.metrics if _finite(m.get(key)) and _finite(m.get("tokens"))]
        return [p[0] for p in points], [p[1] for p in points]

    def last(self, key: str) -> float | None:
        """`key` from result.json, or else the last finite one of metrics.jsonl."""
        if _finite(self.result.get(key)):
            return self.result[key]
        return next((m[key] for m in reversed(self.metrics) if _finite(m.get(key))), None)


def read_run(directory: str | Path) -> RunFiles:
    """The files of one run directory; `problem` says what is missing, and everything readable is kept."""
    directory = Path(directory)
    out = RunFiles(directory, directory.name)
    if not directory.is_dir():
        out.problem = "the run directory does not exist"
        return out
    problems = []
    out.run, trouble = _json(directory / "run.json")
    problems += trouble
    out.result, trouble = _json(directory / "result.json")
    problems += [t + ": the run did not finish" if "is missing" in t else t for t in trouble]
    out.name = str(out.run.get("name") or directory.name)
    try:
        out.recipe = yaml.safe_load((directory / "recipe.yaml").read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError):
        out.recipe = {}
    out.metrics = _lines(directory / "metrics.jsonl")
    if not out.metrics:
        problems.append("metrics.jsonl holds no line")
    if out.result.get("error"):
        problems.append(str(out.result["error"]))
    out.problem = "; ".join(problems) or None
    return out


def read_runs(directories: Sequence[str | Path]) -> list[RunFiles]:
    """All of `directories`; names that occur twice get the directory's name added, so that labels stay distinct."""
    runs = [read_run(d) for d in _each(directories)]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = f"{run.name} ({run.directory.name})"
    return runs


def _each(directories: Sequence[str | Path]) -> list[Path]:
    """The directories of runs: a training of stages stands for its stages, in order."""
    found: list[Path] = []
    for directory in map(Path, directories):
        stages = directory.glob("stage-*") if (directory / "stages.json").exists() else ()
        found += sorted(stages, key=lambda path: int(path.name.removeprefix("stage-"))) or [directory]
    return found


def unreadable(directories: Sequence[str | Path]) -> dict[str, str]:
    """Of several run directories, those that hold nothing to show: directory -> why."""
    if len(directories) == 1:
        return {}  # a demo's directory, or `runs_page` says what is wrong with the only one
    runs = [read_run(d) for d in _each(directories)]
    return {str(r.directory): r.problem or "it is empty" for r in runs if not (r.metrics or r.result)}


def read_demo(directory: str | Path) -> dict[str, Any]:
    """demo.json, with each run's files attached under `files` and a run that lacks its numbers marked as failed.

    Raises ValueError where demo.json is missing or is not one.
    """
    directory = Path(directory)
    demo, trouble = _json(directory / "demo.json")
    if trouble:
        raise ValueError(f"{directory} is no demo directory: {trouble[0]}. `postformer demo` writes one.")
    if demo.get("kind") != "demo" or not isinstance(demo.get("architectures"), list):
        raise ValueError(f"{directory / 'demo.json'} does not describe a demo; give its run directories instead.")
    for task in demo.setdefault("tasks", []):
        for run in task.get("runs", []):
            run.setdefault("status", "done")
            files = read_run(directory / run["directory"]) if run.get("directory") else None
            run["files"] = files
            needs = "validation_bits_per_byte" if task["key"] == "text" else "points"
            if run["status"] == "done" and not run.get(needs):
                run["status"] = "failed"
                run.setdefault("reason", "no result was recorded")
            if run["status"] == "done" and task["key"] == "text" and (files is None or not files.metrics):
                run["status"] = "failed"
                run["reason"] = (files and files.problem) or "its run directory is not recorded"
            if run["status"] != "done":
                run.setdefault("reason", (files and files.problem) or "no reason was recorded")
    return demo


def _json(path: Path) -> tuple[dict[str, Any], list[str]]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, [f"{path.name} is missing"]
    except (OSError, ValueError) as error:
        return {}, [f"{path.name} cannot be read ({error})"]
    return (value, []) if isinstance(value, dict) else ({}, [f"{path.name} holds no object"])


def _lines(path: Path) -> list[dict[str, Any]]:
    out = []
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return out
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue  # A killed run leaves half a line; what was written before it still counts.
        if isinstance(value, dict):
            out.append(value)
    return out


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
