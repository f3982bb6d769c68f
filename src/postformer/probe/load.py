"""How evenly experts are used: the share of each in what was chosen, per mixture (2408.15664)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Load(NamedTuple):
    """Of one mixture of experts."""

    share: Tensor
    """[experts], summing to 1"""
    max_violation: Tensor
    """Largest share over the mean one, minus 1; 0 is even (MaxVio of 2408.15664)"""
    min_share: Tensor
    """Smallest share; 0: an expert that nothing chose"""


def load(model: Any, batch: tuple[Any, ...]) -> dict[str, Load]:
    """Place in the stack, "LAYER.SUBLAYER", -> Load of every mixture over the batch's valid tokens, in float64.

    batch: (tokens [B, T], targets, context or None) as objectives take it, of which the targets are not used; what
    follows the tokens may be left out. Raises ValueError if the model measures no load.
    """
    tokens, ctx = batch[0], batch[2] if len(batch) > 2 else None
    with torch.no_grad():
        measured = model(tokens, None, ctx).measured
    counts = {name.removesuffix(".load"): value for name, value in measured.items() if name.endswith(".load")}
    if not counts:
        raise ValueError("this model has no mixture of experts; give one whose design has a mixer of kind moe")
    return {place: even(count) for place, count in counts.items()}


def even(counts: Tensor) -> Load:
    """counts [experts] of what was chosen, of one batch or the sum of several."""
    share = counts.double() / counts.sum().clamp_min(1)
    return Load(share, share.max() * len(share) - 1, share.min())
