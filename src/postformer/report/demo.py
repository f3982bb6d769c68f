"""The content of a demo's page, all of it taken from the demo's directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from postformer.report import numbers
from postformer.report.equation import mathml
from postformer.report.reading import read_demo
from postformer.report.sections import accuracy_section, decode_section, text_section
from postformer.report.style import Look, swatch
from postformer.report.tables import Column, Table

_TEXT = "text"


def demo_page(directory: Path) -> dict[str, Any]:
    """Everything that the template needs about the demo in `directory`."""
    demo = read_demo(directory)
    looks = {a["name"]: Look(i) for i, a in enumerate(demo["architectures"])}
    swatches = {name: swatch(look) for name, look in looks.items()}
    tasks = {task["key"]: task for task in demo["tasks"]}
    sections = []
    for task in demo["tasks"]:
        build = text_section if task["key"] == _TEXT else accuracy_section
        sections.append(build(task, looks, swatches))
    decode = demo.get("decode") or {}
    if decode.get("runs"):
        sections.append(decode_section(decode, looks, swatches))
    runs = [(task, run) for task in demo["tasks"] for run in task.get("runs", [])]
    failed = [
        {"name": f"{task['title']} – {run['architecture']}", "reason": run["reason"]}
        for task, run in runs
        if run["status"] != "done"
    ] + [
        {"name": f"Decoding – {run['architecture']}", "reason": run.get("reason", "no reason was recorded")}
        for run in decode.get("runs", [])
        if run.get("status", "done") != "done"
    ]
    number = len(demo["architectures"])
    return {
        "kind": "demo",
        "title": f"{_words(number)} ways to remember, side by side",
        "eyebrow": "postformer demo",
        "lead": _lead(demo, runs),
        "caveat": _caveat(demo, runs),
        "facts": _facts(demo),
        "failed": failed,
        "attempted": len(runs) + len(decode.get("runs", [])),
        "architectures": [
            a | {"swatch": swatches[a["name"]], "mathml": _equations(a.get("equation"))} for a in demo["architectures"]
        ],
        "glance": _glance(demo, tasks, decode, swatches),
        "sections": sections,
        "costs": _costs(runs, swatches),
        "command": demo.get("command", ""),
        "environment": demo.get("environment", {}),
        "numbers": _without_files(demo),
    }


def _glance(demo: dict[str, Any], tasks: dict[str, Any], decode: dict[str, Any], swatches: dict[str, str]) -> Table:
    columns = [Column("architecture", "Architecture", numeric=False)]
    rows = {a["name"]: {"architecture": a["name"]} for a in demo["architectures"]}
    for key, task in tasks.items():
        done = [r for r in task["runs"] if r["status"] == "done"]
        if key == _TEXT:
            columns.append(Column(key, "Text, bits per byte", numbers.bits))
            for run in done:
                rows[run["architecture"]][key] = run["validation_bits_per_byte"]
            continue
        ats = sorted({p["at"] for r in done for p in r["points"]})
        word = "Tracking" if task["difficulty"] == "length" else "Recall"
        for at in [a for a in ats if a == task["trained"] or a == ats[-1]]:
            columns.append(Column(f"{key} {at:g}", f"{word}, {at:g} {task['unit']}", numbers.accuracy))
            for run in done:
                rows[run["architecture"]][f"{key} {at:g}"] = {p["at"]: p["accuracy"] for p in run["points"]}.get(at)
    points = {
        r["architecture"]: sorted(r["points"], key=lambda p: p["context"])
        for r in decode.get("runs", [])
        if r.get("status", "done") == "done" and r.get("points")
    }
    if points:
        far = max(p[-1]["context"] for p in points.values())
        columns.append(Column("state", f"State at {far:,} tokens", numbers.size))
        columns.append(Column("time", f"Time per token at {far:,}", numbers.duration))
        for name, ps in points.items():
            if ps[-1]["context"] == far:
                rows[name] |= {"state": ps[-1]["declared_bytes"], "time": ps[-1].get("seconds_per_token")}
    return Table(
        "At a glance: accuracy (1 is perfect), bits per byte (less is better), cost of decoding",
        columns,
        list(rows.values()),
        swatches,
    )


def _costs(runs: Sequence[tuple[dict[str, Any], dict[str, Any]]], swatches: dict[str, str]) -> Table:
    rows = [
        {
            k: run.get(k)
            for k in (
                "architecture",
                "params",
                "flops_per_token",
                "state_bytes",
                "steps",
                "tokens",
                "tokens_per_s",
                "seconds",
                "seed",
                "status",
            )
        }
        | {"task": task["key"], "recipe_id": (run.get("recipe_id") or "")[:12] or None}
        for task, run in runs
    ]
    return Table(
        "What each run is and cost",
        [
            Column("architecture", "Architecture", numeric=False),
            Column("task", "Test", numeric=False),
            Column("params", "Parameters", numbers.count),
            Column("flops_per_token", "FLOPs per token", numbers.short),
            Column("state_bytes", "State", numbers.size),
            Column("steps", "Steps", numbers.count),
            Column("tokens", "Tokens seen", numbers.short),
            Column("tokens_per_s", "Tokens per s", numbers.short),
            Column("seconds", "Time", numbers.duration),
            Column("seed", "Seed"),
            Column("recipe_id", "Design id", numeric=False),
            Column("status", "Outcome", numeric=False),
        ],
        rows,
        swatches,
    )


def _lead(demo: dict[str, Any], runs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    done = sum(run["status"] == "done" for _, run in runs)
    number = len(demo["architectures"])
    return (
        f"{_words(number)} sequence architectures, trained from scratch on this machine in "
        f"{numbers.duration(demo.get('elapsed_s'))} ({numbers.plural(done, 'run')}). All of them are online learners: "
        "at each token they update a memory, and read it. They differ in what the memory is, and in how it learns "
        "and forgets."
    )


def _caveat(demo: dict[str, Any], runs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    seeds = {run.get("seed", demo.get("seed")) for _, run in runs}
    params = [run["params"] for _, run in runs if run.get("params")]
    seconds = [run["seconds"] for _, run in runs if run.get("seconds")]
    size = f" of {numbers.short(min(params))} to {numbers.short(max(params))} parameters" if params else ""
    time = f", each trained for {numbers.duration(min(seconds))} to {numbers.duration(max(seconds))}" if seconds else ""
    count = "One seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    return (
        f"{count}, nothing swept: the learning rate was chosen once and is not tuned per architecture. These are tiny "
        f"models{size}{time}. Large gaps between them are mechanisms at work; small ones are noise. "
        "It is a demonstration, not a benchmark."
    )


def _facts(demo: dict[str, Any]) -> list[tuple[str, str]]:
    environment = demo.get("environment", {})
    facts = [
        ("Seed", str(demo.get("seed", numbers.MISSING))),
        ("Time", f"{numbers.duration(demo.get('elapsed_s'))} of {demo.get('minutes', 0):g} min planned"),
        ("Started", str(demo.get("started", numbers.MISSING))[:16].replace("T", " ")),
    ]
    if environment.get("torch"):
        facts.append(("PyTorch", str(environment["torch"])))
    if environment.get("processes"):
        threads = numbers.plural(environment.get("threads", 1), "thread")
        facts.append(("Processes", f"{environment['processes']}, with {threads} each"))
    return facts


def _equations(value: str | Sequence[str] | None) -> str:
    lines = [value] if isinstance(value, str) else value or []
    return "".join(mathml(line) for line in lines)


def _words(number: int) -> str:
    words = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")
    return words[number] if number < len(words) else str(number)


def _without_files(demo: dict[str, Any]) -> dict[str, Any]:
    return demo | {
        "tasks": [
            t | {"runs": [{k: v for k, v in r.items() if k != "files"} for r in t["runs"]]} for t in demo["tasks"]
        ]
    }
