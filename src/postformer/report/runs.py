"""The content of the page about any run directories: loss curves, task scores where there are some, one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from postformer.design import DesignError, load, registry
from postformer.report import findings, numbers
from postformer.report.figures import Series, loss_curves, svg
from postformer.report.reading import RunFiles, read_runs
from postformer.report.style import Look, swatch
from postformer.report.tables import Column, Table

_MATCHED = "Whether the runs are matched in data, tokens or parameters stands in the table, not in the picture."
_SCORES = ("token_accuracy", "exact_match", "last_accuracy")
_CURVES = (("bits_per_byte", "Bits per byte"), ("loss", "Loss, nats"))


def runs_page(directories: Sequence[Path]) -> dict[str, Any]:
    """Everything that the template needs about these run directories.

    Raises ValueError where not one of them holds anything readable.
    """
    runs = read_runs(directories)
    good = [r for r in runs if r.metrics or r.result]
    if not good:
        reasons = "; ".join(f"{r.directory}: {r.problem}" for r in runs)
        raise ValueError(f"no run to report on ({reasons}). A run directory holds run.json and metrics.jsonl.")
    looks = {r.name: Look(i) for i, r in enumerate(runs)}
    swatches = {name: swatch(look) for name, look in looks.items()}
    seeds = {r.run["seed"] for r in good if r.run.get("seed") is not None}
    sections = [s for key, label in _CURVES if (s := _curve_section(good, key, label, looks)) is not None][:1]
    sections += _score_sections(good, swatches)
    commands = list(dict.fromkeys(r.run["command"] for r in good if r.run.get("command")))
    return {
        "kind": "runs",
        "title": f"{numbers.plural(len(runs), 'run')}: {numbers.listing([r.name for r in runs[:3]])}"
        + (" and more" if len(runs) > 3 else ""),
        "eyebrow": "postformer report",
        "lead": f"{numbers.plural(len(good), 'training run')}, read from {'its' if len(good) == 1 else 'their'} "
        f"{'directory' if len(good) == 1 else 'directories'}.",
        "caveat": _caveat(good, seeds),
        "facts": [("Seeds", ", ".join(map(str, sorted(seeds, key=str))) or numbers.MISSING)],
        "failed": [{"name": r.name, "reason": r.problem} for r in runs if r.problem],
        "attempted": len(runs),
        "architectures": [_choices(r, swatches[r.name]) for r in good if r.recipe],
        "glance": None,
        "sections": sections,
        "costs": _table(runs, swatches),
        "command": "\n".join(commands),
        "environment": {
            k: v for k, v in (good[0].run.get("environment") or {}).items() if not isinstance(v, (dict, list))
        },
        "numbers": {
            "runs": [
                {"name": r.name, "run": r.run, "result": r.result, "metrics": r.metrics, "problem": r.problem}
                for r in runs
            ]
        },
    }


def _curve_section(runs: Sequence[RunFiles], key: str, label: str, looks: dict[str, Look]) -> dict[str, Any] | None:
    series, ends, tokens = [], {}, {}
    for run in runs:
        x, y = run.curve(key)
        if not x:
            continue
        marks = tuple(zip(*run.curve(f"validation_{key}")))
        series.append(Series(run.name, looks[run.name], x, y, marks))
        if (last := run.last(f"validation_{key}")) is not None:
            ends[run.name], tokens[run.name] = last, x[-1]
    if not series:
        return None
    seen = ""
    if ends and key == "bits_per_byte":
        seen = findings.text(ends, tokens)
    return {
        "id": "loss",
        "title": "Learning",
        "paper": None,
        "setup": [],
        "left_out": {},
        "notes": [],
        "empty": "",
        "tables": [],
        "about": f"{label} against training tokens.",
        "figures": [
            {
                "svg": svg(loss_curves(series, label), "loss", f"{label} against training tokens", seen or label),
                "caption": "Lines: training loss, averaged over short stretches; open markers, where there are some: "
                "held-out data. Runs on different data cannot be compared.",
                "seen": seen,
                "expected": "",
            }
        ],
    }


def _score_sections(runs: Sequence[RunFiles], swatches: dict[str, str]) -> list[dict[str, Any]]:
    """One section per task that runs were trained on: its accuracy at every setting that was evaluated."""
    tasks: dict[str, list[RunFiles]] = {}
    for run in runs:
        scores = run.result.get("validation")
        if isinstance(scores, dict) and any(name.rpartition("/")[2] in _SCORES for name in scores):
            tasks.setdefault(str((run.run.get("data") or {}).get("name", "task")), []).append(run)
    sections = []
    for index, (task, members) in enumerate(tasks.items()):
        tables = []
        for score in _SCORES:
            settings = list(
                dict.fromkeys(
                    name.rpartition("/")[0]
                    for run in members
                    for name in run.result["validation"]
                    if "/" in name and name.rpartition("/")[2] == score
                )
            )
            rows = [
                {"name": run.name} | {s: run.result["validation"].get(f"{s}/{score}") for s in settings}
                for run in members
            ]
            columns = [Column("name", "Run", numeric=False)] + [Column(s, s, numbers.accuracy) for s in settings]
            if settings:
                tables.append(Table(f"{task}: {score.replace('_', ' ')} by setting", columns, rows, swatches))
        sections.append(
            {
                "id": f"task-{index}",
                "title": f"Task: {task}",
                "paper": None,
                "setup": [],
                "left_out": {},
                "notes": [],
                "empty": "",
                "tables": tables,
                "figures": [],
                "about": "Accuracy on held-out problems; a setting is a length, or a length x a number of pairs.",
            }
        )
    return sections


def _choices(run: RunFiles, drawn: str) -> dict[str, Any]:
    """The four choices of the run's memories, as their kinds state them; empty where the recipe cannot be read."""
    paper, found, summary, maps = run.recipe.get("paper"), [], "", ""
    try:
        recipe = load(run.recipe)
        summary, maps = recipe.summary, recipe.model.linear.in_words
        mixers = [m for d in recipe.model.mixers.values() for m in (d, *(m for _, m in registry.inside(d, "")))]
        found = [c for m in mixers if (c := registry.resolve(m.kind).choices(m))]
    except DesignError:
        pass  # a kind of a package that is not installed here: the run's numbers are shown all the same

    def each(name: str) -> str:
        return "; ".join(dict.fromkeys(getattr(c, name) for c in found))

    return {
        "name": run.name,
        "swatch": drawn,
        "summary": summary,
        "mathml": "",
        "memory": each("memory"),
        "inner_loss": each("loss"),
        "retention": each("retention"),
        "update": each("update"),
        "linear": maps,
        "paper": paper if isinstance(paper, list) else str(paper) if paper else None,
    }


