"""Memory: the peak of this process, and running out of it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from postformer.training.config import TrainConfig
from postformer.training.errors import OutOfMemory

PHRASES = ("not enough memory", "can't allocate memory", "cannot allocate memory", "out of memory")
BYTES_PER_PARAMETER = 16
"""float32: the weight, its gradient and the two moments of the optimiser."""


def reset_peak(device: torch.device) -> bool:
    """Start measuring the peak anew; False where that is not possible (a CPU without Linux's /proc)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory(device: torch.device) -> int:
    """Bytes: largest resident size of the process (CPU), largest allocation (CUDA); 0 where unknown.

    Since `reset_peak`, if that was possible, else since the start of the process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on the device; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, StopIteration, ValueError):
        # What the kernel could hand out, its file cache included; the free pages of sysconf leave that cache out.
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows; a system without these names
        return None


def check_memory(params: int, device: torch.device) -> None:
    """Raises OutOfMemory where weights, gradients and the optimiser alone cannot fit: before anything is allocated,
    because a system that overcommits would end the process without a word."""
    needed, there = params * BYTES_PER_PARAMETER, available_memory(device)
    if there is not None and needed > there:
        raise OutOfMemory(
            f"the design has {params:,} parameters: weights, gradients and optimiser take {needed / 2**30:,.1f} GiB, "
            f"and {there / 2**30:,.1f} GiB of memory are available ({device.type}).",
            "Take a smaller design (--width, --layers; `postformer explain` tells its parameters) or a machine with "
            "more memory.")


@contextlib.contextmanager
def out_of_memory(config: TrainConfig) -> Iterator[None]:
    """Turns every form of running out of memory into OutOfMemory, which names what would help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(
            phrase in str(error).lower() for phrase in PHRASES
        ):
            raise
        raise OutOfMemory(
            f"out of memory with batch_size {config.batch_size}, length {config.length}, accumulate "
            f"{config.accumulate}, {config.dtype}: {str(error).splitlines()[0] if str(error) else 'MemoryError'}",
            f"Try, in this order: {'; '.join(_remedies(config))}. Checkpoints written so far are intact.",
        ) from error


def _remedies(config: TrainConfig) -> list[str]:
    found = []
    if config.accumulate < config.batch_size:
        found.append(f"accumulate={min(config.batch_size, config.accumulate * 2)} (same result)")
    if not config.gradient_checkpointing:
        found.append("gradient_checkpointing=true (same result, slower)")
    if config.dtype == "float32":
        found.append("dtype=bfloat16")
    return [*found, "a smaller batch_size or length", "a smaller design"]
