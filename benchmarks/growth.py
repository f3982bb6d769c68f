"""Growth in depth against training from scratch, at equal FLOPs; writes the table of docs/growth.md.

    python benchmarks/growth.py [--widths 64 128]      # goes on where it was stopped: benchmarks/growth.jsonl
    python benchmarks/growth.py --table

Byte Transformers on the standard library's sources, 8 layers, batches of 8 x 64 bytes, one thread. `scratch` trains
STEPS steps; its FLOPs (three forward passes a step, by the cost model) are the whole budget. The other arms spend
SHARE of it on 2 layers, grow to 8 by the arm's surgery, and go on. All warm up for WARMUP steps (again after the
growth, where AdamW starts afresh), keep their rate, and let it fall linearly to a tenth in the last fifth of their
budget. Growth is measured with 1/2, 3/4 and all of the FLOPs of scratch, each with a fall of its own: the constant
part of the runs is shared. Rates are chosen for each arm and width on a seed of their own (all FLOPs for scratch, 3/4
for the others); where the best stands at the end of the list, one further rate is tried. At width 128 `interleave` and
`identity` take the rate of `stack` (at 64, where each was swept, all chose the same). `small` is the 2-layer model
trained with all the FLOPs, at the rate of `stack`: what growing has to beat. Validation: the same 32,768 bytes
throughout.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch

from postformer.data import Batches, Corpus, load_corpus
from postformer.design import load
from postformer.model import LanguageModel, build
from postformer.objective import Batch, NextToken
from postformer.surgery import grow
from postformer.training import TrainConfig, Trainer, evaluate_split

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "growth.jsonl", HERE.parent / "docs" / "growth.md"
ARCH, SMALL, LARGE = "transformer", 2, 8
STEPS, SHARE, WARMUP, FALL = 750, 0.15, 20, 0.2
BATCH, LENGTH = 8, 64
BUDGETS = (0.5, 0.75, 1.0)
ARMS = ("scratch", "stack", "interleave", "identity")
RATES = {64: (1e-3, 2e-3, 4e-3), 128: (5e-4, 1e-3, 2e-3)}
SWEPT = {64: ARMS, 128: ("scratch", "stack")}
DEV, SEEDS = 100, (0, 1, 2)
BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def flops(width: int, layers: int) -> float:
    """Of one training step: forward once, backward twice that."""
    return 3 * load(ARCH, width=width, layers=layers).cost().flops(LENGTH) * BATCH


def small_steps(width: int) -> int:
    """Steps of the small model before it grows."""
    return round(SHARE * STEPS * flops(width, LARGE) / flops(width, SMALL))


def large_steps(width: int, budget: float) -> int:
    """Steps of the grown model within a budget."""
    left = budget * STEPS * flops(width, LARGE) - small_steps(width) * flops(width, SMALL)
    return round(left / flops(width, LARGE))


def trainer(model: LanguageModel, source: Batches, rate: float, steps: int, fall: int, begin: int) -> Trainer:
    """fall: steps in which the rate falls; begin: the first batch."""
    schedule = {"kind": "wsd", "warmup": WARMUP, "final": 0.1, "decay": fall / steps} if fall else \
        {"kind": "constant", "warmup": WARMUP}
    config = TrainConfig.model_validate({"steps": steps, "batch_size": BATCH, "length": LENGTH, "schedule": schedule,
                                         "optimiser": {"learning_rate": rate}})
    return Trainer(model, NextToken(), lambda step: Batch.windows(source.at(begin + step)), config, progress="quiet")


def branch(trunk: Trainer, source: Batches, rate: float, steps: int, fall: int, begin: int) -> LanguageModel:
    """A copy of the trunk as it is, trained to the end of a budget of `steps`."""
    model = build(trunk.model.design)  # type: ignore[arg-type]
    model.load_state_dict(trunk.model.state_dict())
    end = trainer(model, source, rate, steps, fall, begin)
    end.optimisers.load_state({name: value.clone() for name, value in trunk.optimisers.state().items()})
    for step in range(trunk.position.step, steps):
        end.advance(step)
    return model


def bits(model: LanguageModel, corpus: Corpus) -> float:
    return evaluate_split(model, corpus.validation, LENGTH, 32, batches=16)["bits_per_byte"]


class Ledger:
    """One line a figure; what is there is not measured again."""

    def __init__(self) -> None:
        lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
        self.lines = [json.loads(line) for line in lines if line.endswith("}")]

    def add(self, **line: Any) -> None:
        self.lines.append(line)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        return [line for line in self.lines if all(line.get(name) == value for name, value in wanted.items())]


def measure(ledger: Ledger, corpus: Corpus, width: int, arm: str, rate: float, seed: int,
            budgets: tuple[float, ...]) -> None:
    """One arm at one rate and seed, whatever of it is not there yet."""
    budgets = tuple(b for b in budgets if not ledger.find(width=width, arm=arm, rate=rate, seed=seed, budget=b))
    if not budgets:
        return
    began = time.monotonic()
    source = Batches(corpus.train, LENGTH, BATCH, seed)
    extra: dict[str, float] = {}
    layers = SMALL if arm == "small" else LARGE
    if arm in ("scratch", "small"):
        model, offset = build(load(ARCH, width=width, layers=layers).model, seed), 0
    else:
        small, offset = small_model(corpus, width, rate, seed), small_steps(width)
        model = grow(small, LARGE, how=arm)  # type: ignore[arg-type]
        extra = {"before": bits(small, corpus), "after": bits(model, corpus)}
    whole = round(STEPS * flops(width, LARGE) / flops(width, layers))
    ends = {b: whole if offset == 0 else large_steps(width, b) for b in budgets}
    falls = {b: round(FALL * b * whole) for b in budgets}
    trunk = trainer(model, source, rate, max(ends.values()), 0, offset)
    for b in sorted(budgets):
        while trunk.position.step < ends[b] - falls[b]:
            trunk.advance(trunk.position.step)
        done = branch(trunk, source, rate, ends[b], falls[b], offset)
        spent = ends[b] * flops(width, layers) + offset * flops(width, SMALL)
        ledger.add(width=width, arm=arm, rate=rate, seed=seed, budget=b, bits=bits(done, corpus), flops=spent,
                   small_steps=offset, steps=ends[b], seconds=round(time.monotonic() - began, 1), **extra)


_SMALL: dict[tuple[int, float, int], LanguageModel] = {}


def small_model(corpus: Corpus, width: int, rate: float, seed: int) -> LanguageModel:
    """The small model at the moment of growth: at its full rate, since training goes on."""
    key = (width, rate, seed)
    if key not in _SMALL:
        model = build(load(ARCH, width=width, layers=SMALL).model, seed)
        run = trainer(model, Batches(corpus.train, LENGTH, BATCH, seed), rate, small_steps(width), 0, 0)
        for step in range(run.steps):
            run.advance(step)
        _SMALL.clear()
        _SMALL[key] = model
    return _SMALL[key]


def judged(arm: str) -> float:
    """The budget at which an arm's rate is chosen."""
    return 1.0 if arm == "scratch" else 0.75


