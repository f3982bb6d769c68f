"""Which form of a kernel runs: one setting for all kernels, local to a thread or task.

`with use(backend="reference"):` makes every kernel called with `backend="auto"` run token by token, and
`with use(decay_scale=60.0):` multiplies the log-decays given to `gdr` and `selective_scan`, and `with
use(rounding=False):` takes the rounding out of quantised maps. All exist for checking: the first gives the answers to
compare with, the second drives gates to where careless formulas overflow, the third makes outputs continuous.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import native as compiled

BACKENDS = ("auto", "reference", "parallel", "native")


@dataclass(frozen=True)
class Settings:
    """What is in force: `backend` for kernels called with "auto", the factor on log-decays, whether maps round."""

    backend: str = "auto"
    decay_scale: float = 1.0
    rounding: bool = True
    borrows: bool = True
    """Whether "auto" may run kernels of other packages, where they are installed and faster"""


DEFAULT = Settings()
_current: ContextVar[Settings] = ContextVar("postformer_kernel_settings", default=DEFAULT)


@torch.compiler.assume_constant_result
def current() -> Settings:
    """The settings in force here; inside `torch.compile`, those in force when the code was compiled."""
    return _current.get()


@contextmanager
def use(*, backend: str | None = None, decay_scale: float | None = None,
        rounding: bool | None = None, borrows: bool | None = None) -> Iterator[Settings]:
    """Change settings inside a `with` block; what is not named stays as it was.

    backend: "auto" (the fastest for the shape), "reference" (token by token), "parallel" (PyTorch operations) or
    "native" (compiled; where a kernel has none, "auto"). It decides only for kernels called with
    `backend="auto"`; a backend named in the call wins. decay_scale: factor >= 0 on the log-decays given to `gdr` and
    `selective_scan`. rounding: False lets ternary maps and integer activations keep what they would round. borrows:
    False leaves other packages' kernels out of "auto". Raises ValueError for any other backend or a negative factor.
    """
    if backend is not None:
        check_backend(backend)
    if decay_scale is not None and not decay_scale >= 0:
        raise ValueError(f"decay_scale={decay_scale} would make decays grow; give a factor >= 0")
    old = _current.get()
    new = replace(
        old,
        backend=old.backend if backend is None else backend,
        decay_scale=old.decay_scale if decay_scale is None else float(decay_scale),
        rounding=old.rounding if rounding is None else rounding,
        borrows=old.borrows if borrows is None else borrows,
    )
    token = _current.set(new)
    try:
        yield new
    finally:
        _current.reset(token)


def recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a gradient of what is computed from these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def check_backend(backend: str) -> None:
    """Raise ValueError for a backend that no kernel has."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} does not exist; use one of {', '.join(map(repr, BACKENDS))}")


def native(backend: str, x: Tensor, kernel: str) -> bool:
    """Whether a kernel that has compiled code runs it, for a backend as `choose` gives it.

    Raises RuntimeError where it was asked for by name and there is none for this tensor.
    """
    if backend not in ("auto", "native"):
        return False
    if compiled.available(x):
        return True
    if backend == "native":
        why = compiled.native().reason if compiled.native().library is None else f"not for {x.dtype} on {x.device}"
        raise RuntimeError(f"{kernel}: no compiled code: {why}")
    return False


def choose(backend: str) -> str:
    """The backend to run: the call's own unless it is "auto", then the one in force (which may be "auto")."""
    if backend == "auto":
        return current().backend
    check_backend(backend)
    return backend
