"""Where the tokens of a call stand in the chunks of a deep memory: rows of slots, each within one chunk.

A chunk ends with its document, or when `chunk` tokens have taken part in it, however they are cut into calls. A token
that does not exist has no slot; one that only reads has one but does not count. What a row holds of its chunk is free:
the recurrences are linear inside a chunk, so its rows compose exactly, and empty slots are identities.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Grid(NamedTuple):
    rows: int
    slots: int
    index: Tensor | None
    """[B, rows * slots] int64, the token of each slot (T: empty); None: the tokens in order, empty slots at the end"""
    place: Tensor | None
    """[B, T] int64, the slot of each token (0 where it has none)"""
    exists: Tensor | None
    """[B, T] bool"""
    fresh: Tensor | None
    """[B, rows] bool: a document starts before this row"""
    full: Tensor
    """[B, rows] bool: the chunk ends after this row"""
    ended: Tensor | None
    """[B] bool: a document starts after the last token that exists"""
    phase: Tensor
    """[B] int64: tokens that the last chunk has taken after the call"""
    some_fresh: list[bool]
    some_full: list[bool]
    all_full: list[bool]

    def lay(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [B, H, T, ...] -> one [B, H, slots, ...] per row, zero in empty slots."""
        length, total = x.shape[2], self.rows * self.slots
        if self.index is None:
            if total > length:
                x = F.pad(x, (0, 0) * (x.ndim - 3) + (0, total - length))
        else:
            x = F.pad(x, (0, 0) * (x.ndim - 3) + (0, 1))
            index = self.index.view(x.shape[0], 1, total, *(1,) * (x.ndim - 3))
            x = x.gather(2, index.expand(-1, x.shape[1], -1, *x.shape[3:]))
        return x.unflatten(2, (self.rows, self.slots)).unbind(2)

    def collect(self, rows: list[Tensor], length: int) -> Tensor:
        """One [B, H, slots, d] per row -> [B, H, T, d], zero where no token exists."""
        x = rows[0] if len(rows) == 1 else torch.cat(rows, 2)
        if self.place is None or self.exists is None:
            return x[:, :, :length]
        index = self.place[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return x.gather(2, index).masked_fill(~self.exists[:, None, :, None], 0)


def grid(
    length: int, chunk: int, phase: Tensor, reset: Tensor | None, valid: Tensor | None, taking: Tensor | None,
    begins: bool = False,
) -> Grid:
    """Lay out `length` tokens.

    Args:
        phase: [B] int64, tokens that the chunk of the state has taken.
        reset: [B, T] bool, before which tokens a document starts.
        valid: [B, T] bool, which tokens exist.
        taking: [B, T] bool, which existing tokens take part in learning; the others only read. None: all.
        begins: phase is known to be zero.
    """
    B, device = phase.shape[0], phase.device
    slots = min(chunk, length)
    if reset is None and valid is None and taking is None and (begins or not bool(phase.any())):
        rows = -(-length // slots)
        ends = [length >= (n + 1) * chunk for n in range(rows)]
        full = torch.tensor(ends, device=device).expand(B, rows)
        after = torch.full_like(phase, length % chunk)
        return Grid(rows, slots, None, None, None, None, full, None, after, [False] * rows, ends, ends)

    exists = torch.ones(B, length, dtype=torch.bool, device=device) if valid is None else valid
    taken = exists if taking is None else exists & taking
    document = torch.zeros_like(exists, dtype=torch.long) if reset is None else reset.long().cumsum(1)
    before = taken.long().cumsum(1) - taken.long()
    base = torch.zeros_like(before) if reset is None else before.masked_fill(~reset, 0).cummax(1).values
    position = before - base + torch.where(document == 0, phase[:, None], 0)

    key = torch.stack([document, position // chunk])
    moved = F.pad((key[:, :, 1:] != key[:, :, :-1]).any(0), (1, 0))
    seen = exists.long().cumsum(1) - exists.long()
    rank = seen - seen.masked_fill(~moved, 0).cummax(1).values
    opens = exists & (rank % slots == 0)
    row = opens.long().cumsum(1) - 1
    rows = max(int(row[:, -1].max()) + 1, 1)

    place = row * slots + rank % slots
    tokens = torch.arange(length, device=device).expand(B, -1)
    index = torch.full((B, rows * slots + 1), length, device=device)
    index = index.scatter(1, place.masked_fill(~exists, rows * slots), tokens)[:, :-1]
    last = taken & ((position + 1) % chunk == 0)
    full = torch.zeros(B, rows + 1, dtype=torch.bool, device=device)
    full = full.scatter(1, row.masked_fill(~last, rows), True)[:, :-1]
    held = torch.zeros(B, rows + 1, dtype=torch.long, device=device)
    held = held.scatter(1, row.masked_fill(~opens, rows), document)[:, :-1].cummax(1).values
    fresh = held != F.pad(held[:, :-1], (1, 0))
    after = (position[:, -1] + taken[:, -1].long()) % chunk
    flags = torch.stack([fresh.any(0), full.any(0), full.all(0)]).tolist()
    return Grid(rows, slots, index, place.masked_fill(~exists, 0), exists, fresh, full,
                document[:, -1] != held[:, -1], after, *flags)
