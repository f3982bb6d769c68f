"""What the published studies found: pages of docs/, each from the ledgers beside this file.

    postformer gauntlet DESIGNS --tier sprint --out runs/sprint    # then copy runs/sprint/ledger.jsonl to sprint.jsonl
    python benchmarks/studies.py sprint [--out runs/sprint-page]   # reads it, trains nothing, writes the pages

The commands stand at the head of each page.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postformer.report import render
from postformer.study.asking import ask
from postformer.study.claims import claims
from postformer.study.gauntlet import run_gauntlet

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Published:
    """A study whose ledger is kept."""

    ledger: str
    tier: str
    designs: tuple[str, ...]
    tasks: str | None = None
    match: str | None = None
    changes: tuple[str, ...] = ()
    claims: tuple[str, ...] = ()
    """Ids of those that the page tells"""

    @property
    def command(self) -> str:
        options = "".join(f" --{name} {value}" for name in ("tasks", "match") if (value := getattr(self, name)))
        changes = "".join(f" -s {change}" for change in self.changes)
        return f"postformer gauntlet {' '.join(self.designs)} --tier {self.tier}{options}{changes} --claims"

    def result(self, out: Path) -> dict[str, Any]:
        """The result of the ledger; ValueError if it lacks a trial."""
        def refuse(line: str) -> None:
            raise ValueError(f"the ledger lacks a trial of this study, which was run: {line}")

        ledger = (HERE / f"{self.ledger}.jsonl").read_text(encoding="utf-8")
        (out / "ledger.sqlite").unlink(missing_ok=True)  # nothing but what is published
        plan = ask(self.designs, self.tier, self.tasks, match=self.match, changes=self.changes, command=self.command)
        found = run_gauntlet(plan, out, merge=ledger, costs=False, progress=refuse)
        render(out)
        return found


def table(found: dict[str, Any], task: dict[str, Any]) -> str:
    """Mean, least and greatest over seeds at every setting; the best mean of a column is bold."""
    cells = [c for c in found["cells"] if c["task"] == task["key"]]
    names = [s["name"] for s in task["settings"]]
    scores = {c["design"]: [[s["test"][n][task["metric"]] for s in c["seeds"]] for n in names] for c in cells}
    ahead = max if task["better"] == "higher" else min
    best = [ahead(statistics.mean(scores[d][i]) for d in scores) for i in range(len(names))]
    head = [f"{s['name']}{'' if s['inside'] else ' (beyond)'}" for s in task["settings"]]
    lines = [f"| design | params | state | rate | {' | '.join(head)} |",
             "| --- | ---: | ---: | ---: |" + " ---: |" * len(head)]
    for cell in cells:
        shown = []
        for i, values in enumerate(scores[cell["design"]]):
            mean = statistics.mean(values)
            spread = f" ({min(values):.2f} to {max(values):.2f})" if max(values) - min(values) >= 5e-4 else ""
            text = f"{mean:.3f}{spread}"
            shown.append(f"**{text}**" if mean == best[i] else text)
        state = max(cell["state_bytes"].values())
        lines.append(f"| {cell['design']} | {cell['params']:,} | {state:,} B | {cell['rate']:g} | "
                     f"{' | '.join(shown)} |")
    return "\n".join(lines)


def scored(cell: dict[str, Any], task: dict[str, Any]) -> tuple[float, float]:
    """Mean over settings and seeds of what the test split gave a cell, and its standard error over seeds."""
    seeds = [statistics.mean(s["test"][x["name"]][task["metric"]] for x in task["settings"]) for s in cell["seeds"]]
    return statistics.mean(seeds), statistics.stdev(seeds) / len(seeds) ** 0.5


def standing(studies: Sequence[dict[str, Any]], designs: Sequence[str]) -> str:
    """For each task: who is first, and how far from it each of `designs` is, in standard errors of the difference."""
    lines = [f"| task | first | its score | {' | '.join(designs)} |",
             "| --- | --- | ---: |" + " ---: |" * len(designs)]
    places: dict[str, list[int]] = {}
    last = dict.fromkeys(designs, 0)
    near = dict.fromkeys(designs, 0)
    for found in studies:
        for task in found["tasks"]:
            scores = {c["design"]: scored(c, task) for c in found["cells"] if c["task"] == task["key"]}
            sign = 1 if task["better"] == "higher" else -1
            order = sorted(scores, key=lambda name: -sign * scores[name][0])
            for name in order:
                ahead = sum(sign * (scores[other][0] - scores[name][0]) > 0 for other in order)
                places.setdefault(name, []).append(1 + ahead)
            best, error = scores[order[0]]
            shown = []
            for name in designs:
                gap, noise = sign * (best - scores[name][0]), (error**2 + scores[name][1] ** 2) ** 0.5
                near[name] += gap <= noise
                last[name] += places[name][-1] == len(order)
                shown.append(f"{scores[name][0]:.3f} ({places[name][-1]} of {len(order)}"
                             f"{', level' if 0 < gap <= noise else ''})")
            lines.append(f"| {task['key']} | {order[0]} | {best:.3f} ± {error:.3f} | {' | '.join(shown)} |")
    total = len(lines) - 2
    told = [f"- **{name}** is first, or within one standard error of the first, on {near[name]} of {total} tasks; "
            f"it is last on {last[name]}." for name in designs]
    ranks = ", ".join(f"{name} {statistics.mean(p):.2f}"
                      for name, p in sorted(places.items(), key=lambda item: statistics.mean(item[1])))
    return "\n".join([*lines, "", *told, f"- Mean place: {ranks}."])


SPRINT = """# What the sprint found

