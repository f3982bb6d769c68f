"""metrics.jsonl: one JSON object per step, each step once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TextIO

from postformer.training.files import space_needed, write_text


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines (the last line of a killed run may be cut short)."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


class MetricsFile:
    """Appends lines; opened at step n, it first drops what a killed run wrote after its checkpoint n.

    `last` is the newest line or None, `speeds` the tokens per second of every step.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        lines = [line for line in read(path) if line["step"] <= step]
        self.last: dict[str, Any] | None = lines[-1] if lines else None
        self.speeds: list[float] = [line["tokens_per_s"] for line in lines]
        with space_needed(path.parent, path.name):
            write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
            self.file: TextIO = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def append(self, line: dict[str, Any]) -> None:
        """Write one line; it survives the death of the process at once, that of the machine after `sync`."""
        with space_needed(self.path.parent, self.path.name):
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        self.last = line
        self.speeds.append(line["tokens_per_s"])

    def sync(self) -> None:
        """Wait until all lines are on the disk."""
        with space_needed(self.path.parent, self.path.name):
            os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()
