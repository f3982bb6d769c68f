"""One worker process of a study: reads jobs from stdin, one JSON object a line, and answers each with one line."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import threading
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any


def main() -> None:
    """Serve jobs until stdin closes. Whatever a job prints goes to stderr; only answers go to stdout."""
    _die_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """What a job of any kind comes to; its error where it has none."""
    from postformer.training.errors import Interrupted

    try:
        return _JOBS[job["kind"]](job)
    except KeyboardInterrupt:
        raise
    except Interrupted:
        return {"error": "interrupted", "interrupted": True}
    except BaseException as error:  # noqa: BLE001, RUF100 - also what a run raises to say that it was interrupted
        traceback.print_exc()
        text = str(error).strip().splitlines()
        return {"error": f"{type(error).__name__}: {text[0]}" if text else type(error).__name__}


def _die_with_parent() -> None:
    """A runner that is killed must not leave trials running, which the next runner would start again beside them."""
    parent = os.getppid()
    if sys.platform == "linux":
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_trial(job: dict[str, Any]) -> dict[str, Any]:
    """One trial in its directory: {"result": result.json, "test": {setting: figures}}.

    The test split is read where the job has leave to, which `Ledger.open_test` gives.
    """
    from postformer.study.trial import Trial
    from postformer.training import RunLocked, evaluate_task, load_run, train_task

    sys.argv = shlex.split(job["command"])
    spec, directory = Trial.model_validate_json(job["trial"]), Path(job["directory"])
    entry, task = spec.entry, spec.entry.make()
    for _ in range(50):
        try:
            result = train_task(spec.made, entry.task, None, spec.config(), directory, options=entry.options,
                                progress="quiet", resume=True)
            break
        except RunLocked:  # by the worker of a runner that was just killed
            time.sleep(0.2)
    else:
        raise RuntimeError(f"another process trains in {directory}; end it, then run the study again")
    outcome: dict[str, Any] = {"result": result.model_dump(mode="json")}
    if job["test"]:
        model = load_run(directory)[1]
        outcome["test"] = evaluate_task(model, task, task.difficulties.evaluate, batch_size=entry.batch_size,
                                        batches=entry.test_batches, stream="test")
    found = [*result.validation.values(), *(v for s in outcome.get("test", {}).values() for v in s.values())]
    if not all(map(math.isfinite, found)):
        raise ValueError("its figures are not finite: the model's outputs are NaN or infinite")
    return outcome


def cost(job: dict[str, Any]) -> dict[str, Any]:
    """What decoding costs after each context: {"decode": [...]}, measured alone on one thread."""
    from postformer.design import load
    from postformer.study.decode import measure_decode

    return {"decode": measure_decode(load(job["recipe"]), job["contexts"], job["time_limit"])}


def probe(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds per step of one architecture in every trial, from a few real steps: {"per_step": {trial: seconds}}."""
    import torch

    from postformer.model import build
    from postformer.objective import Batch, NextToken
    from postformer.study.contenders import contender, trial
    from postformer.training import Trainer, task_source

    found = {}
    for key in job["trials"]:
        test, config = trial(key), train_config(key, steps=100, seed=job["seed"])
        recipe = test.recipe(contender(job["contender"]))
        if test.task is None:
            fixed = Batch.windows(torch.randint(256, (config.batch_size, config.length + 1)))
            batch_at = partial(_same, fixed)
        else:
            batch_at = task_source(test.task, None, config, dict(test.options)).batch_at
        trainer = Trainer(build(recipe.model, seed=job["seed"]), NextToken(), batch_at, config, progress="quiet")
        trainer.advance(0)
        trainer.advance(1)
        began, steps = time.perf_counter(), 0
        while steps < 4 or (time.perf_counter() - began < 0.4 and steps < 24):
            trainer.advance(2 + steps)
            steps += 1
        found[key] = (time.perf_counter() - began) / steps
    return {"per_step": found}


def _same(batch: Any, step: int) -> Any:
    return batch


def prepare(job: dict[str, Any]) -> dict[str, Any]:
    """Make the corpus ready, so that no run pays for it."""
    from postformer.data import load_corpus

    return {"bytes": int(load_corpus(job["corpus"]).train.size)}


def train(job: dict[str, Any]) -> dict[str, Any]:
    """One run in its directory, continued if it was interrupted; {"result": result.json}."""
    from postformer.data import load_corpus
    from postformer.study.contenders import contender, trial
    from postformer.training import train_language, train_task

    sys.argv = shlex.split(job["command"])  # What a run records as its command is the user's, not this process's.
    test, directory = trial(job["trial"]), Path(job["directory"])
    recipe = test.recipe(contender(job["contender"]))
    config = train_config(job["trial"], job["steps"], job["seed"], job["time_limit"], job["evaluate"])
    if test.task is None:
        corpus = load_corpus(job["corpus"])
        result = train_language(recipe, corpus, config, directory, progress="quiet", resume=True)
    else:
        options = dict(test.options)
        result = train_task(
            recipe, test.task, None, config, directory, options=options, progress="quiet", resume=True
        )
    return {"result": result.model_dump(mode="json")}


def decode(job: dict[str, Any]) -> dict[str, Any]:
    """What one more token costs after each context; {"points": [...]}."""
    from postformer.study.contenders import contender, trial
    from postformer.study.decode import measure_decode

    recipe = trial(job["trial"]).recipe(contender(job["contender"]))
    return {"points": measure_decode(recipe, job["contexts"], job["time_limit"], seed=job["seed"])}


def train_config(key: str, steps: int, seed: int, time_limit: float | None = None, evaluate: float = 1.0) -> Any:
    """The training configuration of a trial; `evaluate` scales how much is evaluated."""
    from postformer.study.contenders import trial
    from postformer.training import OptimiserConfig, ScheduleConfig, TrainConfig

    test = trial(key)
    return TrainConfig(
        steps=steps, batch_size=test.batch_size, length=test.length, seed=seed, threads=1, time_limit=time_limit,
        optimiser=OptimiserConfig(learning_rate=test.learning_rate), schedule=ScheduleConfig(warmup=0.04, final=0.05),
        evaluate_every=max(1, math.ceil(steps / 6)) if test.task is None else None, device="cpu",
        evaluate_batches=max(1, round(evaluate * (6 if test.task is None else 12))),
    )  # fmt: skip


_JOBS = {"probe": probe, "prepare": prepare, "train": train, "decode": decode, "trial": run_trial, "cost": cost}

if __name__ == "__main__":
    main()
