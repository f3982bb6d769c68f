"""The two grids of a gauntlet's page, tasks down and designs across: the heat map of scores, and the costs."""

from __future__ import annotations

from typing import Any

from postformer.report import numbers
from postformer.report.gauntlet.data import Stat, Study, Trial
from postformer.report.gauntlet.findings import leaders, score
from postformer.report.gauntlet.heat import step


def heat_grid(study: Study) -> list[dict[str, Any]]:
    """One entry per task with one row per regime; each cell says what it shows, and how it is coloured.

    An accuracy is coloured by how far it is from chance (0) to perfect (1); the text is the score itself.
    """
    return [
        {
            "title": trial.title,
            "key": trial.key,
            "learned": trial.entry.get("learned", True),
            "note": _scale(study, trial),
            "rows": [
                {"name": "in" if inside else "out", "cells": _row(study, trial, inside)}
                for inside in (True, False)
                if trial.regime(inside)
            ],
        }
        for trial in study.trials
    ]


def cost_grid(study: Study) -> list[dict[str, Any]]:
    """One entry per task with parameters, FLOPs per token and most bytes of state; the matched one is marked."""
    match = study.raw.get("match") or {}
    out = []
    for trial in study.trials:
        rows = []
        for on, name, write in (("params", "params", numbers.short), ("flops", "FLOPs", numbers.short),
                                ("state", "state", numbers.size)):  # fmt: skip
            matched, cells = match.get("on") == on, []
            for design in study.names:
                value = study.quantity(on, design, trial)
                off = study.mismatch(design, trial) if matched else None
                far = off is not None and abs(off) > (match.get("tolerance") or 0.0)
                words = "" if off is None else f"{off:+.1%} from the reference"
                cells.append({
                    "text": write(value), "far": ("▲" if off > 0 else "▼") if far and off else "",
                    "reference": matched and design == match.get("reference"),
                    "title": f"{study.names[design]}, {trial.title}: {_exact(value)}" + (f", {words}" if words else ""),
                })  # fmt: skip
            rows.append({"name": name, "matched": matched, "cells": cells})
        out.append({"title": trial.title, "key": trial.key, "rows": rows})
    return out


def _row(study: Study, trial: Trial, inside: bool) -> list[dict[str, Any]]:
    stats = {d: study.regime(d, trial, inside) for d in study.names}
    ahead = leaders(study, trial, inside) if sum(s is not None for s in stats.values()) > 1 else []
    low, high = _own(study, trial)
    cells = []
    for design, stat in stats.items():
        where = f"{study.names[design]}, {trial.title}, {'inside' if inside else 'outside'}"
        if stat is None:
            status = study.status(design, trial)
            kind = "failed" if status == "failed" else "missing"
            cells.append({"kind": kind, "text": "✕" if kind == "failed" else "", "title": f"{where}: {kind}"})
            continue
        scaled = study.regime(design, trial, inside, rescale=True)
        assert scaled is not None
        fraction = (high - stat.mean) / (high - low) if trial.lower else scaled.mean
        cells.append({
            "kind": "value",
            "colour": f"{'own' if trial.lower else 'heat'}-{step(fraction)}",
            "ink": f"{'own' if trial.lower else 'heat'}-ink-{step(fraction)}",
            "text": _short(stat.mean, trial),
            "spread": _spread(stat, trial),
            "few": f"{len(stat.values)}/{study.seeds}" if len(stat.values) < study.seeds else "",
            "best": design in ahead,
            "title": f"{where}: {_words(stat, trial)}" + ("" if trial.lower else f"; rescaled {scaled.mean:.2f}"),
        })  # fmt: skip
    return cells


def _words(stat: Stat, trial: Trial) -> str:
    text = score(trial, stat.mean)
    if stat.deviation is not None:
        text += f" ± {stat.deviation:.3f}, {score(trial, stat.low)} to {score(trial, stat.high)}"
    return f"{text}, {numbers.plural(len(stat.values), 'seed')}"


def _short(value: float, trial: Trial) -> str:
    if trial.lower or not 0 <= value <= 1:
        return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
    # Only what is perfect reads 1, and only what is nothing reads 0.
    return f"{value:g}" if value in (0, 1) else f"{min(max(value, 0.01), 0.99):.2f}"[1:]


def _spread(stat: Stat, trial: Trial) -> str:
    if stat.deviation is None:
        return ""
    text = f"{stat.deviation:.2f}"
    return "±" + (text[1:] if text.startswith("0") else text)


def _own(study: Study, trial: Trial) -> tuple[float, float]:
    """From the best to the worst of a task that is not rescaled: the scale of its colours."""
    found = [s.mean for d in study.names for r in (True, False) if (s := study.regime(d, trial, r))]
    low, high = min(found, default=0.0), max(found, default=1.0)
    return low, high if high > low else low + 1


def _scale(study: Study, trial: Trial) -> str:
    if trial.lower:
        found = [s.mean for d in study.names for r in (True, False) if (s := study.regime(d, trial, r))]
        span = f", own scale {min(found):.3g} to {max(found):.3g}" if found else ""
        return f"{trial.metric.replace('_', ' ')}, less is better{span}"
    levels = [c for s in trial.settings if (c := s.get("chance")) is not None]
    if not levels:
        return ""
    a, b = f"{min(levels):.2f}".lstrip("0"), f"{max(levels):.2f}".lstrip("0")
    return f"chance {a}" if a == b else f"chance {a} to {b}"


def _exact(value: float | None) -> str:
    return numbers.MISSING if value is None else f"{value:,.0f}"
