"""The sections of a demo's page: each task's figures, sentences and tables, and those of decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from postformer.report import findings, numbers
from postformer.report.figures import Series, accuracy_curve, growth, loss_curves, state_scatter, svg
from postformer.report.style import Look
from postformer.report.tables import Column, Table


def accuracy_section(task: dict[str, Any], looks: dict[str, Look], swatches: dict[str, str]) -> dict[str, Any]:
    key, unit = task["key"], task["unit"]
    done = [r for r in task["runs"] if r["status"] == "done"]
    points = {r["architecture"]: sorted((p["at"], p["accuracy"]) for p in r["points"]) for r in done}
    seen = findings.tracking(points, task["trained"], unit)
    expected = findings.expectation(task.get("expected"), points, unit)
    figures = []
    if done:
        series = [Series(n, looks[n], *zip(*p)) for n, p in points.items()]
        axis = "Sequence length" if task["difficulty"] == "length" else f"Number of {unit}"
        figures.append(
            {
                "svg": svg(
                    accuracy_curve(series, axis, task["trained"], task.get("chance")),
                    f"{key}-accuracy",
                    f"{task['title']}: accuracy against {task['difficulty']}",
                    seen,
                ),
                "caption": f"Accuracy against {task['difficulty']}. Shaded: what training covered, up to "
                f"{task['trained']:g} {unit}."
                + (f" Dotted: guessing, {numbers.accuracy(task['chance'])}." if task.get("chance") else ""),
                "seen": seen,
                "expected": expected,
            }
        )
        if key == "mqar":
            figures.append(_state_figure(task, done, looks))
    ats = sorted({at for p in points.values() for at, _ in p})
    rows = [{"architecture": n} | {f"at {at:g}": a for at, a in p} for n, p in points.items()]
    columns = [Column("architecture", "Architecture", numeric=False)]
    columns += [
        Column(f"at {at:g}", f"{at:g}" + ("" if at <= task["trained"] else " *"), numbers.accuracy) for at in ats
    ]
    table = Table(f"Accuracy by number of {unit}; * lies beyond training", columns, rows, swatches) if rows else None
    return {
        "id": key,
        "title": task["title"],
        "about": task.get("about", ""),
        "paper": task.get("paper"),
        "setup": _setup(task.get("setup", {})),
        "left_out": task.get("left_out", {}),
        "notes": [f"{r['architecture']} {r['note']}" for r in done if r.get("note")],
        "figures": figures,
        "tables": [table] if table else [],
        "empty": "" if done else seen,
    }


def _state_figure(task: dict[str, Any], done: Sequence[dict[str, Any]], looks: dict[str, Look]) -> dict[str, Any]:
    ats = sorted({p["at"] for r in done for p in r["points"]})
    inside = max((at for at in ats if at <= task["trained"]), default=ats[0])
    first, second = f"{inside:g} {task['unit']}", f"{ats[-1]:g} {task['unit']}"
    scatter = []
    for run in done:
        at = {p["at"]: (p["state_bytes"], p["accuracy"]) for p in run["points"]}
        if inside in at and ats[-1] in at:
            scatter.append((run["architecture"], looks[run["architecture"]], at[inside], at[ats[-1]]))
    seen = findings.state([(n, a, b) for n, _, a, b in scatter], first, second)
    drawing = ""
    if scatter:
        drawing = svg(
            state_scatter(scatter, first, second),
            f"{task['key']}-state",
            f"{task['title']}: accuracy against bytes of state",
            seen,
        )
    return {
        "svg": drawing,
        "seen": seen,
        "expected": "",
        "caption": "The same accuracies against the bytes of state that one sequence keeps (K = 1,024). "
        f"Open: {first}; filled: {second}.",
    }


def text_section(task: dict[str, Any], looks: dict[str, Look], swatches: dict[str, str]) -> dict[str, Any]:
    done = [r for r in task["runs"] if r["status"] == "done"]
    bits = {r["architecture"]: r["validation_bits_per_byte"] for r in done}
    tokens = {r["architecture"]: r["tokens"] for r in done if r.get("tokens")}
    seen = findings.text(bits, tokens)
    figures = []
    if done:
        series = []
        for run in done:
            x, y = run["files"].curve("bits_per_byte")
            marks = tuple(zip(*run["files"].curve("validation_bits_per_byte")))
            if x:
                series.append(Series(run["architecture"], looks[run["architecture"]], x, y, marks))
        figures.append(
            {
                "svg": svg(
                    loss_curves(series), "text-loss", f"{task['title']}: bits per byte against training tokens", seen
                ),
                "caption": "Bits per byte against training tokens. Lines: training loss, averaged over short "
                "stretches; open markers: held-out text.",
                "seen": seen,
                "expected": "",
            }
        )
    rows = [
        {"architecture": n, "bits": b, "tokens": tokens.get(n)} for n, b in sorted(bits.items(), key=lambda p: p[1])
    ]
    table = (
        Table(
            "Held-out bits per byte at the end of training",
            [
                Column("architecture", "Architecture", numeric=False),
                Column("bits", "Bits per byte", numbers.bits),
                Column("tokens", "Tokens seen", numbers.short),
            ],
            rows,
            swatches,
        )
        if rows
        else None
    )
    return {
        "id": task["key"],
        "title": task["title"],
        "about": task.get("about", ""),
        "paper": task.get("paper"),
        "setup": _setup(task.get("setup", {})),
        "left_out": task.get("left_out", {}),
        "notes": [f"{r['architecture']} {r['note']}" for r in done if r.get("note")],
        "figures": figures,
        "tables": [table] if table else [],
        "empty": "" if done else seen,
    }


def decode_section(decode: dict[str, Any], looks: dict[str, Look], swatches: dict[str, str]) -> dict[str, Any]:
    runs = [r for r in decode["runs"] if r.get("status", "done") == "done" and r.get("points")]
    points = {r["architecture"]: sorted(r["points"], key=lambda p: p["context"]) for r in runs}
    memory = {n: [(p["context"], p["declared_bytes"]) for p in ps] for n, ps in points.items()}
    time = {
        n: [(p["context"], p["seconds_per_token"]) for p in ps if p.get("seconds_per_token")]
        for n, ps in points.items()
    }
    measured = {
        n: tuple((p["context"], p["measured_bytes"]) for p in ps if p.get("measured_bytes")) for n, ps in points.items()
    }
    seen = {
        "memory": " ".join([findings.growth(memory, "memory", 1.001), findings.declared(points)]).strip(),
        "time": findings.growth(time, "time per token", 1.5),
    }
    figures = []
    if runs:
        series = [Series(n, looks[n], [c for c, _ in p], [b for _, b in p], measured[n]) for n, p in memory.items()]
        figures.append(
            {
                "svg": svg(
                    growth(series, "bytes", "Bytes of state"),
                    "decode-memory",
                    "Decoding: bytes of state against context",
                    seen["memory"],
                ),
                "caption": "Memory that one sequence keeps while decoding (K = 1,024). Lines: declared by the design; "
                "open markers: measured on the running model. Both axes are logarithmic.",
                "seen": seen["memory"],
                "expected": "",
            }
        )
        series = [Series(n, looks[n], *zip(*p)) for n, p in time.items() if p]
        if series:
            figures.append(
                {
                    "svg": svg(
                        growth(series, "seconds", "Time per token"),
                        "decode-time",
                        "Decoding: time per token against context",
                        seen["time"],
                    ),
                    "caption": "Time for one more token, one sequence, one thread. Both axes are logarithmic.",
                    "seen": seen["time"],
                    "expected": "",
                }
            )
    contexts = sorted({p["context"] for ps in points.values() for p in ps})
    shown = sorted({contexts[0], contexts[len(contexts) // 2], contexts[-1]}) if contexts else []
    rows = []
    for name, ps in points.items():
        row: dict[str, Any] = {"architecture": name}
        for p in ps:
            row[f"bytes at {p['context']}"] = p["declared_bytes"]
            row[f"seconds at {p['context']}"] = p.get("seconds_per_token")
        rows.append(row)
    columns = [Column("architecture", "Architecture", numeric=False)]
    columns += [Column(f"bytes at {c}", f"State at {c:,}", numbers.size) for c in shown]
    columns += [Column(f"seconds at {c}", f"Time at {c:,}", numbers.duration) for c in shown]
    return {
        "id": "decode",
        "title": "Decoding: what one more token costs",
        "paper": None,
        "about": decode.get(
            "about",
            "The state that must be kept, and the time that one more token takes, after a context of so many tokens.",
        ),
        "setup": _setup(decode.get("setup", {})),
        "left_out": decode.get("left_out", {}),
        "notes": [],
        "figures": figures,
        "tables": [Table("Bytes of state and time per token by tokens of context", columns, rows, swatches)]
        if rows
        else [],
        "empty": "" if runs else "Nothing was measured.",
    }


def _setup(setup: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (
            key,
            (numbers.short(value) if value >= 10_000 else f"{value:g}")
            if isinstance(value, (int, float))
            else str(value),
        )
        for key, value in setup.items()
    ]
