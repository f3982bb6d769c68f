"""Batch: tokens, what is asked at each of them, and the context of the call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from postformer.contract.context import Context

IGNORE = -100
"""Target of a position that is not scored."""

TOKEN_FIELDS = ("position", "valid", "boundary", "tick", "write")


class Batch(NamedTuple):
    """tokens [B, T] int64; targets [B, T] int64 aligned with the positions (`IGNORE`: not scored); ctx or None."""

    tokens: Tensor
    targets: Tensor
    ctx: Context | None = None

    @classmethod
    def of(cls, batch: Batch | tuple[Any, ...]) -> Batch:
        """A batch of (tokens, targets) or (tokens, targets, ctx), checked.

        Raises ValueError if the shapes differ or a tensor does not hold integers.
        """
        found = batch if isinstance(batch, Batch) else cls(*batch)
        if found.tokens.ndim != 2 or found.tokens.shape != found.targets.shape:
            raise ValueError(
                f"tokens {tuple(found.tokens.shape)} and targets {tuple(found.targets.shape)} must both be "
                "[batch, length]: give one target per position, -100 where nothing is asked"
            )
        if found.tokens.is_floating_point() or found.targets.is_floating_point():
            raise ValueError("tokens and targets are token ids: convert them to int64")
        return found

    @classmethod
    def windows(cls, windows: Tensor) -> Batch:
        """windows [B, T + 1] of consecutive tokens -> T tokens, each with its successor as target."""
        windows = windows.long()
        return cls(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())

    @property
    def scored(self) -> int:
        """Number of scored positions."""
        return int((self.targets != IGNORE).sum())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(self.tokens.to(device), self.targets.to(device), _map(self.ctx, lambda t: t.to(device)))

    def split(self, parts: int) -> Iterator[Batch]:
        """At most `parts` batches of consecutive rows, as equal as possible."""
        for rows in torch.arange(self.tokens.shape[0]).tensor_split(parts):
            if len(rows):
                start, stop = int(rows[0]), int(rows[-1]) + 1
                ctx = _map(self.ctx, lambda t, a=start, b=stop: t[a:b])
                yield Batch(self.tokens[start:stop], self.targets[start:stop], ctx)


def _map(ctx: Context | None, fn) -> Context | None:
    if ctx is None:
        return None
    fields = {name: fn(value) for name in TOKEN_FIELDS if (value := getattr(ctx, name)) is not None}
    return ctx.replace(**fields, inputs={name: fn(value) for name, value in ctx.inputs.items()})