def _table(runs: Sequence[RunFiles], swatches: dict[str, str]) -> Table:
    rows = [
        {
            "name": r.name,
            "params": r.result.get("params"),
            "tokens": r.last("tokens"),
            "steps": r.last("steps") or r.last("step"),
            "bits": r.last("bits_per_byte"),
            "validation": r.last("validation_bits_per_byte"),
            "loss": r.last("loss"),
            "rate": r.last("tokens_per_s"),
            "seconds": r.last("elapsed_s"),
            "seed": r.run.get("seed"),
            "recipe_id": str(r.run.get("recipe_id") or r.run.get("id") or "")[:12] or None,
            "outcome": "failed" if r.problem else "done",
        }
        for r in runs
    ]
    columns = [
        Column("name", "Run", numeric=False),
        Column("params", "Parameters", numbers.count),
        Column("steps", "Steps", numbers.count),
        Column("tokens", "Tokens seen", numbers.short),
        Column("loss", "Last loss, nats", numbers.bits),
        Column("bits", "Last training bits per byte", numbers.bits),
        Column("validation", "Held-out bits per byte", numbers.bits),
        Column("rate", "Tokens per s", numbers.short),
        Column("seconds", "Time", numbers.duration),
        Column("seed", "Seed"),
        Column("recipe_id", "Design id", numeric=False),
        Column("outcome", "Outcome", numeric=False),
    ]
    return Table("All runs", [c for c in columns if any(row[c.key] is not None for row in rows)], rows, swatches)


def _caveat(runs: Sequence[RunFiles], seeds: set[Any]) -> str:
    if len(runs) == 1:
        return "One run with one seed says what happened once; how far another seed would land from it is not known."
    if len(seeds) < 3:
        return (
            f"{numbers.plural(max(len(seeds), 1), 'seed')}: fewer than three cannot tell a small difference from "
            f"chance. {_MATCHED}"
        )
    return _MATCHED
