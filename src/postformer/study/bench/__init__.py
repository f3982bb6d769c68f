"""A bench: our kernels, training steps and decoding against other people's code, in one process and by turns.

What a time means: the least of several rounds, in which all sides take turns, so that whatever else the machine does
hits all of them; the median stands beside it. Every side names the code that ran, and where ours is not what was asked
for the comparison fails rather than show a figure of something else. The floors are work over the rates of a 1024^3
matrix product and of a copy of 64 MiB, measured in the same rounds.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from postformer.kernels.native import native
from postformer.study.bench import decoding, kernels, models, peers
from postformer.study.bench.check import compare, keep, last, ratios
from postformer.study.bench.clock import Machine, threads
from postformer.study.bench.config import PARTS, BenchConfig, configured
from postformer.study.results import environment, now

__all__ = ["PARTS", "BenchConfig", "compare", "configured", "keep", "last", "ratios", "run_bench"]

SCHEMA = 1


def run_bench(config: BenchConfig | None = None, parts: Sequence[str] = PARTS, *, command: str = "postformer bench",
              progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Measure and return everything that bench.json holds.

    parts: some of kernels, lengths, training, decoding. progress: is told what comes next.

    Returns a mapping with `schema`, `kind`, `title`, `command`, `started`, `ended`, `environment`, `config`, `threads`,
    `peers` (versions, or why they are absent), `rates` (by number of threads), one list of rows per part that was
    measured, and `failures` [{where, why}]: rows without figures. Times are in seconds.

    Raises ValueError for parts, cases or recipes that do not exist, or a GPU that is not there.
    """
    config, tell = config or configured(), progress or (lambda _: None)
    if unknown := set(parts) - set(PARTS):
        raise ValueError(f"no part {min(unknown)!r}; there are {', '.join(PARTS)}")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: PyTorch finds no GPU here; leave --device out to measure the CPU")
    started, machine = now(), Machine(config)
    counts = config.counts()
    found: dict[str, Any] = {
        "schema": SCHEMA, "kind": "bench", "title": "Bench", "command": command, "started": started, "ended": None,
        "environment": _environment(config), "config": config.model_dump(mode="json"), "threads": counts,
        "peers": peers.about(config.device)}
    work: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "kernels": lambda: kernels.measure(config, machine, tell), "lengths": lambda: models.lengths(config, tell),
        "training": lambda: models.training(config, machine, tell), "decoding": lambda: decoding.measure(config, tell)}
    with threads(counts[-1]), peers.quiet():
        for part in (p for p in PARTS if p in parts):
            found[part] = work[part]()
    for part in ("kernels", "training"):
        for row in found.get(part) or []:
            if "work" in row:  # at the end, when the best rates are known
                row["floor"] = machine.floor(row.get("threads", counts[-1]), **_moved(row.pop("work")))
                row["share"] = row["floor"]["seconds"] / row["sides"]["ours"]["min"]
    found["rates"] = {str(number): machine.rates(number) for number in sorted(machine.best)}
    found["failures"] = [{"where": f"{part}: {row.get('case') or row.get('recipe')}", "why": row["failed"]}
                         for part in PARTS for row in found.get(part) or [] if "failed" in row]
    return found | {"ended": now()}


def _moved(work: dict[str, float]) -> dict[str, float]:
    return {"multiply_adds": work["multiply_adds"], "moved": work["bytes"]}


def _environment(config: BenchConfig) -> dict[str, str]:
    """Of the study's own, what decides about speed."""
    found = environment()
    del found["threads per trial"]
    built = native()
    found |= {"processor": _processor(), "vectors": torch.backends.cpu.get_cpu_capability(),
              "compiled kernels": "yes" if built.library else f"none: {built.reason}", "dtype": config.dtype}
    if config.device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(0), "cuda": str(torch.version.cuda)}
    else:
        found["gpu"] = "not run; on a machine with one: postformer bench --device cuda"
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
                platform.processor() or platform.machine())
