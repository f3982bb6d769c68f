"""Writing files so that a crash at any moment leaves either the old or the new content."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from postformer.training.errors import DiskFull, RunLocked

FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG)


def fsync(path: Path) -> None:
    """Wait until a file, or the entries of a directory, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a file's content as one action, whoever else does so at the same time."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def space_needed(path: Path, what: str) -> Iterator[None]:
    """Turns a full disk into DiskFull; other errors pass."""
    try:
        yield
    except Exception as error:
        if not _is_full(error):
            raise
        try:
            free = f"{shutil.disk_usage(path if path.exists() else path.parent).free / 2**20:.1f} MiB free"
        except OSError:
            free = "free space unknown"
        raise DiskFull(
            f"no space left on the disk of {path} ({free}) while writing {what}; what was saved before is intact.",
            "Free some space, then resume the run: it continues at its last checkpoint.",
        ) from error


def _is_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    text = str(error).lower()  # safetensors wraps the error of the operating system into its own
    return "no space left" in text or "os error 28" in text or "quota exceeded" in text


class Lock:
    """One process per run directory: held until `release` or the end of the process, however it ends."""

    def __init__(self, directory: Path) -> None:
        self.file = None
        try:
            import fcntl
        except ImportError:  # no such locks on Windows
            return
        self.file = open(directory / ".lock", "a")  # noqa: SIM115
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.close()
            self.file = None
            raise RunLocked(
                f"{directory} is being trained by another process right now.",
                "Wait for it to end, or give this run another directory.",
            ) from None

    def release(self) -> None:
        """Let others train in this directory."""
        if self.file is not None:
            self.file.close()
            self.file = None
