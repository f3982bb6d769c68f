"""A few worker processes that take jobs one by one, can be killed, and take nothing else down with them."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Outcome = dict[str, Any]


@dataclass
class _Worker:
    number: int
    process: subprocess.Popen[str]
    job: Job | None = None
    began: float = 0.0
    deadline: float = field(default=float("inf"))


class Pool:
    """Worker processes of one thread each: `python -m postformer.study.worker`, one JSON object a line each way.

    A job is a JSON-able dict with `limit`, the seconds after which it is killed. Use as a context manager: leaving it
    asks running jobs to save (SIGTERM) and then ends them.
    """

    def __init__(self, workers: int, logs: Path) -> None:
        self.logs = logs
        self.logs.mkdir(parents=True, exist_ok=True)
        self.workers = [_Worker(i, self._start(i)) for i in range(workers)]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            if worker.job is not None:
                self._signal(worker, signal.SIGTERM)
            if worker.process.stdin:
                with contextlib.suppress(OSError):
                    worker.process.stdin.close()
        for worker in self.workers:
            try:
                worker.process.wait(5 if worker.job is not None else 2)
            except subprocess.TimeoutExpired:
                self._signal(worker, signal.SIGKILL)
            self._close(worker)

    def remaining(self) -> list[float]:
        """Seconds that each busy worker's job is still expected to take, by the job's own `expected`."""
        now = time.monotonic()
        return [max(0.0, w.job.get("expected", 0.0) - (now - w.began)) for w in self.workers if w.job is not None]

    def run(self, take: Callable[[], Job | None], done: Callable[[Job, Outcome], None]) -> None:
        """Give out what `take` returns until it returns None and all workers are idle; it is asked again whenever a
        job ends, and every few seconds.

        `done(job, outcome)` is called for each: outcome is what the worker returned, or {"error": why}.
        """
        while True:
            for worker in self.workers:
                if worker.job is None and (job := take()) is not None:
                    self._give(worker, job)
            busy = [w for w in self.workers if w.job is not None]
            if not busy:
                return
            for worker in self._ready(busy):
                job, worker_job = worker.job, self._collect(worker)
                assert job is not None
                worker.job = None
                done(job, worker_job)

    def _ready(self, busy: list[_Worker]) -> list[_Worker]:
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]
            wait = max(0.0, min(w.deadline for w in busy) - time.monotonic())
            ready = [key.data for key, _ in selector.select(min(wait, 5.0))]
        now = time.monotonic()
        return ready + [w for w in busy if w not in ready and now >= w.deadline]

    def _give(self, worker: _Worker, job: Job) -> None:
        worker.job, worker.began = job, time.monotonic()
        worker.deadline = worker.began + job["limit"]
        try:
            worker.process.stdin.write(json.dumps(job) + "\n")  # type: ignore[union-attr]
            worker.process.stdin.flush()  # type: ignore[union-attr]
        except OSError:
            pass  # It died while idle; the closed pipe is found by _collect, which says so.

    def _collect(self, worker: _Worker) -> Outcome:
        assert worker.job is not None
        if time.monotonic() >= worker.deadline:
            self._restart(worker)
            return {"error": f"stopped after {worker.job['limit']:.0f} s, which was its limit"}
        line = worker.process.stdout.readline()  # type: ignore[union-attr]
        try:
            return json.loads(line)
        except ValueError:
            pass
        self._kill(worker)
        code = worker.process.wait()
        worker.process = self._start(worker.number)
        cause = f"signal {-code}" if code < 0 else f"exit code {code}"
        return {"error": f"its process ended ({cause}); see {self.logs.name}/worker-{worker.number}.log"}

    def _restart(self, worker: _Worker) -> None:
        self._kill(worker)
        worker.process = self._start(worker.number)

    def _start(self, number: int) -> subprocess.Popen[str]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with open(self.logs / f"worker-{number}.log", "a", encoding="utf-8") as log:
            # A session of its own: Ctrl-C reaches the parent only, which then lets the runs save themselves.
            return subprocess.Popen(
                [sys.executable, "-m", "postformer.study.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=log, text=True, encoding="utf-8", env=environment, start_new_session=True,
            )  # fmt: skip

    @staticmethod
    def _signal(worker: _Worker, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL and hasattr(os, "killpg"):
                os.killpg(worker.process.pid, number)  # with whatever it started itself
            else:
                worker.process.send_signal(number)

    def _kill(self, worker: _Worker) -> None:
        self._signal(worker, signal.SIGKILL)
        self._close(worker)

    @staticmethod
    def _close(worker: _Worker) -> None:
        worker.process.wait()
        for pipe in (worker.process.stdin, worker.process.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()
