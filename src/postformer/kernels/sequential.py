"""K5, recurrences that have no parallel form (or none yet): any step function, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

Tree = Any


def _map(fn: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """Apply fn to corresponding tensors of trees of tuples, named tuples, lists, dicts and None."""
    if tree is None:
        return None
    if isinstance(tree, Tensor):
        return fn(tree, *others)
    if isinstance(tree, dict):
        return {k: _map(fn, v, *(o[k] for o in others)) for k, v in tree.items()}
    if isinstance(tree, (tuple, list)):
        parts = [_map(fn, v, *(o[i] for o in others)) for i, v in enumerate(tree)]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    raise TypeError(f"sequential: made of tensors in tuples, lists and dicts, not {type(tree).__name__}")


def _column(x: Tensor, like: Tensor) -> Tensor:
    """[B] against the leaf's other dimensions."""
    return x.view(-1, *(1,) * (like.ndim - 1))


def _restart(rows: Tensor, state: Tree, initial: Tree) -> Tree:
    if initial is None:
        return _map(lambda s: s.masked_fill(_column(rows, s), 0), state)
    return _map(lambda s, i: torch.where(_column(rows, s), i.to(s.dtype), s), state, initial)


def _partly(write: Tensor, old: Tree, new: Tree) -> Tree:
    """old + write (new - old), with 0 and 1 taking one side alone: what is not taken may be NaN."""

    def mix(o: Tensor, n: Tensor) -> Tensor:
        w = _column(write, o)
        if not o.dtype.is_floating_point and not o.dtype.is_complex:
            return torch.where(w > 0, n, o)
        kept, taken = w == 0, w == 1
        n = torch.where(kept, o, n)
        o = torch.where(taken, n, o)
        return torch.where(kept, o, torch.where(taken, n, torch.lerp(o, n, w.to(o.dtype).expand_as(o))))

    return _map(mix, old, new)


def _stack(trees: list[Tree]) -> Tree:
    return _map(lambda *parts: torch.stack(parts, 1), *trees)


def _tokens(x: Tree) -> list[Tree]:
    """The tree of every token. All views at once: one by one, each costs the backward pass a tensor as large as x."""
    split: list[Sequence[Tensor]] = []
    _map(lambda leaf: split.append(leaf.unbind(1)), x)

    def tree(leaves: Iterator[Tensor]) -> Tree:
        return _map(lambda _: next(leaves), x)

    return [tree(iter(parts)) for parts in zip(*split)]


def sequential(
    step: Callable[[Any, Any], tuple[Any, Any]],
    x: Tree,
    state: Tree,
    *,
    reset: Tensor | None = None,
    initial: Tree = None,
    write: Tensor | None = None,
    checkpoint: int = 0,
    emit: int | None = None,
) -> Any:
    """Run step(x_t, state) -> (y_t, state) over T tokens.

    Args:
        step: takes x_t [B, ...] and the state; must not change its arguments in place.
        x: [B, T, ...], or tuples, lists, dicts of such tensors.
        state: tensors with the batch on dim 0 in tuples, named tuples, lists, dicts; or None.
        reset: [B, T] bool; before these tokens the state becomes `initial`.
        initial: like state, broadcastable to it; None is zero.
        write: [B, T] in [0, 1]; the state moves this part of the way to the step's new state: exactly not at all at 0,
            exactly there at 1 (whatever the side not taken holds). Integer leaves move where write > 0.
        checkpoint: n > 0 recomputes n steps at a time in the backward pass, keeping only every n-th state.
        emit: also return the state before tokens 0, emit, 2*emit, ... (before a reset at that token).

    Returns:
        (y, state), or (y, state, emitted) where emit is given: y's tensors are [B, T, ...], emitted's leaves
        [B, ceil(T / emit), ...].

    Raises:
        ValueError: no tokens, or reset / write of another shape. TypeError: a state that holds something else.
    """
    sizes: list[tuple[int, ...]] = []
    _map(lambda leaf: sizes.append(tuple(leaf.shape[:2])), x)
    if not sizes or len(sizes[0]) < 2 or sizes[0][1] < 1 or any(size != sizes[0] for size in sizes):
        raise ValueError(f"sequential: x has leading shapes {sizes}; give [B, T, ...] with T >= 1")
    for name, gate in (("reset", reset), ("write", write)):
        if gate is not None and gate.shape != sizes[0]:
            raise ValueError(f"sequential: {name} has shape {tuple(gate.shape)}; it must be {sizes[0]}")
    if checkpoint < 0 or (emit is not None and emit < 1):
        raise ValueError(f"sequential: checkpoint={checkpoint} and emit={emit}; give checkpoint >= 0, emit >= 1")
    T = sizes[0][1]

    def run(start: int, x: Tree, state: Tree, reset: Tensor | None, write: Tensor | None):
        out, emitted = [], []
        for t, x_t in enumerate(_tokens(x)):
            if emit is not None and (start + t) % emit == 0:
                emitted.append(state)
            if reset is not None:
                state = _restart(reset[:, t], state, initial)
            y, new = step(x_t, state)
            state = new if write is None else _partly(write[:, t], state, new)
            out.append(y)
        return _stack(out), state, emitted

    length = checkpoint or T
    outs, emitted = [], []
    for start in range(0, T, length):
        stop = min(start + length, T)
        args = (
            start, _map(lambda leaf, s=slice(start, stop): leaf[:, s], x), state,
            *(None if gate is None else gate[:, start:stop] for gate in (reset, write)),
        )
        if checkpoint and torch.is_grad_enabled():
            y, state, seen = recompute(run, *args, use_reentrant=False)  # type: ignore[misc]
        else:
            y, state, seen = run(*args)
        outs.append(y)
        emitted += seen
    y = outs[0] if len(outs) == 1 else _map(lambda *parts: torch.cat(parts, 1), *outs)
    return (y, state) if emit is None else (y, state, _stack(emitted))