def best(ledger: Ledger, width: int, arm: str) -> float:
    """The rate that did best on the seed of the sweep."""
    arm = arm if arm in SWEPT[width] else "stack"
    return min(ledger.find(width=width, arm=arm, seed=DEV, budget=judged(arm)), key=lambda line: line["bits"])["rate"]


def sweep(ledger: Ledger, corpus: Corpus, width: int) -> None:
    for rate in RATES[width]:
        for arm in SWEPT[width]:
            measure(ledger, corpus, width, arm, rate, DEV, (judged(arm),))
    for arm in SWEPT[width]:
        chosen = best(ledger, width, arm)
        if chosen in (RATES[width][0], RATES[width][-1]):
            further = chosen / 2 if chosen == RATES[width][0] else chosen * 2
            measure(ledger, corpus, width, arm, further, DEV, (judged(arm),))


def needed(ledger: Ledger, width: int, arm: str, seed: int) -> float:
    """Share of scratch's FLOPs at which the arm, with its rate brought down, is as good as scratch at the end: between
    measured budgets by a straight line over log FLOPs. Infinite where it never is, 0 where the least budget does."""
    rate = best(ledger, width, "scratch")
    goal = ledger.find(width=width, arm="scratch", seed=seed, rate=rate, budget=1.0)[0]["bits"]
    points = [(b, ledger.find(width=width, arm=arm, seed=seed, rate=best(ledger, width, arm), budget=b)[0]["bits"])
              for b in BUDGETS]
    if points[0][1] <= goal:
        return 0.0
    for (b, high), (c, low) in pairwise(points):
        if low <= goal:
            return math.exp(math.log(b) + (high - goal) / (high - low) * (math.log(c) - math.log(b)))
    return math.inf


