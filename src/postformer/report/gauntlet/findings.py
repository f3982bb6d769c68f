"""What a gauntlet's figures say, in sentences computed from them. Nothing here knows which design should win.

Two designs are called different only where their seeds' ranges do not touch.
"""

from __future__ import annotations

from postformer.report import numbers
from postformer.report.gauntlet.data import Stat, Study, Trial

BARELY = 0.1
"""Less than this part of the way from chance to perfect is called barely learned."""


def score(trial: Trial, value: float | None) -> str:
    """A headline value in a sentence or a table."""
    return numbers.bits(value) if trial.lower or (value or 0) > 1 else numbers.accuracy(value)


def leaders(study: Study, trial: Trial, inside: bool) -> list[str]:
    """The design with the best mean, then those whose range over seeds reaches into its own, best first."""
    found = {d: s for d in study.names if (s := study.regime(d, trial, inside))}
    if not found:
        return []
    sign = -1 if trial.lower else 1
    order = sorted(found, key=lambda d: -sign * found[d].mean)
    best = found[order[0]]
    reach = (lambda s: s.low <= best.high) if trial.lower else (lambda s: s.high >= best.low)
    return [d for d in order if reach(found[d])]


def lead(study: Study) -> str:
    """Who leads on how many tasks, inside and outside the training distribution, in one sentence."""
    parts = []
    for inside, where in ((True, "inside the training distribution"), (False, "outside it")):
        compared = [t for t in study.trials
                    if sum(study.regime(d, t, inside) is not None for d in study.names) > 1]
        if not compared:
            continue
        wins = dict.fromkeys(study.names, 0)
        for trial in compared:
            for design in leaders(study, trial, inside):
                wins[design] += 1
        most = max(wins.values())
        first = [study.names[d] for d, n in wins.items() if n == most]
        if len(first) == len(study.names):
            parts.append(f"{where}, no design stands out")
        elif len(compared) == 1:
            verb = "is best" if len(first) == 1 else "are best and cannot be told apart"
            parts.append(f"{where}, {numbers.listing(first)} {verb}")
        else:
            parts.append(f"{where}, {numbers.listing(first)} {'is' if len(first) == 1 else 'are'} best, or within the "
                         f"seeds' range of the best, on {most} of {numbers.plural(len(compared), 'task')}")  # fmt: skip
    if not parts:
        return "Nothing can be compared yet: no task has figures of two designs."
    text = "; ".join(parts) + "."
    return text[0].upper() + text[1:]


def more(study: Study) -> str:
    """The deepest fall from inside to outside, and the tasks that no design has learned."""
    falls = []
    for trial in study.trials:
        if trial.lower:
            continue
        for design in study.names:
            inside, outside = (study.regime(design, trial, r, rescale=True) for r in (True, False))
            if inside and outside:
                falls.append((inside.mean - outside.mean, design, trial))
    out = []
    if falls:
        drop, design, trial = max(falls, key=lambda f: f[0])
        if drop > BARELY:
            a, b = (study.regime(design, trial, r) for r in (True, False))
            assert a is not None
            assert b is not None
            out.append(f"The deepest fall from inside to outside is {study.names[design]}'s on {trial.title}, from "
                       f"{score(trial, a.mean)} to {score(trial, b.mean)}.")  # fmt: skip
    barely = []
    for trial in study.trials:
        found = [s.mean for d in study.names if (s := study.regime(d, trial, True, rescale=True))]
        if found and not trial.lower and max(found) < BARELY:
            barely.append(trial.title)
    if barely:
        out.append(f"No design gets a tenth of the way from chance to perfect on {numbers.listing(barely)}, so nothing "
                   "follows from differences there.")  # fmt: skip
    return " ".join(out)


def task(study: Study, trial: Trial) -> str:
    """Best and worst at the hardest setting of each regime."""
    out = []
    for inside, where in ((True, "inside"), (False, "outside")):
        settings = trial.regime(inside)
        if not settings:
            continue
        hardest = settings[-1]
        found = {d: s for d in study.names if (s := study.stat(d, trial, hardest))}
        if not found:
            continue
        order = sorted(found, key=lambda d: found[d].mean, reverse=not trial.lower)
        best, worst = order[0], order[-1]
        text = f"At {hardest['name']} ({where}), {_at(study, trial, best, found[best])}"
        if worst != best:
            same = found[worst].mean == found[best].mean
            text += ", as does every other design" if same else f" and {_at(study, trial, worst, found[worst])}"
        out.append(text + ".")
    return " ".join(out) or "No figures yet."


def state(study: Study, trial: Trial, on: list[str], setting: str) -> str:
    """Which designs are on the Pareto front of accuracy against bytes of state."""
    names = [study.names[d] for d in on]
    if len(names) == 1:
        return f"At {setting}, no design reaches more than {names[0]}, and none as much with fewer bytes."
    return f"On the front at {setting}, from the smallest state to the largest: {numbers.listing(names)}."


def _at(study: Study, trial: Trial, design: str, stat: Stat) -> str:
    spread = "" if stat.deviation is None else f" ± {stat.deviation:.3f}"
    return f"{study.names[design]} reads {score(trial, stat.mean)}{spread}"
