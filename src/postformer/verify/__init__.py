"""The proof tool: does a design keep the contract? The same checks run over shipped recipes and over a user's own."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from postformer.design import Recipe, load
from postformer.design.place import NotDeclared
from postformer.verify import causality, declared, numerics, streaming  # noqa: F401  (they register their checks)
from postformer.verify.check import CHECKS
from postformer.verify.subject import reduced, subject


@dataclass(frozen=True)
class Result:
    """One line of the table. passed None: not checked, and why."""

    name: str
    passed: bool | None
    value: float = 0.0
    tolerance: float = 0.0
    note: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Verification:
    recipe: str
    size: str
    results: list[Result] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """No check failed."""
        return all(r.passed is not False for r in self.results)

    @property
    def seconds(self) -> float:
        return sum(r.seconds for r in self.results)


def verify(recipe: str | dict | Recipe, only: Iterable[str] = (), full: bool = False) -> Verification:
    """Run every check on a design at verification size (or, with full, at its own). A check that raises has failed.

    only: run just the checks whose names hold one of these texts; ValueError if there is none.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny: a second thread only waits
    try:
        return _verify(load(recipe), only, full)
    finally:
        torch.set_num_threads(threads)


def _where(error: BaseException) -> str:
    """File and line where the author has to look: the innermost frame that is neither torch's nor ours, if any."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = str(Path(__file__).parents[1])
    torchs = str(Path(torch.__file__).parent)
    rest = [f for f in frames if not f.filename.startswith((torchs, "<frozen"))]
    frames = [f for f in rest if not f.filename.startswith(ours)] or rest or frames
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def _verify(whole: Recipe, only: Iterable[str], full: bool) -> Verification:
    only = (only,) if isinstance(only, str) else tuple(only)
    small = whole if full else reduced(whole)
    size = f"width {small.model.width}, {len(small.model.stack)} layers"
    results = []
    if only and not any(word in item.name for item in CHECKS for word in only):
        raise ValueError(f"no check's name has any of {sorted(only)}; they are: {'; '.join(c.name for c in CHECKS)}")
    try:
        made = subject(small)
        with torch.no_grad():
            made(made.input(2, 5, 0))
    except Exception as e:  # whatever stands in the author's class
        note = f"{type(e).__name__}: {e}{_where(e)}"
        return Verification(whole.name, size, [Result("it builds and runs", False, float("inf"), note=note)])
    for item in CHECKS:
        if only and not any(word in item.name for word in only):
            continue
        start = time.perf_counter()
        made = subject(small)
        if why := item.unless(made.traits):
            results.append(Result(item.name, None, note=why))
            continue
        try:
            value, tolerance, note = item.run(made)
            passed = value <= tolerance
        except NotDeclared as e:
            results.append(Result(item.name, None, note=e.message))
            continue
        except Exception as e:
            value, tolerance, note, passed = float("inf"), 0.0, f"{type(e).__name__}: {e}{_where(e)}", False
        results.append(Result(item.name, passed, value, tolerance, note, time.perf_counter() - start))
    return Verification(whole.name, size, results)