def table(ledger: Ledger) -> str:
    lines = ["| width | arm | rate | 1/2 | 3/4 | all FLOPs | gain over scratch at 3/4, by seed | FLOPs needed |",
             "| ---: | --- | ---: | ---: | ---: | ---: | --- | --- |"]
    for width in RATES:
        arms = [arm for arm in ARMS if ledger.find(width=width, arm=arm, seed=SEEDS[-1], budget=1.0)]
        rates = {arm: best(ledger, width, arm) for arm in arms}

        def of(arm: str, budget: float, seed: int, width: int = width, rates: dict = rates) -> float:
            return ledger.find(width=width, arm=arm, rate=rates[arm], seed=seed, budget=budget)[0]["bits"]

        for arm in arms:
            cells = [f"{statistics.mean(v):.3f} ± {statistics.stdev(v):.3f}" if arm != "scratch" or b == 1.0 else ""
                     for b in BUDGETS if (v := [of(arm, b, s) for s in SEEDS] if arm != "scratch" or b == 1.0 else [0])]
            gaps = shares = ""
            if arm != "scratch":
                gaps = ", ".join(f"{of('scratch', 1.0, s) - of(arm, 0.75, s):+.3f}" for s in SEEDS)
                shares = ", ".join("< 50 %" if n == 0 else "> 100 %" if n == math.inf else f"{100 * n:.0f} %"
                                   for n in (needed(ledger, width, arm, s) for s in SEEDS))
            lines.append(f"| {width} | {arm} | {rates[arm]:g} | {' | '.join(cells)} | {gaps} | {shares} |")
        if len(tried := ledger.find(width=width, arm="small", budget=1.0)) == len(SEEDS):
            values = [line["bits"] for line in tried]
            lines.append(f"| {width} | small | {tried[0]['rate']:g} |  |  | {statistics.mean(values):.3f} ± "
                         f"{statistics.stdev(values):.3f} |  |  |")
    lines += ["", "| width | arm | before the growth | after it, untrained | all rates tried, on the sweep's seed |",
              "| ---: | --- | ---: | ---: | --- |"]
    for width in RATES:
        for arm in ARMS:
            if tried := ledger.find(width=width, arm=arm, seed=DEV, budget=judged(arm)):
                rest = ", ".join(f"{t['rate']:g}: {t['bits']:.3f}" for t in sorted(tried, key=lambda t: t["rate"]))
                seen = [t for t in ledger.find(width=width, arm=arm, rate=best(ledger, width, arm), budget=0.75)
                        if t["seed"] != DEV and "before" in t]
                pair = [f"{statistics.mean(t[n] for t in seen):.3f}" if seen else "" for n in ("before", "after")]
                lines.append(f"| {width} | {arm} | {pair[0]} | {pair[1]} | {rest} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=list(RATES), choices=RATES)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ledger = Ledger()
    if not options.table:
        corpus = load_corpus("stdlib")
        for width in options.widths:
            sweep(ledger, corpus, width)
        # What answers the question comes first, should it be stopped.
        for arms in (("scratch", "stack"), ("small", "identity"), ("interleave",)):
            for width, seed, arm in product(options.widths, SEEDS, arms):
                rate, whole = best(ledger, width, arm), arm in ("scratch", "small")
                measure(ledger, corpus, width, arm, rate, seed, (1.0,) if whole else BUDGETS)
    text = table(ledger)
    print(text)
    if PAGE.exists():
        page = PAGE.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
