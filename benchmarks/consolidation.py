"""A fact given once, 100 documents ago: with what was kept of each document, and with nothing kept.

    python benchmarks/consolidation.py             # three seeds of each arm, appended to benchmarks/consolidation.jsonl
    python benchmarks/consolidation.py --table     # the table of docs/timescales.md

One design (below), trained on the task `documents` with one to eight documents between a fact and the question; the
rate is chosen by validation at 8 documents on a seed of its own. Asked at up to 100. Arms: the learned share; a share
of 0, trained so; the first one's weights with a share of 0 (what the slow copy holds is all that is taken away).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from postformer.design import load
from postformer.design.grammar import Recipe
from postformer.model import build
from postformer.task import load as load_task
from postformer.task import setting_name
from postformer.training import evaluate_task, load_run, train_task
from postformer.training.config import TrainConfig

OUT = Path(__file__).parent / "consolidation.jsonl"
RATES, SEEDS, TOKENS, DEVELOPMENT = (2.5e-3, 5e-3, 1e-2), (0, 1, 2), 2_500_000, 99
DELTA = {"kind": "matrix", "loss": "l2", "retention": {"per": "head", "gate": "mamba"}, "features": "l2norm",
         "heads": {"value": 2, "dim_key": 32, "dim_value": 32}, "read": "gated-norm"}


def recipe(share: float | str) -> Recipe:
    memory = {"kind": "envelope", "expand": 1, "conv": 4, "of": {"kind": "consolidated", "share": share, "of": DELTA}}
    return load({"name": "kept", "model": {
        "width": 64, "vocab": load_task("documents").vocab, "stack": ["memory/feedforward"] * 2,
        "mixers": {"memory": memory, "feedforward": {"kind": "swiglu"}}}})


def trained(share: float | str, rate: float, seed: int, directory: Path) -> torch.nn.Module:
    config = TrainConfig(tokens=TOKENS, batch_size=32, length=80, seed=seed, threads=1,
                         optimiser={"learning_rate": rate})  # type: ignore[arg-type]
    train_task(recipe(share), "documents", None, config, directory, progress="quiet")
    return load_run(directory)[1]


def scores(model: torch.nn.Module, stream: str) -> dict[str, dict[str, float]]:
    """By documents in between: how often the last of the kept facts is right, and the pairs inside documents."""
    task = load_task("documents")
    found = evaluate_task(model, task, task.difficulties.evaluate, batch_size=64, batches=16, stream=stream)
    out = {}
    for setting in task.difficulties.evaluate:
        documents, name = setting[1], setting_name(setting)  # type: ignore[index]
        out[str(documents)] = {"kept": found[name]["last_accuracy"], "all": found[name]["token_accuracy"]}
    return out


def run() -> None:
    torch.set_num_threads(1)
    lines = [json.loads(line) for line in OUT.read_text().splitlines()] if OUT.exists() else []

    def done(**keys: Any) -> dict[str, Any] | None:
        return next((line for line in lines if all(line.get(k) == v for k, v in keys.items())), None)

    def write(line: dict[str, Any]) -> None:
        lines.append(line)
        with OUT.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)

    for arm, share in (("learned", "learned"), ("none", 0.0)):
        for rate in RATES:
            if not done(arm=arm, rate=rate, seed=DEVELOPMENT):
                with tempfile.TemporaryDirectory() as directory:
                    model = trained(share, rate, DEVELOPMENT, Path(directory) / "run")
                write({"arm": arm, "rate": rate, "seed": DEVELOPMENT, "validation": scores(model, "validation")})
        swept = [line for line in lines if line["arm"] == arm and line["seed"] == DEVELOPMENT]
        rate = max(swept, key=lambda line: line["validation"]["8"]["all"])["rate"]
        for seed in SEEDS:
            if done(arm=arm, seed=seed):
                continue
            with tempfile.TemporaryDirectory() as directory:
                model = trained(share, rate, seed, Path(directory) / "run")
            write({"arm": arm, "rate": rate, "seed": seed, "test": scores(model, "test")})
            if arm == "learned":
                off = build(recipe(0.0).model)
                off.load_state_dict(model.state_dict(), strict=False)
                write({"arm": "switched off", "rate": rate, "seed": seed, "test": scores(off, "test")})


def table() -> str:
    lines = [json.loads(line) for line in OUT.read_text().splitlines()]
    counts = list(next(line for line in lines if "test" in line)["test"])
    rows = [f"| share | rate | {' | '.join(counts)} | pairs inside documents |",
            "| --- | ---: |" + " ---: |" * (len(counts) + 1)]
    arms = {"learned": "learned", "switched off": "the same weights, share 0", "none": "0, trained so"}
    for arm, words in arms.items():
        tests = [line for line in lines if line["arm"] == arm and "test" in line]
        cells = []
        for count in counts:
            found = [line["test"][count]["kept"] for line in tests]
            cells.append(f"{sum(found) / len(found):.3f} ({min(found):.3f} to {max(found):.3f})")
        inside = sum(line["test"][counts[-1]]["all"] for line in tests) / len(tests)
        rows.append(f"| {words} | {tests[0]['rate']:g} | {' | '.join(cells)} | {inside:.3f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    if parser.parse_args().table:
        print(table())
    else:
        run()
