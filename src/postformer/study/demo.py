"""The demo: five architectures, three trials and the cost of decoding, trained and measured in a few minutes.

    run_demo("demo", minutes=4)       # demo/demo.json, demo/runs/<trial>-<architecture>/, demo/plan.json

Two processes of one thread each work through a queue. Steps are decided trial by trial from measured seconds per step
and the time that is left, the same number for every architecture of a trial. Killed and started again in the same
directory, it continues: finished runs are kept, interrupted ones resume from their checkpoint.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from postformer.study.contenders import CONTENDERS, TRIALS, Trial
from postformer.study.plan import Need, allot
from postformer.study.pool import Job, Outcome, Pool
from postformer.training.files import write_text

CONTEXTS = (128, 512, 2048, 8192, 16384)
CORPUS = "stdlib"
SCHEMA = 1
_DECODE_SHARE = 0.1
"""Longest part of the time that one architecture's decoding may take; only a growing list comes near it."""
_BESIDES = {"s3": 1.2, "mqar": 1.6, "text": 3.0}
"""Seconds of a run that are not steps: building, evaluating, saving."""


def run_demo(
    directory: str | Path,
    minutes: float = 4.0,
    *,
    seed: int = 0,
    workers: int | None = None,
    contexts: Sequence[int] = CONTEXTS,
    corpus: str = CORPUS,
    quiet: bool = False,
    progress: Callable[[str], None] | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Train and measure everything, write demo.json, and return its content.

    Args:
        directory: for demo.json and the run directories; one that an earlier call left unfinished is continued.
        minutes: time for all of it, evaluation included. How many steps that buys depends on the machine.
        seed: of weights and data of every run.
        workers: processes, of one thread each; None: one per core, two at most.
        contexts: lengths after which decoding is measured, ascending.
        corpus: name or path of the text.
        quiet: print nothing.
        progress: called with one line per finished job; None: print it.
        command: what to print as the way to repeat it; None: a command line with these arguments.

    Runs that fail are recorded as failed and do not stop the others.
    Raises ValueError for a directory that holds a demo with other arguments, or arguments that make no sense.
    """
    if not minutes > 0:
        raise ValueError(f"minutes is {minutes}; give a positive number, for instance 4")
    demo = _Demo(Path(directory), minutes, seed, workers or min(2, os.cpu_count() or 1), tuple(contexts), corpus)
    demo.say = (lambda line: None) if quiet else progress or (lambda line: print(line, flush=True))
    demo.command = command or _command(directory, minutes, seed)
    return demo.run()


def run_name(trial: str, contender: str) -> str:
    """The directory of a run under runs/: letters, digits and hyphens."""
    return "-".join([trial, *re.findall(r"[a-z0-9]+", contender.lower())])


class _Demo:
    """One session of a demo. What must survive it stands in plan.json and in the run directories."""

    def __init__(
        self, directory: Path, minutes: float, seed: int, workers: int, contexts: tuple[int, ...], corpus: str
    ) -> None:
        self.directory, self.minutes, self.seed, self.workers = directory, minutes, seed, workers
        self.contexts, self.corpus = contexts, corpus
        self.say: Callable[[str], None] = print
        self.command = ""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.began = time.monotonic()
        asked = {"minutes": minutes, "seed": seed, "contexts": list(contexts), "corpus": corpus}
        self.plan: dict[str, Any] = _read(directory / "plan.json") or {
            "asked": asked, "started": datetime.now(UTC).isoformat(timespec="seconds"), "elapsed_s": 0.0,
            "per_step": {}, "steps": {}, "runs": {}, "decode": {},
        }  # fmt: skip
        if self.plan["asked"] != asked:
            raise ValueError(
                f"{directory} holds a demo that was asked for {self.plan['asked']}, not {asked}. Continue it with the "
                "same arguments, or choose another directory."
            )
        self.before = self.plan["elapsed_s"]
        self.slowness: list[float] = []
        self.decode_limit = max(2.0, minutes * 60 * _DECODE_SHARE)

    # -- the session -------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        with Pool(self.workers, self.directory / "logs") as self.pool:
            try:
                self._queue(self._probes())
                self._queue(self._jobs())
            finally:
                self._write()
        return self._write()

    def left(self) -> float:
        """Seconds until the time is up; a continued demo gets a fifth of the time at least."""
        spent = time.monotonic() - self.began
        return max(self.minutes * 60 - self.before, self.minutes * 12) - spent

    def _queue(self, jobs: Any) -> None:
        self.pool.run(lambda: next(jobs, None), self._done)

    def _probes(self) -> Any:
        names = [c.name for c in CONTENDERS if c.name not in self.plan["per_step"]]
        jobs: list[Job] = [
            {"kind": "probe", "contender": n, "trials": [t.key for t in TRIALS if self._takes_part(t, n)]}
            for n in names
        ]
        if any(not self._finished("text", c.name) for c in CONTENDERS):
            jobs.append({"kind": "prepare", "contender": "", "corpus": self.corpus})
        for job in jobs:
            yield job | {"seed": self.seed, "limit": max(60.0, self.minutes * 15)}

    def _jobs(self) -> Any:
        """Decoding first, whose time is known, so that it is never what is cut short; then the trials in order.

        The steps of a trial are fixed when its first job is taken, with what is known by then.
        """
        for contender in CONTENDERS:
            if not (self.plan["decode"].get(contender.name) or {}).get("points"):
                yield {
                    "kind": "decode", "trial": "text", "contender": contender.name, "contexts": list(self.contexts),
                    "seed": self.seed, "time_limit": self.decode_limit, "expected": self.decode_limit / 6,
                    "limit": self.decode_limit + 30.0,
                }  # fmt: skip
        for index, test in enumerate(TRIALS):
            if test.key not in self.plan["steps"]:
                self.plan["steps"][test.key] = self._allot(index)
                self._save()
            steps = self.plan["steps"][test.key]
            costs = self._per_step(test)
            for name in sorted(costs, key=lambda n: -costs[n]):
                if self._finished(test.key, name):
                    continue
                expected = self._besides(test) + steps * costs[name]
                # Far beyond the plan only where the machine is suddenly busy with something else.
                time_limit = 3.0 * expected + 5.0
                yield {
                    "kind": "train", "trial": test.key, "contender": name, "steps": steps, "seed": self.seed,
                    "corpus": self.corpus, "directory": str(self.directory / "runs" / run_name(test.key, name)),
                    "command": self.command, "expected": expected, "time_limit": time_limit,
                    "evaluate": min(1.0, self.minutes / 2),
                    "limit": time_limit + 30.0,
                }  # fmt: skip

    def _allot(self, index: int) -> int:
        rest = TRIALS[index:]
        open_ = [t for t in rest if t.key not in self.plan["steps"]]
        needs = {
            t.key: Need(t.weight, per_step, self._besides(t), t.most, t.enough)
            for t in open_ if (per_step := self._per_step(t))
        }  # fmt: skip
        if TRIALS[index].key not in needs:
            return 1  # No architecture could be built; each of its runs will say why.
        # A tenth is kept back: a machine that gets busier while a trial runs cannot be asked to hurry.
        return allot(0.9 * self.left(), self.workers, needs, busy=self.pool.remaining())[TRIALS[index].key]

    def _per_step(self, test: Trial) -> dict[str, float]:
        """Measured seconds per step, corrected by how much slower real runs were than their estimate."""
        factor = statistics.median(self.slowness) if self.slowness else 1.0
        found = {}
        for contender in test.contenders():
            measured = self.plan["per_step"].get(contender.name, {}).get(test.key)
            known = [p[test.key] for p in self.plan["per_step"].values() if test.key in p]
            # One that could not be measured is queued all the same: its run then says what is wrong.
            found[contender.name] = (measured or (statistics.mean(known) if known else 0.05)) * factor
        return found

    def _besides(self, test: Trial) -> float:
        return _BESIDES[test.key] * min(1.0, 0.2 + self.minutes / 2)

    def _takes_part(self, test: Trial, name: str) -> bool:
        return any(c.name == name for c in test.contenders())

    def _finished(self, key: str, name: str) -> bool:
        result = _read(self.directory / "runs" / run_name(key, name) / "result.json")
        return bool(result) and result["status"] == "finished"

    def _done(self, job: Job, outcome: Outcome) -> None:
        kind, name, error = job["kind"], job["contender"], outcome.get("error")
        if kind == "probe" and not error:
            self.plan["per_step"][name] = outcome["per_step"]
        elif kind == "decode":
            self.plan["decode"][name] = outcome
        elif kind == "train":
            self.plan["runs"][f"{job['trial']}/{name}"] = {"error": error}
            if not error:
                seconds = outcome["result"]["elapsed_s"]
                self.slowness.append(max(0.25, seconds / max(job["expected"] - 0.5, 1e-3)))
        self.say(_line(job, outcome, self.left()))
        self._save()
        self._write()

    def _save(self) -> None:
        self.plan["elapsed_s"] = round(self.before + time.monotonic() - self.began, 2)
        _store(self.directory / "plan.json", self.plan)

    # -- the record --------------------------------------------------------------------------------------------------

    def _write(self) -> dict[str, Any]:
        self._save()
        demo = {
            "schema": SCHEMA, "kind": "demo", "command": self.command, "minutes": self.minutes, "seed": self.seed,
            "started": self.plan["started"], "elapsed_s": self.plan["elapsed_s"], "environment": self._environment(),
            "architectures": [c.describe() for c in CONTENDERS],
            "tasks": [self._trial(t) for t in TRIALS],
            "decode": self._decode(),
        }  # fmt: skip
        _store(self.directory / "demo.json", demo)
        return json.loads(json.dumps(demo))  # what a reader of the file gets: lists, never tuples

    def _trial(self, test: Trial) -> dict[str, Any]:
        out: dict[str, Any] = {
            "key": test.key, "title": test.title, "about": test.about, "paper": test.paper,
            "difficulty": test.difficulty, "unit": test.unit, "trained": test.trained,
            "setup": test.setup(self.plan["steps"].get(test.key, 0)), "left_out": test.left_out(),
            "expected": test.expected, "runs": [self._run(test, c.name) for c in test.contenders()],
        }  # fmt: skip
        if test.task is not None:
            # Guessing among the answers: six elements, or the values, which are half of the vocabulary.
            out["chance"] = 1 / test.vocab if test.key == "s3" else 2 / test.vocab
        else:
            out["corpus"] = self.corpus
        return out

    def _run(self, test: Trial, name: str) -> dict[str, Any]:
        directory = Path("runs") / run_name(test.key, name)
        result = _read(self.directory / directory / "result.json")
        row: dict[str, Any] = {"architecture": name, "directory": str(directory), "seed": self.seed}
        error = (self.plan["runs"].get(f"{test.key}/{name}") or {}).get("error")
        if result is None or error:
            return row | {"status": "failed", "reason": error or "it was not started before the demo ended"}
        if result["status"] != "finished":
            return row | {"status": "failed", "reason": result.get("reason") or result["status"]}
        row |= {
            "status": "done", "recipe_id": result["recipe_id"], "params": result["params"],
            "flops_per_token": result["flops_per_token"], "steps": result["step"], "tokens": result["tokens"],
            "tokens_per_s": result["tokens_per_s"], "seconds": result["elapsed_s"],
        }  # fmt: skip
        if result["step"] < result["steps"]:
            row["note"] = f"stopped at step {result['step']} of {result['steps']}: {result.get('reason')}"
        contender = next(c for c in CONTENDERS if c.name == name)
        cost = test.recipe(contender).cost()
        if test.task is None:
            row["state_bytes"] = cost.state_bytes(test.length)
            return row | {"validation_bits_per_byte": result["validation"].get("bits_per_byte")}
        row["points"] = []
        for setting in test.settings:
            length, at = (setting, setting) if isinstance(setting, int) else setting
            score = result["validation"].get(f"{'x'.join(map(str, _listed(setting)))}/token_accuracy")
            if score is not None:
                point = {"at": at, "length": length, "accuracy": score, "state_bytes": cost.state_bytes(length)}
                row["points"].append(point)
        if row["points"]:
            row["state_bytes"] = row["points"][-1]["state_bytes"]
        return row

    def _decode(self) -> dict[str, Any]:
        runs = []
        for contender in CONTENDERS:
            outcome = self.plan["decode"].get(contender.name)
            row: dict[str, Any] = {"architecture": contender.name, "status": "done"}
            if outcome is None or outcome.get("error"):
                reason = (outcome or {}).get("error") or "it was not measured before the demo ended"
                runs.append(row | {"status": "failed", "reason": reason})
            else:
                runs.append(row | {"points": outcome["points"]})
        text = next(t for t in TRIALS if t.task is None)
        return {
            "about": "The models of the text test with random weights, one sequence on one thread: what must be kept, "
            "and how long one more token takes, once so many tokens have been read.",
            "setup": {"layers": text.setup(0)["layers"], "width": text.width, "sequences": 1, "numbers": "float32"},
            "runs": runs,
        }

    def _environment(self) -> dict[str, Any]:
        found: dict[str, Any] = {"python": platform.python_version()}
        for package in ("postformer", "torch"):
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                found[package] = None
        return {k: v for k, v in found.items() if v} | {
            "platform": platform.system() + " " + platform.machine(), "cores": os.cpu_count(),
            "processes": self.workers, "threads": 1,
        }  # fmt: skip


def _command(directory: str | Path, minutes: float, seed: int) -> str:
    import shlex

    words = ["postformer", "demo", "--minutes", f"{minutes:g}", "--seed", str(seed), "--out", str(directory)]
    return shlex.join(words)


def _line(job: Job, outcome: Outcome, left: float) -> str:
    what = " ".join(filter(None, [job["kind"], job.get("trial", ""), job["contender"]]))
    if outcome.get("error"):
        return f"{what}: FAILED, {outcome['error']}"
    if job["kind"] == "train":
        result = outcome["result"]
        scores = [f"{n.removesuffix('/token_accuracy')} {v:.3f}" for n, v in result["validation"].items()
                  if n.endswith("/token_accuracy")]  # fmt: skip
        scores += [f"{v:.3f} bits per byte" for n, v in result["validation"].items() if n == "bits_per_byte"]
        what += f": {result['step']} steps in {result['elapsed_s']:.1f} s; {', '.join(scores)}"
    return f"{what} ({max(left, 0):.0f} s left)"


def _listed(setting: Any) -> Sequence[int]:
    return setting if isinstance(setting, (tuple, list)) else (setting,)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        print(f"{path} cannot be read and is made again", file=sys.stderr)
        return None


def _store(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False))
