"""The training loop. Knows neither designs nor corpora: a model, an objective, `batch_at(step)`, and where to save.

Everything random at step s comes from generators seeded by (seed, s), so a run resumed at any checkpoint computes the
same bits as one that was never stopped (on a CPU with the same number of threads).
"""

from __future__ import annotations

import contextlib
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from postformer.objective import Batch
from postformer.training import checkpoint
from postformer.training.config import TrainConfig
from postformer.training.errors import CheckpointError, Diverged, Interrupted, TrainingError
from postformer.training.memory import out_of_memory, peak_memory, reset_peak
from postformer.training.metrics import MetricsFile
from postformer.training.optimise import Optimisers, decay_schedule, schedule
from postformer.training.progress import Progress

CHECKPOINT_SECONDS = 600.0
"""Between checkpoints, where the configuration does not say. When a checkpoint is written changes no result."""


class Objective(Protocol):
    """See `postformer.objective`."""

    def weight(self, batch: Any) -> int: ...
    def loss(
        self, model: nn.Module, batch: Any, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Any]]: ...


@dataclass
class Position:
    """How far a run is; saved with each checkpoint."""

    step: int = 0
    """Finished optimiser steps."""
    tokens: int = 0
    """Tokens seen."""
    elapsed: float = 0.0
    """Seconds of training, evaluation and saving included, over all sessions."""
    validation: dict[str, float] = field(default_factory=dict)
    """The newest evaluation."""
    solved: bool = False
    """Whether the run ended because validation was good enough: resumed, it does not go on."""


@dataclass(frozen=True)
class Outcome:
    """How a session ended: `stopped` is "finished", "solved" or "time limit"."""

    position: Position
    stopped: str
    tokens_per_s: float
    """Median over the steps."""
    peak_memory: int
    """Bytes: of the process on a CPU, of the allocator on a GPU."""


