"""The lists of attention: the last `window` keys and values of a row (a ring), or all of them (`Growing`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from postformer.contract.context import Context
from postformer.contract.state import Growing
from postformer.kernels import attend


class Ring(NamedTuple):
    """The last `window` keys and values of a row: data [B, W, 2, Hk, d], position [B, W] (-1: empty), count [B]."""

    data: Tensor
    position: Tensor
    count: Tensor


def written(ctx: Context) -> Tensor | None:
    """[B, T] bool: which tokens enter the list; None: all."""
    write = None if ctx.write is None else ctx.write > 0
    if ctx.valid is None:
        return write
    return ctx.valid if write is None else ctx.valid & write


def taken(memory: Growing | Ring) -> Tensor:
    """[B] int64: tokens that have entered the list, those that a ring has lost included."""
    return memory.length if isinstance(memory, Growing) else memory.count


def tokens_seen(memory: Growing | Ring, segments: Tensor | None, ctx: Context, length: int) -> Tensor:
    """[B, T] int64: tokens of its document that each token may see, itself included where it is kept."""
    before = taken(memory)
    kept = written(ctx)
    new = torch.ones(len(before), length, dtype=torch.long, device=before.device) if kept is None else kept.long()
    total = new.cumsum(1)
    if segments is None:
        return before[:, None] + (total if ctx.causal else total[:, -1:].expand_as(total))
    earlier = (total - new).gather(1, torch.searchsorted(segments, segments))
    if not ctx.causal:
        total = total.gather(1, torch.searchsorted(segments, segments, right=True) - 1)
    return total - earlier + before[:, None] * (segments == 0)


def one_token(q: Tensor, new: Tensor, memory: Growing | Ring, position: Tensor) -> tuple[Tensor, Growing | Ring]:
    """q [B, Hq, d], new [B, 2, Hk, d], position [B, 1] -> (o [B, Hq, d], the list with the token in it, in place)."""
    o, data = attend(q, new, memory.data, taken(memory), float(q.shape[-1] ** -0.5))
    if isinstance(memory, Growing):
        return o, Growing(data, memory.length + 1)
    width = data.shape[1]
    here = torch.arange(width, device=q.device) == (memory.count % width)[:, None]
    return o, Ring(data, torch.where(here, position, memory.position), memory.count + 1)


def ring_token(q: Tensor, new: Tensor, memory: Ring, position: Tensor, keep: Tensor | None, always: Tensor | None
               ) -> tuple[Tensor, Ring]:
    """The same by operations that all can be recorded, for a token that may not enter the list (keep [B, 1] bool), or
    that also sees pairs without a place (always [2, Hk, n, d])."""
    width, slots = memory.data.shape[1], torch.arange(memory.data.shape[1], device=q.device)
    here = slots == (memory.count % width)[:, None]
    here = here if keep is None else here & keep
    data = torch.where(here[..., None, None, None], new[:, None].to(memory.data.dtype), memory.data)
    places = torch.where(here, position, memory.position)
    after = memory.count + (1 if keep is None else keep[:, 0].long())
    k, v = data.to(q.dtype).permute(2, 0, 3, 1, 4)
    seen = (places >= 0) & (places > position - width)
    if always is not None:
        k, v = (torch.cat([p.to(q.dtype).expand(len(q), -1, -1, -1), x], 2) for p, x in zip(always, (k, v)))
        seen = torch.cat([seen.new_ones(len(q), always.shape[2]), seen], 1)
    grouped = q.unflatten(1, (k.shape[1], -1)) * q.shape[-1] ** -0.5
    logits = (grouped @ k.mT).masked_fill(~seen[:, None, None], torch.finfo(q.dtype).min)
    o = (logits.softmax(-1) @ v).flatten(1, 2)
    return torch.where(seen.any(1)[:, None, None], o, 0), Ring(data, places, after)


def append(memory: Growing, new: Tensor, segments: Tensor | None, keep: Tensor | None, consume: bool) -> Growing:
    """The list after the tokens of `new` [B, T, ...] that are kept and belong to the last document."""
    batch, length = new.shape[:2]
    if segments is None and keep is None:
        if memory.data.shape[1] == 0:
            return Growing(new, memory.length + length)
        keep = torch.ones(batch, length, dtype=torch.bool, device=new.device)
        fresh = None
    else:
        keep = torch.ones(batch, length, dtype=torch.bool, device=new.device) if keep is None else keep
        fresh = None
        if segments is not None:
            keep = keep & (segments == segments[:, -1:])
            fresh = segments[:, -1] > 0
    start = memory.length if fresh is None else memory.length.masked_fill(fresh, 0)
    target = start[:, None] + keep.cumsum(1) - 1
    after = start + keep.sum(1)
    data, capacity = memory.data, memory.data.shape[1]
    needed = int(after.max())
    if needed > capacity:
        grown = needed if capacity == 0 else max(needed, 2 * capacity)
        wider = new.new_zeros(batch, grown, *new.shape[2:])
        wider[:, :capacity] = data
        data = wider
    elif not consume:
        data = data.clone()
    rows, columns = torch.nonzero(keep, as_tuple=True)
    return Growing(data.index_put((rows, target[rows, columns]), new[rows, columns].to(data.dtype))
                   if data.requires_grad or new.requires_grad
                   else data.index_put_((rows, target[rows, columns]), new[rows, columns].to(data.dtype)), after)


def rotate(memory: Ring, new: Tensor, position: Tensor, segments: Tensor | None, keep: Tensor | None,
           consume: bool) -> Ring:
    """The ring after the tokens of `new`: entry i of a row's life sits in slot i mod W."""
    batch, length = new.shape[:2]
    width = memory.data.shape[1]
    keep = torch.ones(batch, length, dtype=torch.bool, device=new.device) if keep is None else keep
    data, places, count = memory.data, memory.position, memory.count
    if not consume:
        data, places = data.clone(), places.clone()
    if segments is not None:
        keep = keep & (segments == segments[:, -1:])
        fresh = segments[:, -1] > 0
        places = places.masked_fill(fresh[:, None], -1)
        data = data.masked_fill(fresh[:, None, None, None, None], 0)
        count = count.masked_fill(fresh, 0)
    index = keep.cumsum(1) - 1
    total = keep.sum(1)
    keep = keep & (index >= (total - width)[:, None])
    slot = (count[:, None] + index) % width
    rows, columns = torch.nonzero(keep, as_tuple=True)
    where = (rows, slot[rows, columns])
    value = new[rows, columns].to(data.dtype)
    data = data.index_put(where, value) if data.requires_grad or value.requires_grad else data.index_put_(where, value)
    return Ring(data, places.index_put_(where, position[rows, columns]), count + total)
