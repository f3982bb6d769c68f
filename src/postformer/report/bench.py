"""The content of a bench's page, all of it taken from bench.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from postformer.report import findings, numbers
from postformer.report.figures import Series, growth, svg
from postformer.report.style import Look, swatch
from postformer.report.tables import Column, Table

_OURS = "ours"
_NAMES = {_OURS: "Ours", "attention": "Softmax attention", "PyTorch": "PyTorch form"}


def bench_page(directory: Path) -> dict[str, Any]:
    """Everything that the template needs about the bench in `directory`. Raises ValueError for a broken file."""
    try:
        raw = json.loads((directory / "bench.json").read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{directory / 'bench.json'} is no JSON: {error}; run postformer bench again") from None
    parts: dict[str, Callable[[dict[str, Any]], dict[str, Any] | None]] = {
        "kernels": _kernels, "lengths": _lengths, "training": _training, "decoding": _decoding}
    rows = [row for part in parts for row in raw.get(part) or []]
    return {
        "kind": "bench", "title": raw.get("title") or "Bench", "eyebrow": "postformer bench",
        "lead": "Kernels, training steps and decoding beside other people's code, measured by turns in one process.",
        "caveat": "These are times of one machine, at one hour; only ratios travel. A time is the least of several "
        "rounds in which all sides take turns, so that other work on the machine hits all of them; the median stands "
        "beside it. Before a kernel is timed, its outputs and gradients are compared with the others'. The floor is "
        "the work over the machine's own rate of a 1024³ matrix product, or the bytes over that of a copy, whichever "
        "takes longer.",
        "facts": _facts(raw),
        "failed": [{"name": f["where"], "reason": f["why"]} for f in raw.get("failures") or []],
        "attempted": len(rows),
        "architectures": [], "glance": None,
        "sections": [s for part, make in parts.items() if raw.get(part) and (s := make(raw))],
        "costs": None, "command": raw.get("command") or "", "environment": raw.get("environment") or {},
        "numbers": raw,
    }  # fmt: skip


def _facts(raw: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [("Processor", str((raw.get("environment") or {}).get("processor", numbers.MISSING))),
             ("Threads", ", ".join(map(str, raw.get("threads") or [])))]
    for number, rates in (raw.get("rates") or {}).items():
        on = f"{number} thread{'s' * (number != '1')}"
        facts += [(f"Matrix product, {on}", numbers.short(rates["gemm_flops_per_s"]) + "FLOP/s"),
                  (f"Copy, {on}", numbers.short(rates["copy_bytes_per_s"]) + "B/s")]
    return [*facts, ("Measured", str(raw.get("ended") or raw.get("started") or numbers.MISSING)[:16].replace("T", " "))]


def _good(raw: dict[str, Any], part: str) -> list[dict[str, Any]]:
    return [row for row in raw.get(part) or [] if "failed" not in row]


def _sides(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Names of sides that have a figure somewhere, ours first."""
    return list(dict.fromkeys(n for row in rows for n, s in row["sides"].items() if "min" in s))


def _absent(rows: Iterable[dict[str, Any]], key: str) -> dict[str, str]:
    """Peers without a figure, with the reason; with the rows' names where another row has one."""
    found: dict[tuple[str, str], list[str]] = {}
    rows = list(rows)
    for row in rows:
        for name, side in row["sides"].items():
            if "absent" in side:
                found.setdefault((name, side["absent"]), []).append(str(row[key]))
    present = set(_sides(rows))
    return {name + (f" ({numbers.listing(list(dict.fromkeys(where)))})" if name in present else ""): why
            for (name, why), where in found.items()}


def _section(name: str, title: str, about: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "title": title, "about": about, "paper": None, "setup": [], "left_out": {}, "notes": [],
            "empty": "", "figures": [], "tables": [], **more}


def _times(value: float) -> str:
    return f"{value:.0f}×" if value >= 10 else f"{value:.2f}×"


