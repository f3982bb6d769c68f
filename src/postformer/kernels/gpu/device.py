"""Whether Triton kernels may run: on a GPU, with Triton installed, and only what agrees there with PyTorch operations.

A kernel says how it is checked; each of its configurations is checked once in a process, on the device itself. What
fails, or cannot be built, falls back to PyTorch operations with one warning.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Hashable
from functools import cache

import torch
from torch import Tensor

CHECKS: dict[str, Callable[..., None]] = {}
"""kernel -> check(device, *configuration), which raises where the kernel is wrong."""


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
        warnings.warn(f"{kernel} runs as PyTorch operations on {device}: {why}", RuntimeWarning, stacklevel=3)
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