```
{command}
```

Eight designs, four questions, three learning rates each on a quarter of the budget, three seeds at the best;
validation chose, the test split was read once. `one-step` is DeltaNet with rates in (0, 2), `two-steps-01`
DeltaProduct with rates in (0, 1). Griffin and RWKV-7 have two kinds of layer and so two layers where the others have
one. Matched in width, depth and tokens only: parameters and bytes of state stand beside the scores. Models of this
size say what an architecture learns quickly, not what it can do at a billion parameters. The ledger is
`benchmarks/sprint.jsonl`; `python benchmarks/studies.py sprint` makes this page and the full report from it.

{sections}
## What it shows

- **S3 in one layer** takes two steps with rates in (0, 2): 1.00 at the trained length and at four times that. One such
  step, or two with rates in (0, 1), are far from it, and so is everything else. RWKV-7, with a layer more, gets part
  of the way, and its seeds differ.
- **Parity** at the last position: one step in (0, 2) is right to more than six times the longest trained length on
  every seed. Two steps solve the trained lengths and lose it beyond 64, RWKV-7 much the same; without negative
  eigenvalues nobody leaves 0.5.
- **Recall beyond the load** (30 pairs after training on 8): Mamba-2, whose state is the largest, keeps most, then
  RWKV-7, whose state is the smallest. The Transformer, which keeps everything, does not carry its lookup to sequences
  four times as long (rotary positions); bytes of state alone do not order these designs.
- **Copying 64 letters**: the Transformer does it on every seed, Griffin, whose window of attention holds the string, on
  one of three, no memory of fixed size within this budget, though each has room for 300 bits many times over. By letter
  RWKV-7 has 0.36 to 0.46 and one seed of Mamba-2 0.65. What fails here is learning to use the room, not the room.
- **What to doubt**: 26 of the 32 chosen rates are the least or the greatest of the three tried, so some designs may do
  better at a rate outside. A second sprint that went on past such ends, still by a quarter of the budget, moved few
  figures and one verdict: DeltaProduct on S3 was given 0.0625, where one seed of three solves it (0.997, the others
  0.47), while all three do at 0.01. Two steps in (0, 2) can track S3 in one layer; whether they learn to depends on the
  rate (docs/log.md). Four tasks at one size, and no matching of parameters or state.
"""

RECALL = """# How many pairs a state of 17 kB recalls

```
{command}
```

Multi-query associative recall with 512 tokens, trained on 2 to 64 pairs. Two layers of width 64;
every memory of fixed size has about 17 kB in two layers (the figures below add what short convolutions keep), the
Transformer keeps all of its keys and values. Three learning rates on a quarter of the budget, and further where the
best lies at an end; three seeds at the best; validation chose, the test split was read once. The ledger is
`benchmarks/recall.jsonl`; `python benchmarks/studies.py recall` makes this page and the full report from it.

{sections}
## What it shows

- The order at 64 pairs, in every seed: attention, Gated DeltaNet, Mamba-2, sliding window. It is the order that Zoology
  and the papers of the two recurrences report, here with matched bytes and a sweep for each. At 32 pairs two of three
  seeds of Gated DeltaNet are level with attention; the rest of the order stands there too.
- A window remembers what it holds: 32 tokens are 16 pairs of key and value, and one layer may hand on to the next, so
  16 pairs are still 0.92 and 64 are nothing. It has the bytes of the others and no choice of what to keep.
- Erasing before writing pays where the state is full: with the same bytes Gated DeltaNet has 0.99 and 0.87 at 32 and 64
  pairs, Mamba-2 0.84 and 0.52.
- **What to doubt**: Mamba-2 has 89 thousand parameters against 144 thousand, since most of Gated DeltaNet's bytes of
  state cost maps to write them; only state is equal. Its rate is the greatest tried. Two rates beyond it, in a study of
  their own, were no better (0.84 and 0.79 on validation, two seeds at twice the rate). One size, one task.
