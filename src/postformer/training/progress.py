"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere; always a log file."""

from __future__ import annotations

import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

PLAIN_SECONDS = 10.0
"""Plain lines come at most this often."""


class Progress:
    """mode "auto" (bar on a terminal, else lines), "bar", "plain" or "quiet". Writes to standard error, since standard
    output belongs to results; `log` gets timed lines in every mode."""

    def __init__(self, steps: int, step: int = 0, *, mode: str = "auto", log: Path | None = None,
                 stream: TextIO | None = None) -> None:
        self.steps, self.stream = steps, stream or sys.stderr
        terminal = getattr(self.stream, "isatty", lambda: False)()
        self.mode = ("bar" if terminal else "plain") if mode == "auto" else mode
        if self.mode not in ("bar", "plain", "quiet"):
            raise ValueError(f"progress must be auto, bar, plain or quiet, not {mode!r}")
        self.log: TextIO | None = open(log, "a", encoding="utf-8") if log else None  # noqa: SIM115
        self.shown = 0.0
        self.bar: Any = None
        if self.mode == "bar":
            self._start_bar(step)

    def _start_bar(self, step: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.bar = Bar(TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[values]}"),
                       TimeRemainingColumn(), console=Console(file=self.stream), refresh_per_second=4)
        self.task = self.bar.add_task("train", total=self.steps, completed=step, values="")
        self.bar.start()

    def update(self, line: dict[str, Any], seconds_left: float | None = None) -> None:
        """One step is done; `line` is its line of metrics.jsonl."""
        last = line["step"] >= self.steps
        now = time.monotonic()
        due = last or "validation_loss" in line or now - self.shown >= PLAIN_SECONDS
        if self.bar is not None:
            self.bar.update(self.task, completed=line["step"], values=describe(line))
        if due:
            self.shown = now
            left = "" if seconds_left is None or last else f", {duration(seconds_left)} left"
            text = f"step {line['step']}/{self.steps}: {describe(line)}{left}"
            self._log(text)
            self._print(text)

    def note(self, text: str, shown: bool = True) -> None:
        """A message outside the sequence of steps. shown False: for the log only."""
        self._log(text)
        if not shown:
            return
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False)
        else:
            self._print(text)

    def _print(self, text: str) -> None:
        if self.mode == "plain":
            try:
                print(text, file=self.stream, flush=True)
            except BrokenPipeError:  # whoever watched has gone, which is no reason to stop
                self.mode = "quiet"

    def _log(self, text: str) -> None:
        if self.log is not None:
            try:
                print(datetime.now().isoformat(timespec="seconds"), text, file=self.log, flush=True)
            except OSError:  # a full disk is reported by whoever writes what matters
                self.log = None

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
        if self.log is not None:
            self.log.close()
            self.log = None


def describe(line: dict[str, Any]) -> str:
    """The figures of one metrics line for a person."""
    parts = [f"loss {line['loss']:.4f}"]
    if "bits_per_byte" in line:
        parts.append(f"{line['bits_per_byte']:.3f} bits/byte")
    if "accuracy" in line:
        parts.append(f"accuracy {line['accuracy']:.3f}")
    shown = ("validation_bits_per_byte", "validation_token_accuracy", "validation_last_accuracy")
    parts += [f"{name.replace('_', ' ').replace('bits per byte', 'bits/byte')} {line[name]:.3f}"
              for name in shown if name in line]
    parts.append(f"{line['tokens_per_s']:,.0f} tokens/s")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