def _share(value: float) -> str:
    return f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def _compared(rows: list[dict[str, Any]], caption: str, first: str, titles: Callable[[dict[str, Any]], str],
              field: str, write: Callable[[Any], str], extra: Iterable[Column] = ()) -> Table:
    """One row per measurement: every side's figure, the median of ours, how many times as long the others take."""
    sides = _sides(rows)
    others = [side for side in sides if side != _OURS]
    columns = [Column("name", first, numeric=False), *extra, Column(f"{_OURS}_{field}", "Ours", write),
               Column("median", "Ours, median time", numbers.duration), Column("share", "Share of the floor", _share)]
    columns += [Column(f"{side}_ratio", f"{_NAMES.get(side, side)}, time over ours", _times) for side in others]
    columns += [Column(f"{side}_{field}", _NAMES.get(side, side), write) for side in others]
    columns += [Column("floor", "Floor", numbers.duration), Column("backend", "What ran as ours", numeric=False)]
    out = []
    for row in rows:
        ours = row["sides"][_OURS]
        line = {**row, "name": titles(row), "median": ours["median"], "backend": _short(ours["backend"]),
                "floor": (row.get("floor") or {}).get("seconds"), "share": row.get("share")}
        for side in sides:
            line[f"{side}_{field}"] = row["sides"].get(side, {}).get(field)
            line[f"{side}_ratio"] = (row.get("ratios") or {}).get(side)
        out.append(line)
    return Table(caption, [c for c in columns if any(line.get(c.key) is not None for line in out)], out)


def _short(backend: str) -> str:
    return backend.partition(" (")[0]


def _kernels(raw: dict[str, Any]) -> dict[str, Any] | None:
    rows, sizes = _good(raw, "kernels"), raw["config"]["kernels"]
    tables = []
    for number in raw["threads"]:
        part = [r for r in rows if r["threads"] == number]
        if part:
            tables.append(_compared(part, f"Kernels, {numbers.plural(number, 'thread')}", "Kernel",
                                    lambda r: r["title"], "min", numbers.duration))
    return _section(
        "kernels", "Kernels", "Forward and backward pass of single operations; times of the fastest round.",
        setup=[("batch", str(sizes["batch"])), ("tokens", numbers.count(sizes["length"])),
               ("heads", str(sizes["heads"])), ("channels of a head", str(sizes["dim"])),
               ("numbers", raw["config"]["dtype"])],
        left_out=_absent(rows, "title"), tables=tables)  # fmt: skip


def _lengths(raw: dict[str, Any]) -> dict[str, Any] | None:
    rows, sizes = _good(raw, "lengths"), raw["config"]["lengths"]
    if not rows:
        return None
    looks = {r["recipe"]: Look(i) for i, r in enumerate(rows)}
    lines = [Series(n, looks[n], [p["tokens"] for p in points], [p["min"] for p in points])
             for n, points in ((r["recipe"], r["points"]) for r in rows)]
    bound = [r for r in rows if r.get("limit") is not None]
    over = [r for r in bound if r["exponent"] > r["limit"]]
    seen = ", ".join(f"{r['recipe']} {r['exponent']:.2f}" for r in rows)
    seen = f"Fitted exponents of time against length: {seen}. "
    if bound:
        limit = bound[0]["limit"]
        seen += (f"Above {limit}, which linear time keeps to: {numbers.listing([r['recipe'] for r in over])}." if over
                 else f"All designs whose memories are matrices and vectors keep to {limit}.")
    figure = {"svg": svg(growth(lines, "seconds", "Time", "Tokens"), "time-length", "Time of a pass against length",
                         seen), "caption": "Forward and backward pass of one sequence, both axes logarithmic "
              "(k = 1,024); the fastest round.", "seen": seen, "expected": ""}  # fmt: skip
    table = Table("Exponents of time and of memory kept for the backward pass", [
        Column("recipe", "Recipe", numeric=False), Column("exponent", "Time", lambda v: f"{v:.3f}"),
        Column("kept_exponent", "Memory", lambda v: f"{v:.3f}"), Column("limit", "Limit", lambda v: f"{v:g}"),
        Column("kept", "Most kept", numbers.size), Column("backend", "What ran", numeric=False),
    ], [{**r, "kept": r["points"][-1]["kept_bytes"], "backend": _short(r["backend"])} for r in rows],
        {n: swatch(look) for n, look in looks.items()})  # fmt: skip
    return _section("lengths", "Time against length",
                    "Whole models, forward and backward. Memory counts what a forward pass keeps, parameters aside.",
                    setup=[("width", str(sizes["width"])), ("layers", str(sizes["layers"]))],
                    figures=[figure], tables=[table])  # fmt: skip


