"""What a check is: takes a subject in fp64, returns (value, tolerance, note); passes when value <= tolerance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from postformer.block.sublayer import Sublayer
from postformer.contract.context import LEVELS, Context
from postformer.contract.mixer import Traits
from postformer.verify.subject import Subject

Found = tuple[float, float, str]
EXACT, FP64, FP32 = 0.0, 1e-9, 1e-5


class Check(NamedTuple):
    name: str
    run: Callable[[Subject], Found]
    unless: Callable[[Traits], str | None]
    """A trait that makes the check meaningless -> why it is left out."""


CHECKS: list[Check] = []


def check(name: str, unless: Callable[[Traits], str | None] = lambda traits: None) -> Callable[[Any], Any]:
    def add(fn: Callable[[Subject], Found]) -> Callable[[Subject], Found]:
        CHECKS.append(Check(name, fn, unless))
        return fn
    return add


def not_causal(traits: Traits) -> str | None:
    return None if traits.causal else "the design is not causal"


def no_streaming(traits: Traits) -> str | None:
    return "the design cannot stream" if traits.streaming == "none" or not traits.causal else None


def no_gates(traits: Traits) -> str | None:
    return None if traits.soft_gates else "local mixing stands before a memory: read-only tokens would enter its taps"


def in_pieces(s: Subject, x: Tensor, sizes: list[int], ctx: Context | None = None) -> tuple[Tensor, Any]:
    ys, at, state = [], 0, None
    for size in sizes:
        out, state = s(x[:, at : at + size], state, None if ctx is None else ctx.narrow(at, at + size, x.shape[1]))
        ys.append(out.y)
        at += size
    return torch.cat(ys, 1), state


@contextmanager
def driven(s: Subject, gain: float) -> Iterator[None]:
    """What every mixer reads, times gain: norms before the mixers hide the size of the model's own input."""
    def louder(module: Any, args: Any, y: Any) -> Any:
        return y * gain

    hooks = [m.norm.register_forward_hook(louder) for m in s.model.modules() if isinstance(m, Sublayer)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def ends(s: Subject) -> tuple[int, int]:
    """(boundary level that ends the longest memory of the design, highest level that ends none of them)."""
    named = [getattr(m, "forget_at", None) for m in s.model.modules()]
    levels = [LEVELS[name] for name in named if isinstance(name, str)]
    levels.append(LEVELS["document"])  # positions
    return max(levels), min(levels) - 1


def packed_at(s: Subject, lengths: list[int], batch: int) -> Tensor:
    boundary = torch.zeros(batch, sum(lengths), dtype=torch.int8)
    at = 0
    for n in lengths[:-1]:
        at += n
        boundary[:, at] = ends(s)[0]
    return boundary
