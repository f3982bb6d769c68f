"""Every recipe on the same text, and on one long sequence: train each on the standard library's sources, then run it
over 65,536 tokens in one go; write docs/language.md.

    python benchmarks/language_table.py [--tokens 200000] [--out runs/language] [--only NAME ...]
    python benchmarks/language_table.py --table

Width 64, four layers (eight where a layer is one sublayer, more where the recipe's pattern needs it), batches of
8 x 128 (16 x 256 for more than a million bytes), AdamW at one rate for all, one seed. It is a check that every recipe
learns and stays stable, not a comparison: no rate was swept. Finished runs are not repeated. What was measured is kept
in language_results.json; --table only writes the page from it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from postformer.contract import state as states
from postformer.data import Corpus, load_corpus
from postformer.design import Recipe, load, names
from postformer.study.entry import fitted
from postformer.training import TrainConfig, load_run, train_language

HERE = Path(__file__).resolve().parent
RESULTS, WHY = HERE / "language_results.json", HERE / "language_notes.json"
PAGE = HERE.parent / "docs" / "language.md"
SHORT, LONG = 200_000, 2_000_000
RANGES = ((0, 1024), (1024, 4096), (4096, 16384), (16384, 65536))


def settings(tokens: int) -> TrainConfig:
    batch, length = (16, 256) if tokens > 1_000_000 else (8, 128)
    return TrainConfig.model_validate({"tokens": tokens, "batch_size": batch, "length": length, "threads": 1,
                                       "optimiser": {"learning_rate": 3e-3}})


def small(name: str) -> Recipe:
    """Width 64; four layers of two sublayers or eight of one, or the fewest more that hold the whole pattern."""
    model = load(name).model
    start = 8 if all(len(model.layers[layer]) == 1 for layer in model.stack) else 4
    return fitted(name, 64, start, [])


def read() -> dict[str, dict[str, Any]]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def keep(name: str, key: str, value: Any) -> None:
    """Add one measurement; read again first, so that several of these may run at once."""
    found = read()
    found.setdefault(name, {})[key] = value
    RESULTS.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def measure(out: Path, only: list[str], tokens: int) -> None:
    corpus = load_corpus("stdlib")
    for name in only or names():
        recipe, directory = small(name), out / str(tokens) / name
        if read().get(name, {}).get(str(tokens), {}).get("recipe") != recipe.id:
            result = train_language(recipe, corpus, settings(tokens), directory, progress="quiet",
                                    resume=(directory / "run.json").exists())
            keep(name, str(tokens), {"recipe": recipe.id, "bits_per_byte": result.validation["bits_per_byte"],
                                     "tokens_per_s": result.tokens_per_s})
        if directory.exists() and read()[name].get("long", {}).get("recipe") != recipe.id:
            keep(name, "long", {"recipe": recipe.id, **long(directory, corpus)})
        print(name, read()[name], flush=True)


@torch.no_grad()
def long(directory: Path, corpus: Corpus) -> dict[str, Any]:
    """One sequence of validation text, 512 times longer than any it was trained on: bits per byte by
    position, the largest value of the final state, and whether all was finite."""
    torch.set_num_threads(1)
    _, model = load_run(directory)
    model.eval()
    text = torch.from_numpy(corpus.split("validation")[: RANGES[-1][1] + 1].astype("int64"))[None]
    losses, state, finite, began = [], None, True, time.perf_counter()
    for at in range(0, RANGES[-1][1], 1024):
        out = model(text[:, at : at + 1024], state)
        state = out.state
        finite &= bool(torch.isfinite(out.logits).all())
        losses.append(F.cross_entropy(out.logits[0].float(), text[0, at + 1 : at + 1025], reduction="none"))
    bits = torch.cat(losses) / math.log(2)
    floats = [leaf for leaf in states.leaves(state) if leaf.is_floating_point() or leaf.is_complex()]
    finite &= all(bool(torch.isfinite(leaf).all()) for leaf in floats)
    return {"bits_per_byte": [round(bits[a:b].mean().item(), 4) for a, b in RANGES], "finite": finite,
            "largest_state": max((leaf.abs().max().item() for leaf in floats if leaf.numel()), default=0.0),
            "seconds": round(time.perf_counter() - began, 1)}


def trained(found: dict[str, Any], tokens: int) -> list[str]:
    rows = {name: r[str(tokens)] for name, r in found.items() if str(tokens) in r and name in names()}
    scores = {name: r["bits_per_byte"] for name, r in rows.items()}
    median = statistics.median(scores.values())
    lines = [f"Median: {median:.3f} bits per byte.", "",
             "| recipe | params | FLOPs/token | state at 256 tokens | bits per byte, validation | from median | "
             "tokens/s |", "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for name in sorted(rows, key=lambda n: scores[n]):
        recipe = small(name)
        cost, stale = recipe.cost(), "" if rows[name]["recipe"] == recipe.id else " (of an earlier form)"
        lines.append(f"| {name}{stale} | {cost.params:,} | {cost.flops(256) / 256:,.0f} | "
                     f"{cost.state_bytes(256):,} B | {scores[name]:.3f} | "
                     f"{scores[name] / median - 1:+.1%} | {rows[name]['tokens_per_s']:,.0f} |")
    return lines


def lasting(found: dict[str, Any]) -> list[str]:
    ranges = " | ".join(f"{a:,} to {b:,}" for a, b in RANGES)
    lines = [f"| recipe | {ranges} | largest value of the state | finite |",
             "| --- | " + "---: | " * 5 + "--- |"]
    rows = [(name, r["long"]) for name, r in sorted(found.items()) if "long" in r and name in names()]
    lines += [f"| {name} | " + " | ".join(f"{b:.2f}" for b in r["bits_per_byte"])
              + f" | {r['largest_state']:.3g} | {'yes' if r['finite'] else 'NO'} |" for name, r in rows]
    return lines


def table() -> None:
    found = read()
    notes = json.loads(WHY.read_text(encoding="utf-8")) if WHY.exists() else {}
    lines = [
        "# Every recipe on the same text", "",
        "Generated by `python benchmarks/language_table.py --table` from `benchmarks/language_results.json`; do not "
        "edit.", "",
        "Corpus `stdlib` (the Python standard library's own sources), width 64, four layers of two sublayers or eight "
        "of one (more where a pattern is longer), batches of 8 x 128 or 16 x 256, AdamW at 3e-3 with cosine decay, "
        f"one seed, one thread, torch {torch.__version__.split('+')[0]}. A check that each learns, not a comparison: "
        "nothing was swept, and one seed decides nothing. The test split was not read. Tokens per second were measured "
        "while other work ran on the machine: orders of magnitude only.", "",
        f"## After {SHORT:,} bytes, 8 x 128 at a time", "", *trained(found, SHORT), "",
        "## One sequence of 65,536 tokens", "",
        f"The same weights (trained on {SHORT:,} bytes, 128 tokens at a time) over one sequence of validation text, "
        "512 times longer than any they were trained on, the state carried from start to end and never reset: bits per "
        "byte by position. A memory that learns while it reads runs 65,536 steps of its own optimiser here, at the "
        "rate it has by default. Full attention leaves the positions it knows; what has a window or "
        "forgets does not.", "",
        *lasting(found), "",
        f"## After {LONG:,} bytes, 16 x 256 at a time", "", "The recipes that were trained longer.", "",
        *trained(found, LONG), "",
    ]
    longer = [name for name in names() if str(LONG) in found.get(name, {})]
    lines += [f"- {name}: {notes[name]}" for name in longer if name in notes]
    PAGE.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print(PAGE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/language"))
    parser.add_argument("--tokens", type=int, default=SHORT)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if not args.table:
        measure(args.out, args.only, args.tokens)
    table()


if __name__ == "__main__":
    main()
