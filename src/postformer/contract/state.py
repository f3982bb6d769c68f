"""Operations on states: pytrees of tensors (or None) whose leaves all have the batch on axis 0.

Containers are tuples, named tuples, lists and dicts. `Growing` is the one leaf type whose size depends on the context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

State = Any


class Growing(NamedTuple):
    """A list that grows with the context, e.g. keys: data [B, capacity, ...], length [B] int64 (entries in use)."""

    data: Tensor
    length: Tensor


def map_state(fn: Callable[..., Any], state: State, *others: State) -> State:
    """Apply fn to corresponding tensor leaves, keeping the containers."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        return fn(state, *others)
    if isinstance(state, dict):
        return {k: map_state(fn, v, *(o[k] for o in others)) for k, v in state.items()}
    if isinstance(state, (tuple, list)):
        parts = [map_state(fn, v, *(o[i] for o in others)) for i, v in enumerate(state)]
        return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
    raise TypeError(f"a state is made of tensors in tuples, lists and dicts, not {type(state).__name__}")


def leaves(state: State) -> list[Tensor]:
    """All tensor leaves, in a fixed order."""
    found: list[Tensor] = []
    map_state(found.append, state)
    return found


def _regrow(fn: Callable[[Any], Any], state: State) -> State:
    """Map over the tree with Growing lists kept whole."""
    if state is None or isinstance(state, (Tensor, Growing)):
        return fn(state)
    if isinstance(state, dict):
        return {k: _regrow(fn, v) for k, v in state.items()}
    parts = [_regrow(fn, v) for v in state]
    return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)


def select(state: State, rows: Tensor | Sequence[int]) -> State:
    """The state of some rows, in the given order (repeat a row to fork it)."""
    def pick(leaf: Tensor) -> Tensor:
        return leaf.index_select(0, torch.as_tensor(rows, dtype=torch.long, device=leaf.device))
    return map_state(pick, state)


def concat(states: Sequence[State]) -> State:
    """Join the rows of several states of one model; growing lists are padded to the largest capacity."""
    first = states[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.cat(list(states), 0)
    if isinstance(first, Growing):
        capacity = max(s.data.shape[1] for s in states)
        padded = [F.pad(s.data, (0, 0) * (s.data.ndim - 2) + (0, capacity - s.data.shape[1])) for s in states]
        return Growing(torch.cat(padded, 0), torch.cat([s.length for s in states], 0))
    if isinstance(first, dict):
        return {k: concat([s[k] for s in states]) for k in first}
    parts = [concat([s[i] for s in states]) for i in range(len(first))]
    return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)


def reserve(state: State, tokens: int) -> State:
    """The state with room for that many more tokens in every growing list; a list is made at least twice as large."""
    def widen(part: Any) -> Any:
        if not isinstance(part, Growing):
            return part
        capacity = part.data.shape[1]
        needed = tokens + (int(part.length.max()) if part.length.numel() else 0)
        if needed <= capacity:
            return part
        more = max(needed, 2 * capacity) - capacity
        return part._replace(data=F.pad(part.data, (0, 0) * (part.data.ndim - 2) + (0, more)))
    return _regrow(widen, state)


def growing(state: State) -> list[Growing]:
    """The growing lists of a state."""
    found: list[Growing] = []
    _regrow(lambda part: found.append(part) if isinstance(part, Growing) else None, state)
    return found


def assign(state: State, rows: Sequence[int], new: State) -> None:
    """Write `new`, the state of as many rows, over these rows of `state`, in place.

    Raises ValueError where a growing list has not the room for what the new one holds (see `reserve`).
    """
    if state is None:
        return
    if isinstance(state, Growing):
        used = int(new.length.max())
        if used > state.data.shape[1]:
            raise ValueError(f"a list of {used} entries does not fit a capacity of {state.data.shape[1]}; reserve room")
        state.data[list(rows), :used] = new.data[:, :used].to(state.data.dtype)
        state.length[list(rows)] = new.length
    elif isinstance(state, Tensor):
        state[list(rows)] = new.to(state.dtype)
    elif isinstance(state, dict):
        for key, part in state.items():
            assign(part, rows, new[key])
    else:
        for part, other in zip(state, new):
            assign(part, rows, other)


