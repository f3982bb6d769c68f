"""Ratios of a bench, and whether any has fallen against the last that were kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from postformer.training.files import write_json

FALL = 0.15
"""A ratio may lose this part of what it was."""


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """Every comparison of a bench as a number that is better the larger it is, by name.

    Peers and PyTorch forms: how many times as long as ours they take. floor: the share of the machine's own rate.
    """
    most = max(found["threads"])

    def word(number: int) -> str:
        return "all" if number == most else str(number)

    out = {}
    for part, name in (("kernels", "case"), ("training", "recipe"), ("decoding", "recipe")):
        for row in found.get(part) or []:
            where = f"{part}/{row[name]}"
            where += f"/threads {word(row['threads'])}" if part == "kernels" else ""
            where += f"/context {row['context']}" if part == "decoding" else ""
            out |= {f"{where}/{side}": value for side, value in (row.get("ratios") or {}).items()}
            if row.get("share") is not None:
                out[f"{where}/floor"] = row["share"]
    return out


def keep(found: dict[str, Any], path: Path) -> None:
    """Write a bench's ratios, with what they are of, as the last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"schema": found["schema"], "kind": "bench ratios", "taken": found["ended"],
                      "command": found["command"], "config": found["config"], "environment": found["environment"],
                      "ratios": {name: float(f"{value:.4g}") for name, value in ratios(found).items()}})


def last(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What `keep` wrote. Raises ValueError where there is nothing, or where it was measured at other sizes."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist, so there is nothing to check against; `postformer bench --keep` "
                         "writes it, on a machine without other work") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}; take it from version control, or write it with --keep") from None
    if kept.get("kind") != "bench ratios":
        raise ValueError(f"{path} holds no ratios of a bench; --last names the file")
    differing = [f"{part}.{name}" if isinstance(value, dict) else part
                 for part, value in config.items()
                 for name in (value if isinstance(value, dict) else [part])
                 if (kept["config"].get(part, {}).get(name) if isinstance(value, dict) else kept["config"].get(part))
                 != (value[name] if isinstance(value, dict) else value)]
    if differing:
        raise ValueError(f"{path} was measured with other settings ({', '.join(differing)}), and ratios of other sizes "
                         f"say nothing; check with what made it: {kept['command']}")
    return kept


def compare(now: dict[str, float], kept: dict[str, float]) -> dict[str, Any]:
    """`fallen`: name -> (then, now) of ratios that lost more than 15 %; `gone`: kept names without a figure now, of
    the parts that were measured; `risen`: those that gained as much; `compared`: how many."""
    parts = {name.partition("/")[0] for name in now}
    both = {name: (kept[name], now[name]) for name in kept if name in now}
    return {"fallen": {name: pair for name, pair in both.items() if not pair[1] >= (1 - FALL) * pair[0]},
            "risen": {name: pair for name, pair in both.items() if pair[1] > pair[0] / (1 - FALL)},
            "gone": [name for name in kept if name not in now and name.partition("/")[0] in parts],
            "compared": len(both)}
