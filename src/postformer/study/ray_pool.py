"""The same jobs as in `pool`, on the machines of a Ray cluster (https://docs.ray.io, extra `ray`).

RAY_ADDRESS names the cluster; without it, one is started on this machine. Each running job has a process and a core.
A job's directory is one of the machine it runs on; only its outcome comes back, so nothing needs to be shared.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from postformer.study.pool import Job, Outcome


class RayPool:
    """A context manager with the `run` of `Pool`; as many jobs at once as the cluster has cores."""

    def __init__(self, logs: Path) -> None:
        """Raises ValueError without Ray."""
        try:
            import ray
        except ImportError:
            raise ValueError("Ray is not installed; install it (pip install 'postformer[ray]'), or leave out "
                             "--workers ray") from None
        self.ray, self.logs = ray, logs
        self.mine = not ray.is_initialized()
        if self.mine:
            ray.init(logging_level=logging.WARNING, log_to_driver=False, include_dashboard=False)
        self.task = ray.remote(num_cpus=1, max_retries=0)(_work)

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *_: object) -> None:
        if self.mine:
            self.ray.shutdown()

    def run(self, take: Callable[[], Job | None], done: Callable[[Job, Outcome], None]) -> None:
        """See `Pool.run`."""
        running: dict[Any, tuple[Job, float]] = {}
        while True:
            cores = int(self.ray.cluster_resources().get("CPU", 1))
            while len(running) < cores and (job := take()) is not None:
                running[self.task.remote(job)] = job, time.monotonic() + job["limit"]
            if not running:
                return
            ready, _ = self.ray.wait(list(running), timeout=5.0)
            for reference in ready:
                job, _ = running.pop(reference)
                done(job, self._outcome(reference))
            for reference in [r for r, (_, deadline) in running.items() if time.monotonic() > deadline]:
                self.ray.cancel(reference, force=True)
                job, _ = running.pop(reference)
                done(job, {"error": f"stopped after {job['limit']:.0f} s, which was its limit"})

    def _outcome(self, reference: Any) -> Outcome:
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            with contextlib.suppress(Exception):
                self.logs.mkdir(parents=True, exist_ok=True)
                (self.logs / "ray.log").open("a", encoding="utf-8").write(f"{error}\n")
            return {"error": f"its process ended ({type(error).__name__}); see {self.logs.name}/ray.log"}


def _work(job: Job) -> Outcome:
    import torch

    from postformer.study.worker import answer

    torch.set_num_threads(1)
    return answer(job)
