"""Do biases balance experts, and at what price? Train small byte models with and without; write docs/experts.md.

    python benchmarks/experts.py --only bias --seeds 0        one run; any number of these may run at once
    python benchmarks/experts.py --table                      the page, from what is in experts_results.json

Width 64, three layers of attention and a feed-forward, on `stdlib`, batches of 16 x 128, 600 steps of AdamW at one
rate. `dense` has the SwiGLU that the experts' active parameters add up to; the others have 8 experts, of which a token
takes two and one that is shared, each a third as wide. Same seeds, same batches, one thread each. Finished runs are not
repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from postformer.data import load_corpus
from postformer.design import Recipe, load
from postformer.model import build
from postformer.objective import NextToken
from postformer.probe.load import even
from postformer.training import TrainConfig, Trainer, corpus_source
from postformer.training.evaluate import evaluate_split

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "experts_results.json", HERE.parent / "docs" / "experts.md"
VARIANTS, SEEDS, LAST = ("dense", "none", "loss", "bias"), (0, 1, 2), 20
WIDTH, LAYERS, STEPS, HIDDEN = 64, 3, 600, 192
RATES = (3e-3,)


def recipe(variant: str) -> Recipe:
    experts = {"kind": "moe", "experts": 8, "top": 2, "shared": 1, "expert": {"dim_hidden": HIDDEN // 3},
               "balance": variant}
    dense = {"kind": "swiglu", "dim_hidden": HIDDEN}
    return load({"name": f"experts-{variant}", "model": {
        "width": WIDTH, "num_layers": LAYERS, "feedforward": dense if variant == "dense" else experts,
        "memory": {"kind": "attention", "heads": {"query": 4, "key_value": 2, "dim": 16}}}})


def settings(seed: int, rate: float) -> TrainConfig:
    return TrainConfig.model_validate({"steps": STEPS, "batch_size": 16, "length": 128, "seed": seed, "threads": 1,
                                       "optimiser": {"learning_rate": rate}})


def run(variant: str, seed: int, rate: float) -> dict[str, Any]:
    torch.set_num_threads(1)
    config, made = settings(seed, rate), recipe(variant)
    corpus = load_corpus("stdlib")
    source, model = corpus_source(corpus, config), build(made.model, seed=seed)
    trainer = Trainer(model, NextToken(), source.batch_at, config, progress="quiet")
    loads: dict[str, Tensor] = {}
    batches, began = [], time.perf_counter()

    def note(measured: dict[str, Tensor]) -> None:
        for name, value in measured.items():
            loads[name] = loads.get(name, torch.zeros_like(value)) + value
        batches.append([float(even(value).max_violation) for value in measured.values()])

    hand_back = model.after_step
    for step in range(STEPS):
        if step == STEPS - LAST:
            model.after_step = lambda measured: (note(measured), hand_back(measured))  # type: ignore[method-assign]
        trainer.advance(step)
    seconds = time.perf_counter() - began
    found = evaluate_split(model.eval(), corpus.validation, config.length, 16, batches=64)
    totals = [even(value) for value in loads.values()]
    return {"bits_per_byte": found["bits_per_byte"], "seconds": round(seconds, 1),
            "max_violation": [round(float(t.max_violation), 4) for t in totals],
            "max_violation_of_a_batch": [round(statistics.mean(layer), 4) for layer in zip(*batches)],
            "min_share": [round(float(t.min_share), 4) for t in totals]}


def key(variant: str, seed: int, rate: float) -> str:
    return f"{variant} seed {seed} rate {rate:g}"


def read() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def keep(name: str, value: Any) -> None:
    """Add one measurement; read again first, so that several of these may run at once."""
    RESULTS.write_text(json.dumps(read() | {name: value}, indent=1, sort_keys=True) + "\n", encoding="utf-8")


SIZES = {"toy": (2048, 64, 64, 8, 2), "recipe": (2048, 256, 344, 16, 4), "small model": (2048, 768, 512, 16, 2)}
"""name -> tokens, width, hidden channels of an expert, experts, chosen"""


def grouping(tokens: int, width: int, hidden: int, count: int, top: int, rounds: int = 7) -> dict[str, float]:
    """Processor milliseconds, forward and backward, of three ways to run the chosen experts: least of the rounds."""
    torch.set_num_threads(1)
    made = load({"name": "grouping", "model": {"width": width, "mixers": {"f": {
        "kind": "moe", "experts": count, "top": top, "shared": 0, "expert": {"dim_hidden": hidden}}}, "stack": ["f"]}})
    mixer: Any = build(made.model).stack.layers[0].sublayers[0].mixer  # type: ignore[union-attr]
    x = torch.randn(tokens, width, requires_grad=True)
    with torch.no_grad():
        chosen, weight = mixer.choose(mixer.scores(x))
    load_of = torch.bincount(chosen.flatten(), minlength=count)
    gate, up, out = (torch.stack([getattr(e, name).weight.detach().T for e in mixer.experts]).requires_grad_()
                     for name in ("gate", "up", "out"))

    def stacked() -> Tensor:
        order = chosen.flatten().argsort()
        rows, ends = order // top, load_of.cumsum(0).int()
        u = x[rows]
        hidden = F.silu(F.grouped_mm(u, gate, offs=ends)) * F.grouped_mm(u, up, offs=ends)
        y = F.grouped_mm(hidden, out, offs=ends) * weight.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, rows, y)

    ways: dict[str, Callable[[], Tensor]] = {
        "sorted": lambda: mixer._grouped(x, chosen, weight, load_of),
        "masked": lambda: mixer._masked(x, chosen, weight), "stacked": stacked}
    assert torch.allclose(stacked(), ways["sorted"](), atol=1e-5)
    least = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.process_time()
            way().sum().backward()
            least[name] = min(least[name], 1e3 * (time.process_time() - began))
    return {name: round(value, 2) for name, value in least.items()}


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def page() -> str:
    """What was measured, as Markdown."""
    found = read()
    rate = RATES[0]
    runs = {v: [found[key(v, s, rate)] for s in SEEDS if key(v, s, rate) in found] for v in VARIANTS}
    rows = []
    for variant, done in runs.items():
        cost = recipe(variant).cost()
        cells = [variant, f"{cost.params:,}", f"{cost.flops(128) / 128:,.0f}", str(len(done)),
                 spread([r["bits_per_byte"] for r in done])]
        for name, worst in (("max_violation", max), ("max_violation_of_a_batch", max), ("min_share", min)):
            cells.append(spread([worst(r[name]) for r in done]) if variant != "dense" else "")
        rows.append("| " + " | ".join(cells) + " |")
    violation = max(max(r["max_violation"]) for r in runs["bias"])
    pairs = [(a["bits_per_byte"], b["bits_per_byte"]) for a, b in zip(runs["bias"], runs["none"])]
    change = statistics.mean(a / b - 1 for a, b in pairs)
    bench = [f"| {name} | {tokens:,} x {width} | {count} x {hidden}, top {top} | " +
             " | ".join(f"{found['grouping'][name][way]:.1f}" for way in ("sorted", "masked", "stacked")) + " |"
             for name, (tokens, width, hidden, count, top) in SIZES.items()]
    text = f"""# Experts: do biases balance them, and at what price?