def seed_of(seed: int, step: int) -> int:
    """Seed of all random numbers of one step."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)


class Trainer:
    """One run of one model.

    `batch_at(step)` -> Batch; must depend on its argument only. `evaluate(model, final)` -> metrics, written with the
    prefix `validation_`. `directory`: of metrics.jsonl, train.log and checkpoints/; None: nothing is written.
    `bytes_per_token` 1: tokens are bytes, and bits_per_byte is reported. `metadata`: strings for the weights files.
    `notes`: lines to print and log before the first step.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, batch_at: Callable[[int], Batch], config: TrainConfig, *,
        directory: Path | None = None, evaluate: Callable[[nn.Module, bool], dict[str, float]] | None = None,
        bytes_per_token: int | None = None, progress: str = "auto", metadata: Mapping[str, str] | None = None,
        identity: str = "", notes: Sequence[str] = (),
    ) -> None:
        self.model, self.objective, self.batch_at, self.config = model, objective, batch_at, config
        self.directory, self.evaluate, self.progress_mode = directory, evaluate, progress
        self.bytes_per_token, self.metadata, self.identity = bytes_per_token, dict(metadata or {}), identity
        self.notes, self.device = notes, next(model.parameters()).device
        self.steps = config.total_steps
        self.position = Position()
        self.optimisers = Optimisers(model, config.optimiser)
        self.last_norm: float | None = None
        self.signal: int | None = None
        self.metrics: MetricsFile | None = None
        self.speeds: list[float] = []
        if config.gradient_checkpointing:
            model.gradient_checkpointing = True  # type: ignore[assignment]

    @property
    def checkpoints(self) -> Path | None:
        """Where checkpoints are kept."""
        return None if self.directory is None else self.directory / "checkpoints"

    def restore(self) -> bool:
        """Continue from the newest checkpoint; False if there is none (the run then starts at step 0).

        Raises CheckpointError if it is truncated, altered or of another model.
        """
        found = checkpoint.steps(self.checkpoints) if self.checkpoints else []
        if not found:
            return False
        path = self.checkpoints / f"step-{found[-1]}"  # type: ignore[operator]
        optimiser, state = checkpoint.load(path, self.model)
        if state.get("identity", self.identity) != self.identity:
            raise CheckpointError(f"{path} belongs to another run.", "Resume it in its own run directory.")
        try:
            self.optimisers.load_state(optimiser)
        except KeyError as error:
            raise CheckpointError(f"{path / checkpoint.TRAIN} does not fit this model: {error.args[0]}.",
                                  "Resume with the design and the optimiser the run was started with.") from error
        self.position = Position(**{name: state[name] for name in ("step", "tokens", "elapsed", "validation")},
                                 solved=state.get("solved", False))
        return True

    def train(self) -> Outcome:
        """Run the remaining steps.

        Raises Diverged, OutOfMemory, DiskFull, CheckpointError, or Interrupted (after saving).
        """
        config, began, offset = self.config, time.monotonic(), self.position.elapsed
        log = self.directory / "train.log" if self.directory else None
        self.metrics = MetricsFile(self.directory / "metrics.jsonl", self.position.step) if self.directory else None
        progress = self.progress = Progress(self.steps, self.position.step, mode=self.progress_mode, log=log)
        for note in self.notes:
            progress.note(note)
        speeds = self.speeds = self.metrics.speeds if self.metrics else []
        saved, saved_at = self.position.step or None, began
        stopped = "solved" if self.position.solved else "finished"
        threads = torch.get_num_threads()
        if config.threads:
            torch.set_num_threads(config.threads)
        reset_peak(self.device)
        try:
            with self._signals(), torch.random.fork_rng(devices=_gpus(self.device)):
                while self.position.step < self.steps and not self.position.solved:
                    before = time.monotonic()
                    line = self.advance(self.position.step)
                    now = time.monotonic()
                    line["tokens_per_s"] = round(line.pop("new_tokens") / max(now - before, 1e-9), 1)
                    step, limit = self.position.step, config.time_limit
                    late = limit is not None and now - began >= limit and step < self.steps
                    last = step == self.steps or late
                    if self.evaluate and (last or _due(step, config.evaluate_every)):
                        self.position.validation = self._evaluate(last)
                        if not last and self._solved():
                            last, stopped, self.position.solved = True, "solved", True
                            self.position.validation = self._evaluate(True)
                        line |= {f"validation_{name}": value for name, value in self.position.validation.items()}
                    self.position.elapsed = offset + time.monotonic() - began
                    line["elapsed_s"] = round(self.position.elapsed, 3)
                    if self.metrics:
                        self.metrics.append(line)
                    else:
                        speeds.append(line["tokens_per_s"])
                    left = (self.steps - step) * _per_step(speeds, line)
                    progress.update(line, left)
                    overdue = config.checkpoint_every is None and time.monotonic() - saved_at >= CHECKPOINT_SECONDS
                    if self.signal or last or overdue or _due(step, config.checkpoint_every):
                        self.save()
                        saved, saved_at = step, time.monotonic()
                    if self.signal and step < self.steps:
                        raise self._interrupted(saved)
                    if stopped == "solved":
                        progress.note(f"solved at step {step} of {self.steps}")
                        break
                    if late:
                        stopped = "time limit"
                        progress.note(f"time limit of {limit:g} s reached at step {step} of {self.steps}")
                        break
        except TrainingError as error:
            progress.note(f"{type(error).__name__}: {error}", shown=False)  # whoever catches the error shows it
            raise
        finally:
            torch.set_num_threads(threads)
            progress.close()
            if self.metrics:
                self.metrics.close()
        return Outcome(self.position, stopped, self.median_speed(), peak_memory(self.device))

    def _solved(self) -> bool:
        until = self.config.until
        return until is not None and self.position.validation.get("reached", -math.inf) >= until

    def median_speed(self) -> float:
        """Tokens per second, the median over all steps so far."""
        return statistics.median(self.speeds) if self.speeds else 0.0

    def save(self) -> None:
        """Write a checkpoint of the present position."""
        if self.metrics:
            self.metrics.sync()  # a checkpoint must never be ahead of its metrics
        if self.checkpoints:
            position = self.position
            checkpoint.save(
                self.checkpoints, position.step, self.model, self.optimisers.state(),
                {"tokens": position.tokens, "elapsed": position.elapsed, "validation": position.validation,
                 "solved": position.solved, "identity": self.identity}, self.metadata,
            )

    def advance(self, step: int) -> dict[str, Any]:
        """Optimiser step `step` (from 0) -> its line of metrics.jsonl, with `new_tokens` instead of times.

        Raises Diverged (nothing changed) or OutOfMemory.
        """
        config, model = self.config, self.model
        model.train()
        torch.manual_seed(seed_of(config.seed, step))
        generator = torch.Generator(self.device).manual_seed(seed_of(config.seed, step))
        whole = Batch.of(self.batch_at(step))
        count = max(self.objective.weight(whole), 1)
        sums: dict[str, Tensor] = {}
        measured: dict[str, Tensor] = {}
        with out_of_memory(config):
            for part in whole.split(config.accumulate):
                part = part.to(self.device)
                share = self.objective.weight(part) / count
                with self.autocast():
                    loss, metrics = self.objective.loss(model, part, generator)
                (loss * share).backward()
                metrics["total"] = loss.detach()
                for name, value in metrics.pop("measured", {}).items():
                    measured[name] = measured[name] + value if name in measured else value
                for name in metrics.keys() - {"tokens"}:
                    sums[name] = sums.get(name, 0.0) + metrics[name] * share  # type: ignore[assignment]
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf)
            values = {name: float(value) for name, value in sums.items()}
            multiple = schedule(step, self.steps, config.schedule)
            rate = config.optimiser.learning_rate * multiple
            self._check(step, values["total"], float(norm), rate)
            self.optimisers.step(multiple, decay_schedule(step, self.steps, config.schedule))
            if measured:
                model.after_step(measured)  # type: ignore[operator]
        self.last_norm = float(norm)
        self.position.step = step + 1
        self.position.tokens += whole.tokens.numel()
        line: dict[str, Any] = {"step": step + 1, "tokens": self.position.tokens, "loss": values["loss"]}
        if self.bytes_per_token:
            line["bits_per_byte"] = values["bits_per_token"] / self.bytes_per_token
        line |= {name: values[name] for name in ("accuracy", "auxiliary") if name in values}
        if loads := [value for name, value in measured.items() if name.endswith(".load")]:
            line["max_violation"] = max(float(load.max() / load.double().mean() - 1) for load in loads)
        if depths := [value / measured[f"{name.removesuffix('steps')}tokens"].clamp_min(1)
                      for name, value in measured.items() if name.endswith(".steps")]:
            line["depth"] = float(torch.stack([depth.double() for depth in depths]).mean())
        return line | {"lr": rate, "grad_norm": float(norm), "new_tokens": whole.tokens.numel()}

    def _check(self, step: int, loss: float, norm: float, rate: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        self.optimisers.zero_grad()
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm} (loss {loss:.4g})"
        before = "no step before it" if self.last_norm is None else f"last gradient norm {self.last_norm:.4g}"
        kept = checkpoint.steps(self.checkpoints) if self.checkpoints else []
        where = f"The last good checkpoint is {self.checkpoints / f'step-{kept[-1]}'}" if kept and self.checkpoints \
            else "There is no checkpoint yet"
        raise Diverged(
            f"step {step + 1}: {what}, at learning rate {rate:.4g}, {before}. The weights were not changed by this "
            f"step. {where}.",
            f"Start again with a smaller learning rate (try {self.config.optimiser.learning_rate / 3:.2g}), a longer "
            "warmup or a smaller clip; `postformer verify` shows whether the design itself stays finite.",
        )

    def _evaluate(self, final: bool) -> dict[str, float]:
        assert self.evaluate is not None
        self.model.eval()
        with torch.no_grad(), out_of_memory(self.config), self.autocast():
            values = self.evaluate(self.model, final)
        self.model.train()
        return {name: float(value) for name, value in values.items()}

    def autocast(self) -> torch.autocast:
        """bfloat16 activations if so configured."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16")

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the present step; a second Ctrl-C ends it at once."""
        self.signal = None
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def remember(number: int, frame: Any) -> None:
            self.signal = number
            signal.signal(signal.SIGINT, signal.default_int_handler)

        old = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _interrupted(self, saved: int | None) -> Interrupted:
        what = f"stopped at step {self.position.step} of {self.steps}"
        if self.directory is None:
            return Interrupted(f"{what}; nothing is saved: the run has no directory.", "Give the run a directory.")
        return Interrupted(
            f"{what}; saved as {self.directory / 'checkpoints' / f'step-{saved}'}.",
            f"Resume with: postformer train --resume {self.directory}  "
            f"(or postformer.training.resume({str(self.directory)!r})).",
        )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _per_step(speeds: list[float], line: dict[str, Any]) -> float:
    """Seconds of one step, from the recent ones."""
    tokens = line["tokens"] / line["step"]
    return tokens / max(statistics.median(speeds[-50:]), 1e-9)


def _gpus(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []
