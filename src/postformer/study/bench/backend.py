"""Which code a measurement ran, observed rather than assumed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from postformer.kernels import use
from postformer.kernels.native import native, watched


class _Operators(TorchDispatchMode):
    """Notes our operators for GPUs, which do not pass where compiled code for CPUs is called."""

    def __init__(self, seen: set[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("postformer.") and "triton" in name:
            self.seen.add(name.split(".")[1])
        return func(*args, **(kwargs or {}))


class Fallback(RuntimeError):
    """Something else ran than what was asked for; such a time is no measurement."""


def setting(backend: str) -> str:
    """What `kernels.use` is told: where compiled code is expected, what users get; that it ran is then observed."""
    return "auto" if backend == "native" else backend


def ours(work: Callable[[], Any], backend: str) -> Callable[[], Any]:
    """The work with our kernels on a backend, and no other package's."""
    def run() -> Any:
        with use(backend=setting(backend), borrows=False):
            return work()
    return run


def observe(work: Callable[[], Any], backend: str, *, compiled: bool = True) -> tuple[Any, str]:
    """(what the work returns, the backend that ran in words).

    compiled: whether there is compiled code for this, so that "native" must run some. Raises Fallback.
    """
    with watched() as seen, _Operators(seen):
        result = ours(work, backend)()
    if backend == "native" and compiled and not seen:
        why = "none of them ran" if native().library else f"there are none: {native().reason}"
        raise Fallback(f"compiled kernels were asked for, and {why}; -s backend=parallel measures PyTorch operations")
    if backend == "parallel" and seen:
        raise Fallback(f"PyTorch operations were asked for, and compiled code ran: {', '.join(sorted(seen))}")
    return result, f"compiled ({', '.join(sorted(seen))})" if seen else "PyTorch operations"
