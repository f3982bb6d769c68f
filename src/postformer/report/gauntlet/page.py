"""The content of a gauntlet's page, all of it taken from gauntlet.json, however far the study has come."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from postformer.report import numbers
from postformer.report.gauntlet import findings, heat
from postformer.report.gauntlet.data import Study
from postformer.report.gauntlet.grids import cost_grid, heat_grid
from postformer.report.gauntlet.sections import cost_section, full_tables, state_figures, task_section
from postformer.report.style import Look, swatch

_QUANTITY = {"params": "parameters", "flops": "FLOPs per token", "state": "bytes of state"}


def gauntlet_page(directory: Path) -> dict[str, Any]:
    """Everything that the template needs about the gauntlet in `directory`. Raises ValueError, see `Study`."""
    study = Study(directory)
    looks = {d: Look(i) for i, d in enumerate(study.names)}
    swatches = {d: swatch(look) for d, look in looks.items()}
    raw = study.raw
    failures = study.failures()
    recall = [t for t in study.trials if t.recall]
    return {
        "template": "gauntlet.html.j2",
        "kind": "gauntlet",
        "title": str(raw.get("title") or "Gauntlet"),
        "eyebrow": "postformer gauntlet" + (f", tier {raw['tier']}" if raw.get("tier") else ""),
        "lead": findings.lead(study),
        "more": findings.more(study),
        "compared": _compared(study),
        "protocol": _protocol(study),
        "progress": _progress(study),
        "facts": _facts(study),
        "command": raw.get("command") or "",
        "again": f"postformer report {Path(directory).resolve().name}",
        "environment": {k: v for k, v in (raw.get("environment") or {}).items() if not isinstance(v, (dict, list))},
        "designs": [
            {"name": study.names[d["key"]], "swatch": swatches[d["key"]], "summary": d.get("summary") or "",
             "paper": d.get("paper"), "id": str(d.get("id") or "")[:12]}
            for d in study.designs
        ],
        "heat": heat_grid(study),
        "heat_light": heat.variables(dark=False),
        "heat_dark": heat.variables(dark=True),
        "tasks": [task_section(study, t, looks) for t in study.trials],
        "states": [s for t in recall if (s := state_figures(study, t, looks))["figures"]],
        "costs": cost_section(study, looks, swatches),
        "grid": cost_grid(study),
        "tables": full_tables(study, swatches),
        "failures": failures,
        "published": [_published(study, p) for p in raw.get("published") or []],
        "claims": raw.get("claims") or [],
        "remarks": raw.get("remarks") or [],
        "many": len(study.names) > 5,
        "lower": any(t.lower for t in study.trials),
        "numbers": raw,
        "beside": {"gauntlet.csv": study.long(), "gauntlet.json": json.dumps(raw, ensure_ascii=False, indent=1)},
    }  # fmt: skip


def _compared(study: Study) -> str:
    cells = [c for c in study.cells.values() if c.get("seeds")]
    params = [c["params"] for c in cells if c.get("params")]
    size = ""
    if params:
        low, high = numbers.short(min(params)), numbers.short(max(params))
        size = f", models of {low}" + (f" to {high}" if high != low else "") + " parameters"
    return f"{numbers.plural(len(study.names), 'design')} on {numbers.plural(len(study.trials), 'task')}{size}."


def _protocol(study: Study) -> list[str]:
    """How the figures came about, one sentence per question that a reader must ask."""
    seeds = "One seed" if study.seeds == 1 else f"{study.seeds} seeds"
    out = [f"{seeds} per design and task; a spread is ± the standard deviation over seeds"
           + (", which one seed does not have." if study.seeds == 1 else ", n − 1 in the denominator.")]  # fmt: skip
    rates = [len(t.entry.get("rates") or []) for t in study.trials]
    if rates and max(rates) > 1:
        several = f"{min(rates)} to {max(rates)}" if min(rates) != max(rates) else str(max(rates))
        out.append(f"The learning rate of each design on each task is the best of {several} on the validation split.")
        chosen = [c for c in study.cells.values() if c.get("rate") is not None and len(c.get("sweep") or []) > 1]
        if at_end := sum(c["rate"] in (min(ends := [s["rate"] for s in c["sweep"]]), max(ends))
                         for c in chosen):
            out.append(f"In {at_end} of {numbers.plural(len(chosen), 'pair')} of design and task it is the least or "
                       "the greatest that was tried, and a wider sweep might find a better one.")
    else:
        out.append("Learning rates are not swept, so a design may suffer from one that does not suit it.")
    out.append("The test split is read once, after all choices; scores inside and outside the training distribution "
               "are never averaged together.")  # fmt: skip
    match = study.raw.get("match")
    if not match:
        out.append("Designs are matched on nothing but the width, depth and tokens of each task; compare the costs.")
        return out
    tolerance, what = match.get("tolerance") or 0.0, _QUANTITY[match["on"]]
    off = [study.mismatch(d, t) for d in study.names for t in study.trials]
    far = sum(m is not None and abs(m) > tolerance for m in off)
    reference = study.names.get(match.get("reference", ""), match.get("reference"))
    further = f"; {numbers.plural(far, 'pair')} of design and task {'is' if far == 1 else 'are'} further off, marked " \
              "in the table of costs."  # fmt: skip
    return [*out, f"Matched on {what} with {reference}, within {tolerance:.0%}" + (further if far else ".")]


def _progress(study: Study) -> dict[str, Any] | None:
    """What is missing, in words; None where every cell is complete."""
    found = study.statuses()
    total = sum(found.values())
    if found["done"] == total and study.raw.get("ended"):
        return None
    words = {"partial": "with fewer seeds than planned", "failed": "failed", "missing": "not there"}
    gone = [f"{found[k]} {w}" for k, w in words.items() if found[k]]
    running = not study.raw.get("ended")
    return {
        "running": running,
        "head": "This study is still in progress" if running else "This study is not complete",
        "text": f"{found['done']} of {total} cells have all their seeds"
        + (f", {numbers.listing(gone)}. The figures show what there is." if gone else "."),
    }


def _facts(study: Study) -> list[tuple[str, str]]:
    raw = study.raw
    seeds = [s for c in study.cells.values() for s in c.get("seeds") or []]
    facts = [
        ("Designs", str(len(study.names))),
        ("Tasks", str(len(study.trials))),
        ("Seeds", str(study.seeds)),
        ("Final runs", numbers.count(len(seeds))),
    ]
    if tokens := sum(s.get("tokens") or 0 for s in seeds):
        facts.append(("Tokens trained on", numbers.short(tokens)))
    if seconds := sum(s.get("seconds") or 0 for s in seeds):
        facts.append(("Time of final runs", _hours(seconds)))
    facts.append(("Started", str(raw.get("started") or numbers.MISSING)[:16].replace("T", " ")))
    if raw.get("ended"):
        try:
            wall = datetime.fromisoformat(raw["ended"]) - datetime.fromisoformat(raw["started"])
            facts.append(("Took", _hours(wall.total_seconds())))
        except (TypeError, ValueError):
            facts.append(("Ended", str(raw["ended"])[:16].replace("T", " ")))
    return facts


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else numbers.duration(seconds)


def _published(study: Study, entry: dict[str, Any]) -> dict[str, Any]:
    titles = {t.key: t.title for t in study.trials}
    return entry | {
        "task": titles.get(entry.get("task", ""), entry.get("task")),
        "design": study.names.get(entry.get("design", ""), entry.get("design")),
    }