def _training(raw: dict[str, Any]) -> dict[str, Any] | None:
    rows, sizes = _good(raw, "training"), raw["config"]["training"]
    for row in rows:
        row["params"] = row["sides"][_OURS]["params"]
    table = _compared(rows, "Tokens per second of whole training steps", "Recipe", lambda r: r["recipe"],
                      "tokens_per_s", numbers.count,
                      [Column("tokens", "Tokens a step", numbers.count), Column("params", "Parameters", numbers.short)])
    return _section(
        "training", "Training steps",
        "Forward, backward and AdamW, beside transformers' class of the same size. The floor counts the declared "
        "multiply-adds three times, for the backward pass.",
        setup=[("width", str(sizes["width"])), ("layers", str(sizes["layers"])), ("batch", str(sizes["batch"])),
               ("threads", str(max(raw["threads"])))],
        left_out=_absent(rows, "recipe"), tables=[table] if rows else [])  # fmt: skip


def _decoding(raw: dict[str, Any]) -> dict[str, Any] | None:
    rows, sizes = _good(raw, "decoding"), raw["config"]["decoding"]
    if not rows:
        return None
    names = list(dict.fromkeys(r["recipe"] for r in rows))
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for side, about in row["sides"].items():
            if "min" in about:
                name = row["recipe"] if side == _OURS else f"{row['recipe']}, theirs"
                curves.setdefault(name, []).append((row["context"], about["tokens_per_s"]))
    looks = {n: Look(i) for i, n in enumerate([*names, *(c for c in curves if c not in names)])}
    state = {n: [(r["context"], r["state_bytes"]) for r in rows if r["recipe"] == n] for n in names}
    per_token = {n: [(c, 1 / v) for c, v in curves[n]] for n in names if n in curves}
    figures = []
    for field, values, label, seen in (
        ("rate", curves, "Tokens per second", findings.growth(per_token, "time per token", 1.5)),
        ("bytes", state, "Bytes of state", findings.growth(state, "memory", 1.001)),
    ):
        lines = [Series(n, looks[n], [c for c, _ in p], [v for _, v in p]) for n, p in values.items()]
        figures.append({"svg": svg(growth(lines, field, label), f"decode-{field}", f"{label} against context", seen),
                        "caption": f"{label} against tokens of context, both axes logarithmic"
                        + (" (K = 1,024)." if field == "bytes" else "; theirs: transformers' generate."),
                        "seen": seen, "expected": ""})  # fmt: skip
    table = _compared(rows, "Tokens per second of one sequence", "Recipe", lambda r: r["recipe"], "tokens_per_s",
                      numbers.count, [Column("context", "Context", numbers.count),
                                      Column("state_bytes", "State", numbers.size)])
    return _section(
        "decoding", "Decoding", "One sequence, greedy. A long context is not read: the state after it is made from one "
        "after a short one, with lists filled up and counters moved, and must have the bytes that the design declares.",
        setup=[("width", str(sizes["width"])), ("layers", str(sizes["layers"])), ("threads", str(max(raw["threads"])))],
        left_out=_absent(rows, "recipe"), figures=figures, tables=[table])  # fmt: skip