def where(rows: Tensor, new: State, old: State) -> State:
    """Row by row: new where rows [B] bool is set, else old. Both of the same structure and sizes."""
    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(rows.view(-1, *(1,) * (b.ndim - 1)), a.to(b.dtype), b)
    return map_state(pick, new, old)


def size(state: State) -> int:
    """Bytes of the state for its whole batch; of growing lists the part in use by the longest row."""
    total = 0

    def add(leaf: Any) -> Any:
        nonlocal total
        if isinstance(leaf, Growing):
            used = int(leaf.length.max()) if leaf.length.numel() else 0
            total += leaf.data[:, :used].numel() * leaf.data.element_size() + leaf.length.numel() * 8
        elif leaf is not None:
            total += leaf.numel() * leaf.element_size()
        return leaf

    _regrow(add, state)
    return total


def local_of(state: State, other: State) -> State:
    """The state with `other`'s fields called `local` (of named tuples, at any depth): where `traits.taps`, what a
    convolution or a shift has seen of neighbouring tokens. Both of the same structure."""
    if isinstance(state, dict):
        return {k: local_of(v, other[k]) for k, v in state.items()}
    if not isinstance(state, (tuple, list)):
        return state
    names = getattr(state, "_fields", ("",) * len(state))
    parts = [b if name == "local" else local_of(a, b) for name, a, b in zip(names, state, other)]
    return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)


def detach(state: State) -> State:
    """The same values without gradient history."""
    return map_state(Tensor.detach, state)


def flatten(state: State, prefix: str = "state") -> dict[str, Tensor]:
    """Leaves by path, for saving with safetensors; `unflatten` needs a state of the same structure.

    No two of them share memory, as leaves of a state may.
    """
    flat: dict[str, Tensor] = {}
    taken: set[int] = set()
    for i, leaf in enumerate(leaves(state)):
        leaf = leaf.detach().contiguous()
        own = leaf.untyped_storage().data_ptr()
        flat[f"{prefix}.{i}"] = leaf.clone() if own in taken else leaf
        taken.add(own)
    return flat


def unflatten(tensors: dict[str, Tensor], like: State, prefix: str = "state") -> State:
    """Inverse of `flatten`: the saved leaves in the structure of `like` (sizes may differ in batch and capacity).

    They are copied: a file's tensors lie at any address, and matrix products round by how memory is aligned.
    """
    remaining = iter(range(len(leaves(like))))
    return map_state(lambda _: tensors[f"{prefix}.{next(remaining)}"].clone(), like)


def mismatch(new: State, old: State, batch: int) -> str | None:
    """Why `new` cannot follow `old` as the state of `batch` rows: containers, shapes, batch axis. None: it can."""
    if isinstance(old, Tensor) or isinstance(new, Tensor):
        if not (isinstance(old, Tensor) and isinstance(new, Tensor)):
            return f"{type(new).__name__} after {type(old).__name__}"
        if new.ndim < 1 or new.shape[0] != batch:
            return f"a leaf of shape {tuple(new.shape)} has not the batch ({batch}) on axis 0; make it [batch, ...]"
        return None if new.shape == old.shape else f"a leaf of shape {tuple(new.shape)} after {tuple(old.shape)}"
    if old is None or new is None:
        return None if old is new else f"{type(new).__name__} after {type(old).__name__}"
    if not isinstance(new, (tuple, list, dict)):
        return (f"a leaf is {type(new).__name__}; a state is made of tensors (a counter is "
                "torch.zeros(batch, dtype=torch.long))")
    if isinstance(new, dict) and isinstance(old, dict) and list(new) != list(old):
        return f"keys {', '.join(map(repr, new))} after {', '.join(map(repr, old))}"
    if type(new) is not type(old) or len(new) != len(old):
        return f"{type(new).__name__} of {len(new)} after {type(old).__name__} of {len(old)}"
    pairs = [(new[k], old.get(k)) for k in new] if isinstance(new, dict) else list(zip(new, old))
    return next((found for a, b in pairs if (found := mismatch(a, b, batch))), None)
