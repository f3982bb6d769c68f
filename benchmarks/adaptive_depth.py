"""Does depth follow difficulty? Pointer chasing with a looped block, and a price on its steps once it has learned.

    python benchmarks/adaptive_depth.py --seeds 0 1 2 --minutes 10      JSON lines; finished seeds are not repeated
    python benchmarks/adaptive_depth.py --table                         what the file holds, as a table

A cycle over `pairs` symbols is given as shuffled pairs, then k and four questions (task `pointer-chasing`). The model:
a layer that binds each token to the one before (channel-mix), then a block of attention and SwiGLU, applied until the
token halts. Learned with a curriculum: k up to K, and K grows by one when the hardest is right in 9 of 10. When all
are, or half of the time is over, the price of a step rises to its full value over half of what is left; one half of it
is on the mean over all tokens, the other on the questions alone. Depth is that
of the questions' tokens, evaluated without gradients, so with hard halting; accuracy is of the same tokens. Time is
processor time of one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from postformer.design import Recipe, load
from postformer.model import LanguageModel, build
from postformer.task.hops import Hops

RESULTS = Path(__file__).resolve().parent / "adaptive_depth.jsonl"
QUESTIONS, BATCH = 4, 64


def recipe(args: argparse.Namespace, vocab: int) -> Recipe:
    looped = {"kind": "loop", "most": args.most, "state": args.state, "halt": args.halt, "price": 1.0}
    return load({"name": "adaptive-depth", "model": {
        "width": args.width, "vocab": vocab, "embedding": {"tie": False, "scale": "sqrt-width"},
        "mixers": {"bind": {"kind": "channel-mix", "expand": 2}, "ff": {"kind": "swiglu", "expand": 2},
                   "look": {"kind": "attention", "position": "none", "heads": {"query": 4, "dim": args.width // 4}}},
        "shared": {"hop": {"layer": [{"use": "look"}, {"use": "ff"}]}},
        "layers": {"first": [{"use": "bind"}],
                   "rest": [{"use": "hop", "norm": "none", "residual": "none", "depth": looped,
                             "publish": {"spent": "depth"}}]},
        "stack": ["first", "rest"]}})


def evaluate(model: LanguageModel, task: Hops, batches: int = 4) -> dict[int, dict[str, float]]:
    """By k: accuracy and mean depth of the questions, mean depth of all tokens."""
    found = {}
    model.eval()
    for k in range(1, task.hops + 1):
        right = depth = every = 0.0
        for b in range(batches):
            batch = task.generate(task.pairs(task.symbols, k), 128, torch.Generator().manual_seed(10_000 + 100 * k + b))
            with torch.no_grad():
                out = model(batch.tokens)
            asked = batch.targets >= 0
            right += float((out.logits.argmax(-1) == batch.targets)[asked].float().mean()) / batches
            depth += float(out.published["spent"][asked].mean()) / batches
            every += float(out.published["spent"].mean()) / batches
        found[k] = {"accuracy": round(right, 4), "depth": round(depth, 3), "all_tokens": round(every, 3)}
    model.train()
    return found


def run(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    task = Hops(symbols=args.pairs, hops=args.hops, questions=QUESTIONS, train=[(2 * args.pairs + 1 + QUESTIONS, 1)])
    model = build(recipe(args, task.vocab).model, seed=seed)
    optimiser = torch.optim.AdamW(model.parameters(), args.rate, weight_decay=0.01, betas=(0.9, 0.98))
    draw = torch.Generator().manual_seed(seed)
    start, limit = time.process_time(), 60 * args.minutes
    hardest, step, learned, share, recent = 1, 0, None, 0.0, 0.0
    while (spent := time.process_time() - start) < limit:
        if learned is None and (spent > limit / 2 or (hardest == args.hops and recent > 0.9)):
            learned = spent
        ramp = 0.0 if learned is None else min(1.0, (spent - learned) / (0.5 * (limit - learned)))
        hard = float(torch.rand((), generator=draw)) < 0.4
        k = hardest if hard else int(torch.randint(1, hardest + 1, (), generator=draw))
        # Short cycles among the long ones: on long ones alone two hops are not found for thousands of steps.
        least = max(QUESTIONS, k + 1)
        count = task.symbols if float(torch.rand((), generator=draw)) < 0.5 else int(
            torch.randint(least, task.symbols + 1, (), generator=draw))
        batch = task.generate(task.pairs(count, k), BATCH, draw)
        out = model(batch.tokens)
        asked = batch.targets >= 0
        loss = F.cross_entropy(out.logits[asked], batch.targets[asked])
        # The loss "steps" counts all tokens alike, at price one; here the questions' steps have half of the price.
        every = sum(value for name, value in out.losses.items() if name.endswith("steps"))
        price = args.price * ramp * 0.5 * (every + out.published["spent"][asked].mean())
        optimiser.zero_grad(set_to_none=True)
        (loss + price).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = args.rate * min(1.0, (step + 1) / 50) * (1 - 0.9 * share)
        share = 0.0 if learned is None else (spent - learned) / (limit - learned)
        optimiser.step()
        step += 1
        if k == hardest:
            right = float((out.logits.argmax(-1) == batch.targets)[asked].float().mean())
            recent = 0.9 * recent + 0.1 * right
            if recent > 0.9 and hardest < args.hops and learned is None:
                hardest, recent = hardest + 1, 0.0
        if step % 100 == 0:
            line = {"seed": seed, "step": step, "seconds": round(spent, 1), "hardest": hardest,
                    "recent": round(recent, 3), "loss": round(float(loss.detach()), 4), "ramp": round(ramp, 2)}
            if step % 500 == 0:
                line["now"] = {k: (v["accuracy"], v["depth"]) for k, v in evaluate(model, task, 1).items()}
            print(json.dumps(line), flush=True)
    found = evaluate(model, task)
    depths = [found[k]["depth"] for k in range(1, args.hops + 1)]
    return {"seed": seed, **{k: v for k, v in vars(args).items() if k not in ("seeds", "table")}, "steps": step,
            "hardest": hardest, "priced_from": round(learned or limit, 1), "by_k": found,
            "spearman": round(spearman(depths), 3), "gain": round(depths[-1] - depths[0], 3)}


def spearman(values: list[float]) -> float:
    """Rank correlation with 1, 2, ...; equal values share their mean rank."""
    v = torch.tensor(values, dtype=torch.float64)
    ranks = ((v[:, None] > v).sum(1) + ((v[:, None] == v).sum(1) - 1) / 2).double()
    both = torch.stack([ranks, torch.arange(len(values), dtype=torch.float64)])
    return float(torch.nan_to_num(torch.corrcoef(both)[0, 1]))


def table(lines: list[dict[str, Any]]) -> str:
    rows = []
    for line in lines:
        each = " | ".join(f"{v['depth']:.2f} ({100 * v['accuracy']:.0f} %)" for v in line["by_k"].values())
        rows.append(f"| {line['seed']} | {line['price']:g} | {line['steps']:,} | {each} | {line['spearman']:.2f} | "
                    f"{line['gain']:+.2f} |")
    ks = " | ".join(f"k = {k}" for k in lines[0]["by_k"])
    return "\n".join([f"| seed | price | steps | {ks} | Spearman | depth({len(lines[0]['by_k'])}) - depth(1) |",
                      "| --- " * (5 + len(lines[0]["by_k"])) + "|", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    for name, value in (("minutes", 10.0), ("price", 0.05), ("rate", 2e-3)):
        parser.add_argument(f"--{name}", type=float, default=value)
    for name, value in (("hops", 6), ("pairs", 8), ("most", 8), ("width", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--state", default="first")
    parser.add_argument("--halt", default="hard")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    lines = [json.loads(text) for text in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    if args.table:
        for hops in sorted({line["hops"] for line in lines}):
            print(table([line for line in lines if line["hops"] == hops]))
        return
    asked = {k: v for k, v in vars(args).items() if k not in ("seeds", "table")}
    for seed in args.seeds:
        if any(line["seed"] == seed and all(line[k] == v for k, v in asked.items()) for line in lines):
            continue
        line = json.dumps(run(args, seed))
        print(line, flush=True)
        with RESULTS.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
