"""Claims about trained models, read from a gauntlet's results.

Two designs differ only where every seed of one is better than every seed of the other, with three seeds or more; a
design has solved a task at a setting where its mean over seeds is 0.9 or more. Whatever is in between is undecided, and
so is everything where those compared have not learned the task: where they are no better than its shortcut.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from postformer.study.claims.base import Claim, Figure, Verdict, claim, gauntlet
from postformer.study.claims.results import FEWEST_SEEDS, Results, Score

SOLVED = 0.9
ATTENTION = ("transformer",)
HYBRID = ("qwen3-next", "jamba", "nemotron-h-style")
DELTA = ("gated-deltanet", "deltanet", "kda", "gla", "linear-attention", "retnet")
STATE_SPACE = ("mamba2", "mamba")
CLASSICAL = ("lstm", "slstm", "gru")
POSITIVE = ("mamba", "mamba2", "gla", "retnet", "hgrn2", "linear-attention")
NEGATIVE = {"parity": ("deltanet-negative", "deltaproduct", "gated-deltaproduct", "rwkv7", "slstm", "lstm"),
            "group": ("deltaproduct", "gated-deltaproduct", "rwkv7", "slstm", "lstm")}
GROUPS = ("s3", "s4", "s5", "a5", "group-s3", "group-s4", "group-s5", "group-a5")
COMPARABLE = 0.1
"""How much more FLOPs or parameters one side may have and still count as equal."""
Found = tuple[Verdict, str]


def _figures(scores: Iterable[Score], what: str) -> list[Figure]:
    return [Figure(name=f"{s.design}, {what}", value=s.mean, low=min(s.values), high=max(s.values)) for s in scores]


def _bytes(results: Results, scores: Iterable[Score], task: str, setting: str) -> list[Figure]:
    found = {s.design: results.state_bytes(s.design, task, setting) for s in scores}
    return [Figure(name=f"{name}, state", value=b, unit="bytes") for name, b in found.items() if b is not None]


def _waits(designs: Sequence[str], tasks: Sequence[str], why: str) -> dict[str, Any]:
    return {"verdict": "needs results", "reason": why, "command": gauntlet(designs, tasks)}


def _said(score: Score) -> str:
    return f"{score.design} {score.mean:.3f}"


def _more_seeds(scores: Iterable[Score]) -> str:
    few = [s.design for s in scores if not s.enough]
    return f" {', '.join(few)}: fewer than {FEWEST_SEEDS} seeds." if few else ""


def ordered(scores: Sequence[Score]) -> Found:
    """Whether each design beats the next: holds, or is beaten by it: does not hold; else undecided."""
    said = ", ".join(map(_said, scores))
    pairs = list(pairwise(scores))
    if reversed_ := [(a, b) for a, b in pairs if b.beats(a)]:
        a, b = reversed_[0]
        return "does not hold", f"{b.design} is better than {a.design} in every seed ({said})."
    if all(a.beats(b) for a, b in pairs):
        return "holds", f"In this order in every seed: {said}."
    return "undecided", f"The seeds of neighbours overlap: {said}.{_more_seeds(scores)}"


def _unlearned(results: Results, scores: Iterable[Score], task: str, setting: str) -> list[str]:
    return [s.design for s in scores if not results.learned(s, task, setting)]


@claim("T3")
def copying(results: Results, quick: bool) -> Claim:
    """Attention against memories of fixed size at the longest strings that training covers."""
    about = {
        "id": "T3", "title": "A fixed state cannot copy",
        "statement": "A transformer of two layers can copy strings exponentially longer than its size; a model whose "
        "state has a fixed size copies no string that holds more bits than its state.",
        "source": "Jelassi et al. 2024, Repeat After Me", "papers": ("2402.01032",),
        "test": "Exact copies at the longest training length. It holds if attention solves it and every design of "
        "fixed state is below it in every seed; it does not hold if one of those solves it where attention fails.",
        "misread": "That a state-space model cannot copy: it can, up to what its state holds. Short strings fit.",
    }
    designs = (*ATTENTION, "mamba2", "gated-deltanet")
    tasks = ("copy",)
    task = results.task(tasks)
    if task is None:
        return Claim(**about, **_waits(designs, tasks, "The task copy was not run."))
    longest = results.settings(task, inside=True)[-1]["name"]
    full = results.scores(ATTENTION, task, longest)
    fixed = [s for s in results.scores(results.designs, task, longest) if results.fixed(s.design, task)]
    figures = _figures([*full, *fixed], f"at {longest}")
    about["figures"] = (*figures, *_bytes(results, [*full, *fixed], task, longest))
    if not full or not fixed:
        return Claim(**about, **_waits(designs, [task], "It needs a transformer and a design of fixed state."))
    solving = [s for s in fixed if s.mean >= SOLVED]
    if full[0].mean < SOLVED:
        verdict: Verdict = "does not hold" if any(s.beats(full[0]) for s in solving) else "undecided"
        reason = f"Attention has not learned it ({_said(full[0])}); solved by: " \
            f"{', '.join(s.design for s in solving) or 'none'}."
    elif all(full[0].beats(s) for s in fixed):
        verdict, reason = "holds", f"{_said(full[0])} is above {', '.join(map(_said, fixed))}."
    else:
        level = ", ".join(_said(s) for s in fixed if not full[0].beats(s))
        verdict, reason = "undecided", f"Not told apart from attention ({_said(full[0])}) at {longest}: {level}. " \
            f"What fits a state can be copied; longer strings would decide.{_more_seeds([*full, *fixed])}"
    return Claim(**about, verdict=verdict, reason=reason)


def ranks(values: Sequence[float]) -> list[float]:
    """From 1; equals share the mean of theirs."""
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


def rank_correlation(x: Sequence[float], y: Sequence[float], draws: int = 5000) -> tuple[float, float]:
    """(Spearman's rho, the chance of one as large if x and y had nothing to do with each other, by permutations)."""

    def rho(a: Sequence[float], b: Sequence[float]) -> float:
        mean = (len(a) + 1) / 2
        spread = math.sqrt(sum((u - mean) ** 2 for u in a) * sum((v - mean) ** 2 for v in b))
        return sum((u - mean) * (v - mean) for u, v in zip(a, b, strict=True)) / spread if spread else 0.0

    a, b = ranks(x), ranks(y)
    found, shuffled, generator = rho(a, b), list(b), random.Random(0)
    above = 0
    for _ in range(draws):
        generator.shuffle(shuffled)
        above += rho(a, shuffled) >= found - 1e-12
    return found, (above + 1) / (draws + 1)


@claim("T4")
def recall_and_memory(results: Results, quick: bool) -> Claim:
    """Accuracy of recall against bytes of state over all designs."""
    about = {
        "id": "T4", "title": "Recall is paid for in state",
        "statement": "The smaller a model's state, the fewer of the pairs in its context it recalls.",
        "source": "Arora et al. 2024, Based; Zoology", "papers": ("2402.18668", "2312.04927"),
        "test": "Spearman's rank correlation of bytes of state and accuracy of multi-query associative recall, over "
        "all designs at the hardest setting that training covers. It holds if positive with p below 0.05 by "
        "permutation, and does not if zero or negative.",
        "misread": "That the size of the state decides alone: at equal size the update rule matters as much.",
    }
    designs = ("transformer", "sliding-window", "mamba", "mamba2", "gla", "gated-deltanet", "kda")
    tasks = ("mqar",)
    task = results.task(tasks)
    if task is None:
        return Claim(**about, **_waits(designs, tasks, "The task mqar was not run."))
    hardest = results.settings(task, inside=True)[-1]["name"]
    scores = results.scores(results.designs, task, hardest)
    sizes = _bytes(results, scores, task, hardest)
    scores = [s for s in scores if results.state_bytes(s.design, task, hardest) is not None]
    about["figures"] = (*_figures(scores, f"at {hardest}"), *sizes)
    size = [figure.value for figure in sizes]
    if len(set(size)) < 5:
        return Claim(**about, **_waits(designs, [task], f"It needs designs of five sizes of state; there are "
                                                      f"{len(set(size))}."))
    rho, chance = rank_correlation(size, [s.mean for s in scores])
    about["figures"] += (Figure(name="rank correlation", value=rho), Figure(name="p by permutation", value=chance))
    verdict: Verdict = "does not hold" if rho <= 0 else "holds" if chance < 0.05 else "undecided"
    if len(_unlearned(results, scores, task, hardest)) == len(scores):
        return Claim(**about, verdict="undecided", reason=f"No design has learned {hardest}.")
    if verdict != "holds" and all(s.mean >= SOLVED for s in scores):
        return Claim(**about, verdict="undecided", reason=f"Every design solves {hardest}: it is too easy to tell.")
    return Claim(**about, verdict=verdict, reason=f"Rank correlation {rho:.2f} over {len(scores)} designs (p = "
                                                  f"{chance:.3f}).")


@claim("T5")
def state_tracking(results: Results, quick: bool) -> Claim:
    """Parity and group words beyond the training lengths."""
    about = {
        "id": "T5", "title": "What tracks a state",
        "statement": "Linear recurrences with diagonal transitions of positive numbers cannot do parity at all "
        "lengths, nor therefore the words of S3, which contain it, nor (if TC0 is not NC1) those of A5 and S5; "
        "reflections do parity, and products of them or non-linear recurrences the groups.",
        "source": "Merrill et al. 2024; Grazzi et al. 2024; Siems et al. 2025",
        "papers": ("2404.08819", "2411.12537", "2502.10297"),
        "test": "The shortest evaluation length beyond all training lengths. Of each task run, it holds if no design "
        "of the first kind solves it and one of the second does, and does not hold if one of the first kind does.",
        "misread": "That this proves what a design can express: it measures what it learns. And that TC0 and NC1 "
        "differ is a conjecture.",
    }
    designs = ("mamba2", "gla", "deltanet-negative", "deltaproduct", "lstm")
    found: list[Found] = []
    figures: list[Figure] = []
    for task in (name for name in ("parity", *GROUPS) if name in results.tasks):
        far = results.settings(task, inside=False)
        if not far:
            continue
        setting = far[0]["name"]
        cannot = results.scores(POSITIVE, task, setting)
        can = results.scores(NEGATIVE["parity" if task == "parity" else "group"], task, setting)
        figures += _figures([*cannot, *can], f"{task} at {setting}")
        if not cannot or not can:
            continue
        if wrong := [s for s in cannot if s.mean >= SOLVED]:
            found.append(("does not hold", f"{task}: solved by {', '.join(map(_said, wrong))}."))
        elif right := [s for s in can if s.mean >= SOLVED and s.enough]:
            found.append(("holds", f"{task}: solved by {', '.join(map(_said, right))}; by none of "
                          f"{', '.join(map(_said, cannot))}."))
        else:
            found.append(("undecided", f"{task}: no design that could has solved it ({', '.join(map(_said, can))})."
                          f"{_more_seeds(can)}"))
    about["figures"] = tuple(figures)
    if not found:
        return Claim(**about, **_waits(
            designs, (*GROUPS, "parity"),
            "It needs parity or a group's word problem beyond the training lengths, by designs of both kinds."))
    kinds = [verdict for verdict, _ in found]
    verdict: Verdict = "does not hold" if "does not hold" in kinds else "holds" if "holds" in kinds else "undecided"
    return Claim(**about, verdict=verdict, reason=" ".join(reason for _, reason in found))


@claim("T6")
def hierarchy(results: Results, quick: bool) -> Claim:
    """Composition of functions given in context, by three families."""
    about = {
        "id": "T6", "title": "Hybrids, linear attention, linear recurrences",
        "statement": "At equal size, composing functions that the context gives: hybrids with some attention do better "
        "than linear attention, and that better than linear recurrences.",
        "source": "A Provable Expressiveness Hierarchy in Hybrid Linear-Full Attention, 2026; Zubic et al. 2024; the "
        "order tested is from notes", "papers": ("2602.01763", "2405.16674"), "from_notes": True,
        "test": "The hardest setting of function composition, or else of pointer chasing, that training covers; the "
        "best design of each family. It holds if each family's best beats the next in every seed, and does not if one "
        "is beaten by the next.",
        "misread": "The published theorem separates full attention from hybrids with fewer layers of it, at a fixed "
        "depth; linear attention and state-space models are one class there, without an order between them.",
    }
    designs = ("qwen3-next", "gated-deltanet", "mamba2")
    tasks = ("composition", "pointer-chasing")
    task = results.task(tasks)
    if task is None:
        return Claim(**about, **_waits(designs, tasks, "No task of composed functions was run."))
    hardest = results.settings(task, inside=True)[-1]["name"]
    families = [results.scores(names, task, hardest) for names in (HYBRID, DELTA, STATE_SPACE)]
    about["figures"] = tuple(_figures([s for family in families for s in family], f"{task} at {hardest}"))
    if not all(families):
        why = "It needs a hybrid, a linear attention and a state-space model."
        return Claim(**about, **_waits(designs, [task], why))
    best = [max(family, key=lambda s: s.mean) for family in families]
    verdict, reason = ordered(best)
    if len(_unlearned(results, best, task, hardest)) == len(best):
        verdict, reason = "undecided", f"None has learned {hardest}: {', '.join(map(_said, best))}."
    params = [results.cells[s.design, task]["params"] or math.inf for s in best]
    about["figures"] += tuple(
        Figure(name=f"{s.design}, parameters", value=p) for s, p in zip(best, params, strict=True) if p < math.inf)
    if max(params) > (1 + COMPARABLE) * min(params) and verdict != "undecided":
        verdict, reason = "undecided", f"{reason} But they differ by more than a tenth in parameters; match them."
    return Claim(**about, verdict=verdict, reason=reason)


@claim("T12")
def density(results: Results, quick: bool) -> Claim:
    """Aggregation at one length with few and with many relevant lines."""
    about = {
        "id": "T12", "title": "Aggregation fails by density, not by length alone",
        "statement": "At one length of context, the more of it matters to the answer, the worse a model aggregates it.",
        "source": "after Oolong (Bertsch et al. 2025) and reports of context rot; the form tested is from notes",
        "papers": ("2511.02817",), "from_notes": True,
        "test": "Settings of one length that training covers, with the fewest and the most relevant lines. It holds if "
        "every design that has learned the fewest is worse with most in every seed, and does not if none is or "
        "one is better.",
        "misread": "That long context alone is what hurts: a needle in the same length is found.",
    }
    designs = ("transformer", "mamba2", "gated-deltanet")
    tasks = ("aggregate-count", "aggregate", "aggregate-mode")
    task = results.task(tasks)
    if task is None:
        return Claim(**about, **_waits(designs, tasks, "No aggregation task was run."))
    lengths: dict[int, list[tuple[int, str]]] = {}
    for setting in results.settings(task, inside=True):
        length, lines = setting["setting"]
        lengths.setdefault(length, []).append((lines, setting["name"]))
    several = [sorted(found) for _, found in sorted(lengths.items()) if len(found) > 1]
    if not several:
        return Claim(**about, **_waits(designs, [task], "It needs two settings of one length with different lines."))
    few, most = several[-1][0][1], several[-1][-1][1]
    dense = {s.design: s for s in results.scores(results.designs, task, most)}
    pairs = [(s, dense[s.design]) for s in results.scores(results.designs, task, few) if s.design in dense]
    about["figures"] = tuple(f for a, b in pairs for f in (*_figures([a], few), *_figures([b], most)))
    if not pairs:
        return Claim(**about, **_waits(designs, [task], "No design has results there."))
    pairs = [pair for pair in pairs if results.learned(pair[0], task, few)]
    if not pairs:
        return Claim(**about, verdict="undecided", reason=f"No design has learned {few}.")
    falls = [a.design for a, b in pairs if a.beats_itself(b)]
    rises = [a.design for a, b in pairs if b.beats_itself(a)]
    said = f"From {few} to {most}: {', '.join(f'{a.design} {a.mean:.3f} to {b.mean:.3f}' for a, b in pairs)}."
    if not all(s.enough for pair in pairs for s in pair):
        verdict: Verdict = "undecided"
        said += _more_seeds(a for a, _ in pairs)
    else:
        verdict = "holds" if len(falls) == len(pairs) else "does not hold" if not falls or rises else "undecided"
    return Claim(**about, verdict=verdict, reason=said)


@claim("T13")
def recall_perplexity(results: Results, quick: bool) -> Claim:
    """Bits of bytes that the window has shown before."""
    about = {
        "id": "T13", "title": "The gap to attention is recall",
        "statement": "On tokens that complete what the context has shown before, attention is better than a gated "
        "delta rule, that better than Mamba, and Mamba better than H3.",
        "source": "Zoology and Based for attention against gated convolutions and Mamba; the gated delta rule's place "
        "is from notes", "papers": ("2312.04927", "2402.18668"), "from_notes": True,
        "test": "Bits on hits of the task recall-perplexity at the longest training length. It holds if each beats the "
        "next in every seed, and does not if one is beaten by the next. No recipe of H3 ships; its place is not "
        "tested. Published figures are of much larger models over words, and not comparable with bits per byte.",
        "misread": "A hit perplexity means nothing without the model's size: the same value is published for different "
        "designs at different sizes.",
    }
    designs = ("transformer", "gated-deltanet", "mamba")
    tasks = ("recall-perplexity",)
    task = results.task(tasks)
    if task is None:
        return Claim(**about, **_waits(designs, tasks, "The task recall-perplexity was not run."))
    longest = results.settings(task, inside=True)[-1]["name"]
    scores = results.scores(designs, task, longest)
    rest = [s for s in (results.score(d, task, longest, "rest_bits") for d in designs) if s is not None]
    about["figures"] = (*_figures(scores, f"hits at {longest}"), *_figures(rest, f"the rest at {longest}"))
    if len(scores) < len(designs):
        return Claim(**about, **_waits(designs, [task], f"It needs {', '.join(designs)}."))
    verdict, reason = ordered(scores)
    if unlearned := _unlearned(results, scores, task, longest):
        verdict, reason = "undecided", f"Not yet better than the shortcut: {', '.join(unlearned)}."
    return Claim(**about, verdict=verdict, reason=reason)


@claim("T14")
def bytes_favour_state_space(results: Results, quick: bool) -> Claim:
    """Bits per byte of state-space models and a transformer at equal FLOPs."""
    about = {
        "id": "T14", "title": "Bytes favour state-space models",
        "statement": "At equal FLOPs, state-space models predict raw bytes better than a transformer does.",
        "source": "Wang et al. 2024, MambaByte, on efficiency at the level of bytes; equal FLOPs from notes",
        "papers": ("2401.13660",), "from_notes": True,
        "test": "Bits per byte at the longest training length. It holds if the best state-space model beats the "
        "transformer in every seed with at most a tenth more FLOPs per token, and does not if the transformer beats it "
        "with at most a tenth more. Whether words would reverse it is not tested: there is no task of words.",
        "misread": "That it is about any model of bytes: windows here are short, and the advantage is claimed for long "
        "ones.",
    }
    designs = ("transformer", "mamba", "mamba2")
    tasks = ("bytes",)
    task = results.task(tasks)
    if task is None:
        return Claim(**about, **_waits(designs, tasks, "The task bytes was not run."))
    longest = results.settings(task, inside=True)[-1]["name"]
    full, spaces = results.scores(ATTENTION, task, longest), results.scores(STATE_SPACE, task, longest)
    flops = {s.design: results.cells[s.design, task]["flops_per_token"] or math.nan for s in [*full, *spaces]}
    about["figures"] = (*_figures([*full, *spaces], f"at {longest}"), *(
        Figure(name=f"{design}, FLOPs per token", value=n) for design, n in flops.items() if not math.isnan(n)))
    if not full or not spaces:
        return Claim(**about, **_waits(designs, [task], "It needs a transformer and a state-space model."))
    best = min(spaces, key=lambda s: s.mean)
    said = f"{_said(best)} and {_said(full[0])} bits per byte, at {flops[best.design]:,.0f} and " \
        f"{flops[full[0].design]:,.0f} FLOPs per token."
    if unlearned := _unlearned(results, [best, full[0]], task, longest):
        return Claim(**about, verdict="undecided", reason=f"Not yet better than the shortcut: {', '.join(unlearned)}.")
    winner, other = (best, full[0]) if best.beats(full[0]) else (full[0], best)
    if not winner.beats(other):
        return Claim(**about, verdict="undecided",
                     reason=f"Their seeds overlap: {said}{_more_seeds([best, full[0]])}")
    if not flops[winner.design] <= (1 + COMPARABLE) * flops[other.design]:
        return Claim(**about, verdict="undecided",
                     reason=f"The better one is not known to have as few FLOPs: {said} Match them.")
    return Claim(**about, verdict="holds" if winner is best else "does not hold", reason=said)
