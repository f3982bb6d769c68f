"""What can stop a training run: each error says what happened, what to do, and the exit code of the command line."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """A run stopped. `message` says what happened, `remedy` what to do about it, `exit_code` what a command returns."""

    exit_code = 2
    """What has no class of its own here is wrong input: a directory that holds no run, data that has changed, ..."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(f"{message}\n{remedy}")
        self.message = message
        self.remedy = remedy


class RunExists(TrainingError):
    """The directory already holds a run."""

    exit_code = 2


class RunLocked(RunExists):
    """Another process trains in the run's directory right now."""


class Diverged(TrainingError):
    """The loss or its gradient is no longer a finite number."""

    exit_code = 3


class OutOfMemory(TrainingError):
    """The step does not fit into memory."""

    exit_code = 4


class DiskFull(TrainingError):
    """A checkpoint or a record could not be written for lack of space."""

    exit_code = 5


class CheckpointError(TrainingError):
    """A checkpoint is missing, truncated, altered, or of another model."""

    exit_code = 6


class Interrupted(TrainingError):
    """Stopped by Ctrl-C or by a termination signal, after saving."""

    exit_code = 130
