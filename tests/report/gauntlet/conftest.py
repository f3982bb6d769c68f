"""Fabricated gauntlets: the shape that the verb writes, with invented numbers, so that the page is tested untrained."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

DESIGNS = (
    "transformer", "sliding-window", "linear-attention", "retnet", "mamba2", "gla", "deltanet", "deltanet-negative",
    "gated-deltanet", "deltaproduct", "preconditioned-deltanet", "rwkv7", "xlstm", "ttt-mlp",
    "a design & its <b>long</b> name",
)  # fmt: skip
TASKS = (
    "mqar", "noisy-recall", "fuzzy-recall", "forgetting-recall", "selective-copying", "copying", "compression",
    "memorization", "parity", "modular-arithmetic", "modular-arithmetic-brackets", "group-s3", "group-a5", "dyck",
    "needle", "passkey", "aggregate-counts", "function-composition", "n-gram-lookup", "phone-book", "reversal",
    "multiplication", "dynamic-programming", "majority", "text-bytes",
)  # fmt: skip
PAIRS = ("mqar", "noisy-recall", "forgetting-recall", "phone-book")
FIXED = ("memorization", "text-bytes")
"""Tasks with a single setting."""


def fabricate(designs: int = 15, tasks: int = 25, seeds: int = 3, seed: int = 0) -> dict[str, Any]:
    """A finished gauntlet with the first so many designs and tasks."""
    draw = random.Random(seed)
    names = DESIGNS[:designs]
    keys = TASKS[: tasks - 1] + TASKS[-1:] if tasks > 1 else TASKS[:1]
    described = [_task(key, draw) for key in keys]
    skill = {name: 0.35 + 0.6 * draw.random() for name in names}
    cells = [_cell(name, i, task, skill[name], seeds, draw) for i, name in enumerate(names) for task in described]
    contexts = [128, 512, 2048, 8192, 16384]
    return {
        "schema": 1,
        "kind": "gauntlet",
        "title": f"{designs} designs on {tasks} tasks" if tasks > 1 else "Two ways to recall",
        "command": f"postformer gauntlet {' '.join(n.split(' ')[0] for n in names)} --tier standard --out gauntlet",
        "started": "2026-01-02T03:04:05+00:00",
        "ended": "2026-01-02T09:14:15+00:00",
        "environment": {"postformer": "0.2.0", "python": "3.11.9", "torch": "2.13.0", "processor": "x86_64"},
        "tier": "standard",
        "match": {"on": "params", "reference": names[0], "tolerance": 0.05},
        "seeds": seeds,
        "designs": [
            {
                "key": name,
                "name": name,
                "id": f"{i:02x}ab34cd" * 8,
                "paper": ["2412.06464", "2406.06484"] if i == 8 else "1706.03762" if i else None,
                "summary": f"Invented: what {name} keeps of the past, and what it lets go.",
                "layers": {t["key"]: 2 + (i == 5) for t in described},
            }
            for i, name in enumerate(names)
        ],
        "tasks": described,
        "cells": cells,
        "costs": [
            {
                "design": name,
                "train_tokens_per_s": 52000.0 - 2700 * i,
                "decode": [
                    {
                        "context": c,
                        "seconds_per_token": 0.0005 + 0.00007 * i + (3e-8 * c if i in (0, 12) else 0),
                        "state_bytes": 4096 + 1024 * i + (256 * c if i in (0, 12) else 0),
                    }
                    for c in contexts
                ],
            }
            for i, name in enumerate(names)
        ],
        "published": [
            {"task": keys[0], "design": names[0], "setting": "64x8", "value": 0.99, "source": "2312.04927",
             "scale": "2 layers, width 64, 100k examples"},
        ],
        "claims": [
            {"id": "T3", "title": "Copying", "statement": "A fixed state cannot copy what does not fit into it.",
             "source": "Jelassi 2024", "papers": ["2402.01032"], "from_notes": False,
             "test": "copying by length, at one size of state", "verdict": "holds", "reason": "The ranges are apart.",
             "figures": [{"name": "at 64", "value": 0.31, "unit": "", "low": 0.25, "high": 0.36}], "misread": "Never.",
             "command": "postformer gauntlet mamba2 --tasks copying"},
            {"id": "T5", "title": "Parity", "statement": "Parity needs negative eigenvalues.", "source": "notes",
             "papers": [], "from_notes": True, "test": "parity", "figures": [], "verdict": "undecided",
             "reason": "One of three seeds learned it.", "misread": None, "command": None},
        ],
    }  # fmt: skip


def write(directory: Path, study: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "gauntlet.json").write_text(json.dumps(study), encoding="utf-8")
    return directory


def spoil(study: dict[str, Any]) -> dict[str, Any]:
    """The same study caught in the middle: cells missing, without seeds, with fewer seeds, and failed."""
    cells = study["cells"]
    for number, cell in enumerate(cells):
        log = f"runs/{cell['design'].split(' ')[0]}-{cell['task']}/log.txt"
        if number % 29 == 11:
            cell["seeds"] = []
            cell["rate"] = None
            for entry in cell["sweep"]:
                entry |= {"validation": None, "status": "failed"}
            cell["failures"] = [{"stage": "sweep", "rate": 0.003, "seed": 0, "why": "not finite at step 31 <nan>",
                                 "log": log}]  # fmt: skip
        elif number % 13 == 5:
            cell["seeds"] = cell["seeds"][:2]
            cell["failures"] = [{"stage": "final", "rate": cell["rate"], "seed": 2, "why": "out of memory", "log": log}]
        elif number % 17 == 3:
            cell["seeds"] = cell["seeds"][:1]
    kept = [c for n, c in enumerate(cells) if n < 0.86 * len(cells) or n % 3]
    for cell in kept[-6:]:
        cell |= {"seeds": [], "sweep": [], "rate": None}
    return study | {"cells": kept, "ended": None, "claims": None, "costs": study["costs"][:-2]}


def _task(key: str, draw: random.Random) -> dict[str, Any]:
    lower = key == "text-bytes"
    if key in PAIRS:
        settings: list[Any] = [[16, 4], [32, 8], [64, 16], [128, 32]]
    elif key in FIXED:
        settings = [256]
    else:
        settings = draw.choice([[16, 32, 64], [40, 64, 128, 256], [8, 16, 32, 64, 128]])
    chance = {"parity": 0.5, "majority": 0.5, "group-s3": 1 / 6}.get(key, 1 / 64)
    inside = 2 if len(settings) > 1 else 1
    return {
        "key": key,
        "task": key,
        "title": key.replace("-", " ").capitalize().replace("Mqar", "MQAR"),
        "about": "Invented: pairs of a key and a value, then keys again in another order; the answer is the value.",
        "paper": "2312.04927" if key in PAIRS else None,
        "metric": "bits_per_byte" if lower else "token_accuracy",
        "better": "lower" if lower else "higher",
        "unit": "bytes" if lower else "pairs" if key in PAIRS else "length",
        "settings": [
            {
                "setting": s,
                "name": "x".join(map(str, s)) if isinstance(s, list) else str(s),
                "inside": i < inside,
                "chance": 8.0 if lower else chance,
                "shortcut": 4.6 if lower else min(1.0, chance * (3 if key in PAIRS else 1)),
            }
            for i, s in enumerate(settings)
        ],
        "train": settings[:inside],
        "tokens": 1_500_000,
        "batch_size": 64,
        "rates": [0.001, 0.003, 0.01],
        "width": 32,
        "layers": 2,
        "local": key != "group-s3",
        "learned": key not in ("group-a5", "multiplication"),
        "note": "",
    }


def _cell(design: str, number: int, task: dict[str, Any], skill: float, seeds: int, draw: random.Random) -> dict:
    lower = task["better"] == "lower"
    growing = design in ("transformer", "xlstm")
    ability = min(1.0, max(0.0, skill + draw.uniform(-0.35, 0.4)))
    if not task["learned"]:
        ability *= 0.15

    def value(index: int, noise: float) -> float:
        setting = task["settings"][index]
        if lower:
            return 3.1 + 1.5 * (1 - ability) + noise
        fall = 1 / (1 + math.exp(2.2 * (index - 1.2 - 3 * ability)))
        score = ability**0.3 * fall + noise
        return min(1.0, max(0.0, setting["chance"] + (1 - setting["chance"]) * score))

    finals = []
    for seed in range(seeds):
        wobble = draw.gauss(0, 0.02 if draw.random() < 0.8 else 0.12)
        test = {}
        for i, s in enumerate(task["settings"]):
            v = value(i, wobble)
            metrics = {task["metric"]: v, "loss": 1.2 - v if not lower else v * math.log(2)}
            if not lower:
                metrics |= {"exact_match": v**4, "last_accuracy": max(0.0, v - 0.01)}
            test[s["name"]] = metrics
        finals.append({
            "seed": seed, "validation": {task["metric"]: value(0, wobble)}, "test": test,
            "tokens": 1_500_000 if seed else 900_000, "seconds": 48.2 + seed, "tokens_per_s": 31000.0,
            "stopped": "budget" if seed else "solved",
        })  # fmt: skip
    return {
        "design": design,
        "task": task["key"],
        "params": 21345 + 211 * number + (4000 if number == 5 else 0),
        "flops_per_token": None if number == 13 else 41000.0 + 2100 * number,
        "state_bytes": {
            s["name"]: 256 * int(s["name"].split("x")[0]) if growing else 2048 + 640 * number for s in task["settings"]
        },
        "rate": 0.003,
        "sweep": [
            {"rate": r, "tokens": 375_000, "validation": value(0, n), "status": "finished"}
            for r, n in zip(task["rates"], (-0.1, 0.0, -0.03))
        ],
        "seeds": finals,
        "failures": [],
    }  # fmt: skip


@pytest.fixture
def make():
    """`fabricate`: a study of so many designs, tasks and seeds."""
    return fabricate


@pytest.fixture
def save():
    """`write`: a study into a directory."""
    return write


@pytest.fixture
def interrupt():
    """`spoil`: a study caught in the middle."""
    return spoil
