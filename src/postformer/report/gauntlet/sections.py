"""The sections of a gauntlet's page: each task's figure, accuracy against bytes of state, costs, and all figures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from postformer.report import findings as cost_findings
from postformer.report import numbers
from postformer.report.figures import Series, growth, svg
from postformer.report.gauntlet import findings
from postformer.report.gauntlet.data import Stat, Study, Trial, as_csv, number
from postformer.report.gauntlet.figures import Line, Point, Reference, by_design, by_setting, front, pareto
from postformer.report.style import Look
from postformer.report.tables import Column, Table, csv_link

_ROW = ("mean", "deviation", "low", "high", "seeds")
_CHANCE, _SHORTCUT = (1.2, 2.0), (5.0, 2.0)


def task_section(study: Study, trial: Trial, looks: dict[str, Look]) -> dict[str, Any]:
    """Title, setup and the figure of one task: the headline against its setting."""
    entry, seen = trial.entry, findings.task(study, trial)
    return {
        "id": trial.key,
        "title": trial.title,
        "about": entry.get("about") or "",
        "paper": entry.get("paper"),
        "setup": _setup(study, trial),
        "note": entry.get("note") or "",
        "learned": entry.get("learned", True),
        "figure": _headline(study, trial, looks, seen),
    }


def _headline(study: Study, trial: Trial, looks: dict[str, Look], seen: str) -> dict[str, Any] | None:
    settings = trial.settings
    places, names, xlabel = axis(trial)
    lines = []
    for design in study.names:
        points = [Point(x, s.mean, s.low, s.high) for x, at in zip(places, settings)
                  if (s := study.stat(design, trial, at))]  # fmt: skip
        if points:
            lines.append(Line(study.names[design], looks[design], points))
    if not lines:
        return None
    accuracy = not trial.lower and max(p.high for line in lines for p in line.points) <= 1
    label = trial.metric.replace("_", " ").capitalize()
    references = _references(trial, accuracy)
    if len(settings) == 1:
        lines.sort(key=lambda line: line.points[0].mean, reverse=not trial.lower)
        drawing = by_design(lines, label, lambda v: findings.score(trial, v), references, accuracy)
        covered = "inside" if settings[0].get("inside") else "outside"
        caption = f"{label} at the only setting, {settings[0]['name']} ({covered} the training distribution)"
    else:
        inside = len(trial.regime(True))
        drawing = by_setting(lines, places, names, inside, xlabel, label, references, accuracy)
        caption = f"{label} against {xlabel.lower()}. Settings: " + _settings(trial)
    caption += "; less is better." if trial.lower else "."
    return {
        "svg": svg(drawing, f"task-{_safe(trial.key)}", f"{trial.title}: {label} by setting and design", seen),
        "caption": caption,
        "seen": seen,
        "link": csv_link(_stats_csv(study, trial)),
        "file": f"{_safe(trial.key)}.csv",
    }


def state_figures(study: Study, trial: Trial, looks: dict[str, Look]) -> dict[str, Any]:
    """Accuracy against bytes of state at the hardest setting inside, and at the hardest outside."""
    figures = []
    for inside, where in ((True, "inside"), (False, "outside")):
        settings = trial.regime(inside)
        if not settings:
            continue
        at, found, rows = settings[-1], {}, []
        for design in study.names:
            stat, size = study.stat(design, trial, at), study.state(design, trial, at)
            if stat and size:  # a design without state has no place on a logarithmic axis
                found[design] = Line(study.names[design], looks[design], [Point(size, stat.mean, stat.low, stat.high)])
                rows.append((design, at["name"], size, *_row(stat)))
        if not found:
            continue
        keys, lines = list(found), list(found.values())
        best = [keys[i] for i in front([(line.points[0].x, line.points[0].mean) for line in lines])]
        seen = findings.state(study, trial, best, f"{at['name']} ({where})")
        figures.append({
            "svg": svg(pareto(lines), f"state-{_safe(trial.key)}-{where}",
                       f"{trial.title}: accuracy against bytes of state at {at['name']}", seen),
            "title": f"{trial.title}, {where}: {at['name']}",
            "caption": f"The hardest setting {where} the training distribution.",
            "seen": seen,
            "link": csv_link(as_csv(("design", "setting", "state_bytes", *_ROW), rows)),
            "file": f"{_safe(trial.key)}-state-{where}.csv",
        })  # fmt: skip
    return {"title": trial.title, "figures": figures}


def cost_section(study: Study, looks: dict[str, Look], swatches: dict[str, str]) -> dict[str, Any]:
    """Tokens per second of training, and latency and bytes of decoding against the context."""
    costs = {c["design"]: c for c in study.raw.get("costs") or [] if c.get("design") in study.names}
    names, figures = study.names, []
    speed = [(d, v) for d, c in costs.items() if (v := number(c.get("train_tokens_per_s")))]
    speed.sort(key=lambda p: -p[1])
    if speed:
        lines = [Line(names[d], looks[d], [Point(0, v, v, v)]) for d, v in speed]
        seen = f"{names[speed[0][0]]} trains fastest, {numbers.short(speed[0][1])} tokens per second"
        seen += f"; {names[speed[-1][0]]} slowest, {numbers.short(speed[-1][1])}." if len(speed) > 1 else "."
        figures.append({
            "svg": svg(by_design(lines, "Tokens per second", numbers.short), "cost-train",
                       "Tokens per second of training by design", seen),
            "title": "Training",
            "caption": "Tokens per second of training, the fastest first.",
            "seen": seen,
            "file": "training-speed.csv",
            "link": csv_link(as_csv(("design", "train_tokens_per_s"), speed)),
        })  # fmt: skip
    points = {d: sorted(c.get("decode") or [], key=lambda p: p["context"]) for d, c in costs.items()}
    for field, unit, label, what, tolerance in (
        ("state_bytes", "bytes", "Bytes of state", "memory", 1.001),
        ("seconds_per_token", "seconds", "Time per token", "time per token", 1.5),
    ):
        curves = {d: [(p["context"], v) for p in ps if (v := number(p.get(field)))] for d, ps in points.items()}
        curves = {d: c for d, c in curves.items() if c}
        if not curves:
            continue
        seen = cost_findings.growth({names[d]: c for d, c in curves.items()}, what, tolerance)
        series = [Series(names[d], looks[d], [c for c, _ in p], [v for _, v in p]) for d, p in curves.items()]
        rows = [(d, c, v) for d, p in curves.items() for c, v in p]
        figures.append({
            "svg": svg(growth(series, unit, label), f"cost-{unit}", f"Decoding: {label.lower()} against context", seen),
            "title": f"Decoding: {label.lower()}",
            "caption": f"Against tokens of context, both axes logarithmic{' (K = 1,024)' if unit == 'bytes' else ''}.",
            "seen": seen, "file": f"decode-{unit}.csv", "link": csv_link(as_csv(("design", "context", field), rows)),
        })  # fmt: skip
    missing = [names[d] for d in names if d not in costs]
    return {"figures": figures, "missing": numbers.listing(missing) if missing and costs else ""}


def full_tables(study: Study, swatches: dict[str, str]) -> list[dict[str, Any]]:
    """One group per task: the headline with rate, sweep and tokens, then every other figure of the test split."""
    named = {study.names[d]: s for d, s in swatches.items()}
    out = []
    for trial in study.trials:
        metrics = {m for d in study.names for seed in study.cell(d, trial).get("seeds") or []
                   for at in (seed.get("test") or {}).values() for m in at}  # fmt: skip
        others = sorted(metrics - {trial.metric})
        out.append({
            "title": trial.title,
            "key": trial.key,
            "table": _table(study, trial, trial.metric, named),
            "others": [_table(study, trial, m, named) for m in others],
            "link": csv_link(_stats_csv(study, trial, [trial.metric, *others])),
            "file": f"{_safe(trial.key)}-all.csv",
        })  # fmt: skip
    return out


def axis(trial: Trial) -> tuple[list[float], list[str], str]:
    """Where the settings of a task stand on an axis, their names there, and the axis' label.

    By what the unit counts (a setting's last number), where that tells all settings apart and rises; else evenly.
    """
    last = [float(s["setting"][-1] if isinstance(s["setting"], list) else s["setting"]) for s in trial.settings]
    if all(a < b for a, b in pairwise(last)) and last and last[0] > 0:
        unit = str(trial.entry.get("unit") or "length")
        label = "Sequence length" if unit == "length" else f"Number of {unit}"
        return last, [f"{v:g}" for v in last], label
    return [float(i) for i in range(len(last))], [s["name"] for s in trial.settings], "Setting"


def _references(trial: Trial, accuracy: bool) -> list[Reference]:
    out = []
    chance = [number(s.get("chance")) for s in trial.settings]
    shortcut = [number(s.get("shortcut")) for s in trial.settings]
    if accuracy:
        out.append(Reference("chance", _CHANCE, chance))
    # A uniform guess lies far off the scale of bits; only the shortcut says something there.
    if shortcut != chance or not accuracy:
        out.append(Reference("shortcut", _SHORTCUT, shortcut))
    return [r for r in out if any(v is not None for v in r.values)]


def _settings(trial: Trial) -> str:
    inside, outside = (", ".join(s["name"] for s in trial.regime(r)) for r in (True, False))
    return "; ".join(p for p in (inside and f"{inside} inside", outside and f"{outside} outside") if p)


def _table(study: Study, trial: Trial, metric: str, swatches: dict[str, str]) -> Table:
    headline = metric == trial.metric
    plain = not headline
    columns = [Column("design", "Design", numeric=False)]
    columns += [Column(s["name"], f"{s['name']} {'in' if s.get('inside') else 'out'}", _spread) for s in trial.settings]
    if headline:
        columns += [
            Column("rate", "Rate", lambda v: f"{v:g}"),
            Column("sweep", "Sweep, on validation", numeric=False),
            Column("tokens", "Tokens", numeric=False),
            Column("stopped", "Stopped", numeric=False),
            Column("seconds", "Time", numbers.duration),
        ]
    rows = []
    for design in study.names:
        cell = study.cell(design, trial)
        row: dict[str, Any] = {"design": study.names[design]}
        row |= {s["name"]: study.stat(design, trial, s, metric) for s in trial.settings}
        if plain and not any(row[s["name"]] for s in trial.settings):
            continue
        rows.append(row | _training(cell) if headline else row)
    return Table(f"{trial.title}: {metric.replace('_', ' ')}", columns, rows, swatches)


def _training(cell: dict[str, Any]) -> dict[str, Any]:
    seeds = cell.get("seeds") or []
    sweep, tried = [], cell.get("sweep") or []
    most = max((t.get("tokens") or 0 for t in tried), default=0)
    last = [t for t in tried if (t.get("tokens") or 0) == most]
    for trial in tried:
        value = number(trial.get("validation"))
        found = str(trial.get("status") or "failed") if value is None else f"{value:.3f}"
        whole = " with all tokens" if trial in last and len(last) < len(tried) else ""
        chosen = " ◂" if trial in last and trial["rate"] == cell.get("rate") else ""
        sweep.append(f"{trial['rate']:g}: {found}{whole}{chosen}")
    tokens = [t for s in seeds if (t := number(s.get("tokens"))) is not None]
    seconds = [t for s in seeds if (t := number(s.get("seconds"))) is not None]
    ends = [str(s.get("stopped") or "unknown") for s in seeds]
    spent = list(dict.fromkeys(numbers.short(v) for v in sorted(tokens)))
    return {
        "rate": number(cell.get("rate")),
        "sweep": "\n".join(sweep) or None,
        "tokens": "\nto ".join([spent[0], spent[-1]] if len(spent) > 1 else spent) or None,
        "stopped": "\n".join(f"{e} {ends.count(e)}×" for e in dict.fromkeys(ends)) or None,
        "seconds": sum(seconds) / len(seconds) if seconds else None,
    }


def _spread(stat: Stat) -> str:
    write = numbers.bits if stat.high > 1 else numbers.accuracy
    if stat.deviation is None:
        return f"{write(stat.mean)}\n1 seed"
    return f"{write(stat.mean)} ± {stat.deviation:.3f}\n{write(stat.low)}..{write(stat.high)}"


def _row(stat: Stat) -> tuple[Any, ...]:
    return stat.mean, stat.deviation, stat.low, stat.high, len(stat.values)


def _stats_csv(study: Study, trial: Trial, metrics: Sequence[str] = ()) -> str:
    rows = [
        (design, s["name"], int(bool(s.get("inside"))), metric, *_row(stat), study.cell(design, trial).get("rate"))
        for metric in metrics or [trial.metric]
        for design in study.names
        for s in trial.settings
        if (stat := study.stat(design, trial, s, metric))
    ]
    return as_csv(("design", "setting", "inside", "metric", *_ROW, "rate"), rows)


def _safe(key: str) -> str:
    return "".join(c if c.isalnum() and c.isascii() else "-" for c in key)


def _setup(study: Study, trial: Trial) -> list[tuple[str, str]]:
    """Size, budget and sweep of a task, as names and values."""
    entry = trial.entry
    layers = {study.names[d["key"]]: (d.get("layers") or {}).get(trial.key) for d in study.designs}
    more = [f"{n}: {k}" for n, k in layers.items() if k is not None and k != entry.get("layers")]
    return [
        ("trained on", ", ".join(_setting(s) for s in entry.get("train") or [])),
        ("tokens", numbers.short(entry.get("tokens"))),
        ("batch", str(entry.get("batch_size", numbers.MISSING))),
        ("rates", ", ".join(f"{r:g}" for r in entry.get("rates") or [])),
        ("width", str(entry.get("width", numbers.MISSING))),
        ("layers", str(entry.get("layers", numbers.MISSING)) + (f" ({', '.join(more)})" if more else "")),
        ("local mixing", "as in each design" if entry.get("local", True) else "removed"),
    ]


def _setting(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)