Generated by `python benchmarks/experts.py --table` from `benchmarks/experts_results.json`; do not edit.

Corpus `stdlib`, width {WIDTH}, {LAYERS} layers of attention and a feed-forward, {STEPS} steps of 16 x 128 bytes, AdamW
at {rate:g} with cosine decay, one thread, torch {torch.__version__.split("+")[0]}. `dense`: SwiGLU of {HIDDEN} hidden
channels. The others: eight experts of {HIDDEN // 3}, of which each token takes two, and a shared one: as many active
parameters, and the router. `none`: no balance; `loss`: a loss of weight 0.01; `bias`: biases that move by 0.01 a step,
no loss. The rate was not swept; seeds draw weights and batches, the same for all four. The test split was not read.

Violation: the largest load of an expert over the mean one, minus 1, in the worst layer; of the last {LAST} batches
together, and of each of them alone, on average. Even loads have 0; an expert in every token's choice has {8 / 2 - 1:g}.
Least share: of all choices of those batches, in the worst layer; even loads have 0.125. Means over seeds, and their
range.

| feed-forward | params | FLOPs/token | seeds | bits per byte, validation | violation | of one batch | least share |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{chr(10).join(rows)}

Asked of the biases: a violation below 0.15 without any loss, in every layer and seed; the worst is {violation:.3f}:
{"met" if violation < 0.15 else "NOT met"}. Bits per byte within 1 % of no balance, or better: {change:+.2%} on average
over seeds ({", ".join(f"{a / b - 1:+.2%}" for a, b in pairs)}): {"met" if change < 0.01 else "NOT met"}.

    python benchmarks/experts.py && python benchmarks/experts.py --table

## Running the chosen experts

Milliseconds of processor time, forward and backward, one thread, the least of seven rounds in turn, on a busy machine:
only ratios mean something. Sorted: tokens sorted by expert, each expert once on its own (what runs). Masked: expert by
expert, on the tokens that a mask picks (what `backend="reference"` runs). Stacked: the weights as one tensor each, and
`grouped_mm`.

| size | tokens x width | experts | sorted | masked | stacked |
| --- | ---: | ---: | ---: | ---: | ---: |
{chr(10).join(bench)}
"""
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--rates", nargs="*", type=float, default=list(RATES))
    parser.add_argument("--grouping", action="store_true", help="only time three ways to run the chosen experts")
    parser.add_argument("--table", action="store_true", help="only write the page")
    options = parser.parse_args()
    if options.table:
        PAGE.write_text(page(), encoding="utf-8")
        return
    if options.grouping or "grouping" not in read():
        keep("grouping", {name: grouping(*size) for name, size in SIZES.items()})
        print("grouping", read()["grouping"], flush=True)
    if options.grouping:
        return
    for rate in options.rates:
        for seed in options.seeds:
            for variant in options.only:
                name = key(variant, seed, rate)
                if name not in read():
                    keep(name, run(variant, seed, rate))
                    print(name, read()[name], flush=True)


if __name__ == "__main__":
    main()