"""

CLAIMS = """# Three claims, tried

```
{command}
```

Claims of the literature that need trained models, at sizes that a laptop trains: two layers, some tens of thousands of
parameters, which are matched as far as widths allow (qwen3-next has up to a third less or a fifth more than the
Transformer). Learning rates are swept on the validation split, three seeds count, the test split was read once.
The ledger is `benchmarks/claims.jsonl`; `python benchmarks/studies.py claims` makes this page and the full report,
which says what the test of a claim is.

{sections}
## What it shows

- **Composition** is decided by seeds, not by families: two of three seeds of Gated DeltaNet find two hops (0.92 and
  1.00), the third and all seeds of everything else, the hybrid included, stay at what any value of the row scores
  (0.25). No order of families can be read from that.
- **Density**: each of the fifteen models is worse with sixteen relevant lines than with eight among the same 64 tokens.
  What decides beyond the trained length is another matter: the Transformer has 0.05 at twice the length, where Gated
  DeltaNet keeps 0.74.
- **Recall of bytes**: at this size bytes that the window has shown are predicted best by Mamba, then Mamba-2, Gated
  DeltaNet, the Transformer, the reverse of the claim; windows of 128 bytes are short, and all of the state holds them.
- **What to doubt**: budgets of 1 to 2.5 million tokens; seeds of one design differ by more than designs do; the claims
  were made about models a thousand times as large.
"""

BYTES = """# Bytes at equal FLOPs

```
{command}
```

Bytes of the Python standard library in windows of 128, two layers, designs matched in FLOPs per token. Learning rates
are swept on the validation split, three seeds count, the test split was read once. The ledger is
`benchmarks/bytes.jsonl`;
`python benchmarks/studies.py bytes` makes this page and the full report.

{sections}
**What to doubt**: windows are short and models tiny; parameters are not matched, and a window twice as long as those
of training costs rotary positions more than a recurrence.
"""


@dataclass(frozen=True)
class Page:
    """A page of docs/."""

    studies: tuple[Published, ...]
    text: str
    """With {command} and {sections}"""

    def write(self, name: str, out: Path) -> Path:
        sections, commands = [], []
        for i, study in enumerate(self.studies):
            found = study.result(out / str(i) if i else out)
            commands.append(study.command)
            sections += [section(found, task) for task in found["tasks"]]
            if study.claims:
                judged = [c for c in claims(found, quick=True) if c.id in study.claims]
                sections += [f"**{c.id}. {c.title}.** {c.statement} *{c.verdict.capitalize()}.* {c.reason}\n"
                             for c in judged]
        page = HERE.parent / "docs" / f"{name}.md"
        page.write_text(self.text.format(command="\n".join(commands), sections="\n".join(sections)), encoding="utf-8")
        return page


def section(found: dict[str, Any], task: dict[str, Any]) -> str:
    guess = min(s["chance"] for s in task["settings"])
    metric = task["metric"].replace("_", " ").capitalize()
    layers = f"{task['layers']} layer{'s' * (task['layers'] > 1)}"
    return (f"## {task['key']}\n\n{task['about']} {metric}, mean of three seeds (least to greatest); chance "
            f"{guess:.3g}; {task['tokens']:,} tokens at most, {layers}, width "
            f"{task['width']}.\n\n{table(found, task)}\n")


PAGES = {
    "sprint": Page((Published(
        "sprint", "sprint", ("transformer", "mamba2", "gated-deltanet", "deltaproduct", "rwkv7", "griffin",
                             "one-step=deltanet-negative",
                             "two-steps-01=deltaproduct@model.mixers.memory.update.rate=sigmoid")),), SPRINT),
    "recall": Page((Published(
        "recall", "recall", ("transformer", "sliding-window=sliding-window@model.mixers.attention.window=32",
                             "gated-deltanet", "mamba2=mamba2@model.mixers.mamba.heads.dim_key=16")),), RECALL),
    "claims": Page((Published(
        "claims", "standard", ("transformer", "qwen3-next", "gated-deltanet", "mamba2", "mamba"),
        "composition,aggregate-count,recall-perplexity", "params", ("composition.tokens=2500000",),
        ("T6", "T12", "T13")),), CLAIMS),
    "bytes": Page((Published("bytes", "standard", ("transformer", "mamba", "mamba2"), "bytes", "flops",
                             claims=("T14",)),), BYTES),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", choices=list(PAGES))
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    print(PAGES[asked.page].write(asked.page, asked.out or Path("runs") / f"{asked.page}-page"))


if __name__ == "__main__":
    main()
