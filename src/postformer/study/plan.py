"""How many steps fit: from measured seconds per step and a time limit to one number of steps per trial.

Every architecture of a trial takes equally many steps, so equally many tokens. Jobs run in a fixed order on a few
workers, each taking the next job when it is free; the plan is the largest whose simulated end is within the limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Need:
    """What one trial takes: its share of the time, seconds per step and seconds besides of each architecture."""

    weight: float
    per_step: Mapping[str, float]
    besides: float
    """Per run: starting, evaluating, saving."""
    most: int
    """Steps after which more would show nothing new."""
    enough: int = 0
    """Steps after which the trial shows what it is about: all trials get so many before any gets more."""
    least: int = 1

    @property
    def fixed(self) -> float:
        """Seconds that no number of steps changes."""
        return self.besides * len(self.per_step)


def makespan(durations: Sequence[float], workers: int, busy: Sequence[float] = ()) -> float:
    """Seconds until the last job ends, jobs taken in order by whichever worker is free first.

    busy: seconds for which some workers still work on something else.
    """
    free = sorted([*busy, *[0.0] * workers][:workers]) if busy else [0.0] * workers
    for duration in durations:
        free.sort()
        free[0] += duration
    return max(free)


def durations(needs: Mapping[str, Need], steps: Mapping[str, int]) -> list[float]:
    """Seconds of every run in the order in which they are started: trial by trial, the longest first."""
    out: list[float] = []
    for key, need in needs.items():
        out += sorted((need.besides + steps[key] * s for s in need.per_step.values()), reverse=True)
    return out


def allot(seconds: float, workers: int, needs: Mapping[str, Need], then: Sequence[float] = (),
          busy: Sequence[float] = ()) -> dict[str, int]:
    """Steps per trial such that everything ends within `seconds`.

    Args:
        seconds: time from now on.
        workers: how many jobs run at once.
        needs: trials in their order.
        then: seconds of further jobs, run last.
        busy: see `makespan`.

    Where even the least steps do not fit, those are returned: a demo that is cut short still shows every trial.
    """
    steps = {key: need.least for key, need in needs.items()}
    low, high = 0.0, float(seconds * workers)
    for _ in range(40):
        middle = (low + high) / 2
        tried = _share(middle, needs)
        if makespan([*durations(needs, tried), *then], workers, busy) <= seconds:
            low, steps = middle, tried
        else:
            high = middle
    return steps


def _share(work: float, needs: Mapping[str, Need]) -> dict[str, int]:
    """Steps when so many seconds of work are given out by weight: up to `enough` for all, then up to `most`."""
    work -= sum(need.fixed for need in needs.values())
    steps = dict.fromkeys(needs, 0)
    for caps in ({k: min(n.enough, n.most) for k, n in needs.items()}, {k: n.most for k, n in needs.items()}):
        open_ = [key for key in needs if steps[key] < caps[key]]
        while open_ and work > 0:
            total = sum(needs[key].weight for key in open_)
            room = {k: int(work * needs[k].weight / total / sum(needs[k].per_step.values())) for k in open_}
            full = [k for k in open_ if steps[k] + room[k] >= caps[k]]
            # What a trial cannot use goes to the others, so those that are full are served first.
            for key in full or open_:
                more = min(room[key], caps[key] - steps[key])
                steps[key] += more
                work -= more * sum(needs[key].per_step.values())
            if not full:
                break
            open_ = [key for key in open_ if key not in full]
    return {key: max(need.least, steps[key]) for key, need in needs.items()}
