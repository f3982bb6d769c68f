"""Whether Triton kernels may run: on a GPU, with Triton installed, and only what agrees there with PyTorch operations.

A kernel says how it is checked; each of its configurations is checked once in a process, on the device itself. What
fails, or cannot be built, falls back to PyTorch operations with one warning.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
import warnings
from collections.abc import Callable, Hashable
from functools import cache

import torch
from torch import Tensor

CHECKS: dict[str, Callable[..., None]] = {}
"""kernel -> check(device, *configuration), which raises where the kernel is wrong."""

INSTEAD = {"flash-linear-attention": "our own kernels run"}
"""kernel -> what happens where it is not trusted, if that is not PyTorch operations"""


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on any device, slowly: for checking them without a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def importable() -> str:
    """Why Triton cannot be used, or "" where it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        importlib.import_module("triton.language")
    except Exception as error:
        return f"Triton cannot be imported: {error}"
    return ""


@cache
def _why_not(kernel: str, device: torch.device, *configuration: Hashable) -> str:
    why = importable()
    if not why:
        try:
            with torch.enable_grad():
                CHECKS[kernel](device, *configuration)
        except Exception as error:  # of building, of running, or of what came out: none may stop a training run
            why = f"the self-test of {configuration} failed: {type(error).__name__}: {str(error)[:400]}"
    if why:
        instead = INSTEAD.get(kernel, "it runs as PyTorch operations")
        warnings.warn(f"{kernel} is not trusted on {device}, {instead}: {why}", RuntimeWarning, stacklevel=3)
    return why


@torch.compiler.assume_constant_result
def trusted(kernel: str, device: str, *configuration: Hashable) -> bool:
    """Whether this configuration of the kernel runs on the device and has been found to agree there."""
    return not _why_not(kernel, torch.device(device), *configuration)


def agree(found: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    """Raise ArithmeticError where the largest error exceeds tolerance times the largest value, or is no number."""
    error = (found.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    if not error <= tolerance * scale + 1e-30:
        raise ArithmeticError(f"{name} is off by {error:.2e} where values reach {scale:.2e}")


def seconds(work: Callable[[], object], device: str, repeats: int = 5) -> float:
    """The least time of some repetitions, after two that are not counted; infinity where the work fails."""
    try:
        found = []
        for _ in range(repeats + 2):
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            work()
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)
            found.append(time.perf_counter() - start)
    except Exception:  # out of memory, or sizes that a kernel does not take: it is not to be chosen
        return float("inf")
    return min(found[2:])
