"""Timing sides by turns, on a fixed number of threads, with the machine's own rates measured in the same rounds."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from postformer.study.bench.config import BenchConfig

Side = Callable[[], float]
"""Does its work once and returns the seconds it took."""
GEMM, COPY = 1024, 1 << 24
"""Rows of the square product, and numbers that are copied."""


@contextmanager
def threads(number: int) -> Iterator[None]:
    """So many threads for PyTorch and for compiled kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def clocked(work: Callable[[], Any], device: str) -> Side:
    """The work as a side, waiting for the device before and after."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def side() -> float:
        wait()
        start = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - start

    return side


def by_turns(sides: Mapping[str, Side], rounds: int, seconds: float) -> dict[str, list[float]]:
    """The times of every side, one after another in every round, after one run that does not count.

    A side stops after `seconds` of its own; one whose first run takes longer than that is not run again.
    """
    first = {name: side() for name, side in sides.items()}
    times: dict[str, list[float]] = {name: [took] if took > seconds else [] for name, took in first.items()}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, side in sides.items():
                if sum(times[name]) < seconds:
                    times[name].append(side())
    finally:
        gc.enable()
    return times


def summary(times: list[float]) -> dict[str, Any]:
    """Seconds: the minimum (noise only ever adds), the median, and how many runs they are of."""
    return {"min": min(times), "median": statistics.median(times), "rounds": len(times)}


class Machine:
    """What this machine can do: the best rate of a matrix product and of a copy seen so far, per number of threads."""

    def __init__(self, config: BenchConfig) -> None:
        self.device, self.dtype = config.device, getattr(torch, config.dtype)
        self.best: dict[int, dict[str, float]] = {}
        a, b = (torch.randn(GEMM, GEMM, device=self.device).to(self.dtype) for _ in range(2))
        source = torch.ones(COPY, device=self.device)
        target = torch.empty_like(source)
        self._sides = {"gemm": clocked(lambda: a @ b, self.device), "copy": clocked(lambda: target.copy_(source),
                                                                                    self.device)}

    def measure(self, sides: Mapping[str, Side], rounds: int, seconds: float) -> dict[str, list[float]]:
        """`by_turns`, the machine's own work among the sides."""
        found = by_turns({**sides, **{f" {name}": side for name, side in self._sides.items()}}, rounds, seconds)
        best = self.best.setdefault(torch.get_num_threads(), {})
        for name in self._sides:
            best[name] = min(*found.pop(f" {name}"), best.get(name, float("inf")))
        return found

    def rates(self, number: int) -> dict[str, float]:
        """FLOP/s of a matrix product and bytes/s, read and written, of a copy."""
        best = self.best[number]
        return {"gemm_flops_per_s": 2 * GEMM**3 / best["gemm"], "copy_bytes_per_s": 2 * 4 * COPY / best["copy"]}

    def floor(self, number: int, multiply_adds: float, moved: float = 0.0) -> dict[str, Any]:
        """Seconds that the work takes at least, by these rates."""
        rates = self.rates(number)
        arithmetic = 2 * multiply_adds / rates["gemm_flops_per_s"]
        traffic = moved / rates["copy_bytes_per_s"]
        return {"multiply_adds": multiply_adds, "bytes": moved, "arithmetic": arithmetic, "traffic": traffic,
                "seconds": max(arithmetic, traffic)}
