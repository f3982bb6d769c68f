"""Recurrences that are affine in their state, written as any step function, run in blocks instead of token by token.

T tokens are cut into n blocks that stand side by side in the batch. From a zero state a block gives its offset b, from
basis states its transition A, so that the blocks' starts follow from one another, s_{j+1} = A_j s_j + b_j; from these
all blocks run once more, together. That is about 3 T / n + n steps instead of T. The backward pass runs the same way
backwards: the last run is repeated with gradients, and what a block's end must receive follows from the transposed A.

What a call returns is checked by the call itself: every block has to end where the next one was said to start, which
by induction makes the result that of the token-by-token run, whatever was believed about the step.

The form of A is not asked of anybody: see `affine.structure`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import Context, copy_context
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..sequential import _partly, _restart
from ..settings import recorded
from .plan import Group, Plan, flat, smooth

Tree = Any
Step = Callable[[Tensor, Any], tuple[Tensor, Any]]

TOLERANCE = {torch.float64: 1e-10, torch.complex128: 1e-10}
COARSE = 5e-5
"""How far the end of a block may lie from the next one's start, relative to the largest state of the row; COARSE for
every smaller float."""


class _Call(NamedTuple):
    """What does not change during one call."""

    step: Step
    rebuild: Callable[[Sequence[Tensor]], Tree]
    plan: Plan
    batch: int
    length: int
    block: int
    emit: int | None
    autocast: Callable[[], AbstractContextManager]
    context: Context

    @property
    def blocks(self) -> int:
        return -(-self.length // self.block)

    @property
    def last(self) -> int:
        """Tokens of the last block."""
        return self.length - (self.blocks - 1) * self.block

    def fold(self, x: Tensor | None) -> Tensor | None:
        """[B, T, ...] -> [C, n * B, ...]: the c-th tokens of all blocks, block by block, padded at the end."""
        if x is None:
            return None
        if missing := self.blocks * self.block - self.length:
            x = torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], 1)
        x = x.unflatten(1, (self.blocks, self.block))
        return x.permute(2, 1, 0, *range(3, x.ndim)).flatten(1, 2)


class _Tokens(NamedTuple):
    """The folded tokens [C, n * B, ...] and gates of one call, and the starts after a reset [n * B, ...]."""

    x: Tensor
    reset: Tensor | None
    write: Tensor | None
    initial: list[Tensor] | None

    def take(self, rows: int, times: int = 1) -> _Tokens:
        """The first rows, repeated."""
        cut = [None if v is None else v[:, :rows].repeat(1, times, *(1,) * (v.ndim - 2)) if times > 1 else v[:, :rows]
               for v in self[:3]]
        start = self.initial
        if start is not None:
            start = [v[:rows].repeat(times, *(1,) * (v.ndim - 1)) for v in start]
        return _Tokens(*cut, start)  # type: ignore[arg-type]


def _advance(call: _Call, tokens: _Tokens, c: int, state: list[Tensor], rows: int) -> tuple[Tensor, list[Tensor]]:
    """The c-th token of the first blocks (`rows` rows), as in `sequential`."""
    if tokens.reset is not None:
        initial = None if tokens.initial is None else [v[:rows] for v in tokens.initial]
        state = _restart(tokens.reset[c, :rows], state, initial)
    y, new = call.step(tokens.x[c, :rows], call.rebuild(state))
    new = flat(new)[0]
    return y, new if tokens.write is None else _partly(tokens.write[c, :rows], state, new)


def _ends(call: _Call, tokens: _Tokens, state: list[Tensor]) -> list[Tensor]:
    """Where full blocks end that start from `state` (rows on dim 0)."""
    rows = state[0].shape[0]
    for c in range(call.block):
        state = _advance(call, tokens, c, state, rows)[1]
    return state


class _Ran(NamedTuple):
    y: Tensor
    ends: list[Tensor]
    """[n * B, ...]: the last block's may be a shorter one"""
    emitted: list[Tensor]


def _run(call: _Call, tokens: _Tokens, state: list[Tensor]) -> _Ran:
    """All blocks from their starts [n * B, ...]."""
    n, B, full = call.blocks, call.batch, (call.blocks - 1) * call.batch
    ys: list[Tensor] = []
    finished: list[Tensor] = []
    times: list[int] = []
    seen: list[list[Tensor]] = []
    for c in range(call.block):
        if c == call.last:
            finished, state = [s[full:] for s in state], [s[:full] for s in state]
        rows = state[0].shape[0]
        if call.emit:
            here = [j for j in range(rows // B) if (j * call.block + c) % call.emit == 0]
            if here:
                times += [j * call.block + c for j in here]
                seen.append([s.unflatten(0, (-1, B))[here] for s in state])
        y, state = _advance(call, tokens, c, state, rows)
        ys.append(y)
    if finished:
        state = [torch.cat(pair) for pair in zip(state, finished)]
    head = torch.stack([y[:full] for y in ys], 1).unflatten(0, (n - 1, B)).transpose(0, 1).flatten(1, 2)
    tail = torch.stack([y[full:] for y in ys[: call.last]], 1)
    emitted: list[Tensor] = []
    if call.emit:
        order = sorted(range(len(times)), key=times.__getitem__)
        emitted = [torch.cat(leaf)[order].transpose(0, 1) for leaf in zip(*seen)]
    return _Ran(torch.cat([head, tail], 1), state, emitted)


def _scale(offset: Tensor, start: Tensor, batch: int) -> Tensor:
    """[B, 1, 1, 1]: a power of two about as large as a row's state, so that basis states do not drown in offsets."""
    size = torch.maximum(offset.abs().unflatten(0, (-1, batch)).amax((0, 2, 3, 4)), start.abs().amax((1, 2, 3)))
    size = torch.where(torch.isfinite(size) & (size > 0), size, torch.ones_like(size))
    return torch.exp2(size.log2().ceil().clamp(-60, 60)).view(-1, 1, 1, 1)


def _compose(A: Tensor, b: Tensor, s: Tensor) -> Tensor:
    """All starts [n, B, P, K, V] of s_{j+1} = A_j s_j + b_j from s [B, P, K, V]."""
    found = [s]
    for A_j, b_j in zip(A, b):
        found.append(b_j + (A_j * found[-1] if s.shape[2] == 1 else A_j @ found[-1]))
    return torch.stack(found)


def _starts(call: _Call, tokens: _Tokens, state: list[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
    """(starts of all blocks [n * B, ...] by leaf, transition [n - 1, B, P, K, K] by group or None where it is zero)."""
    B, n = call.batch, call.blocks
    rows = (n - 1) * B
    first = tokens.take(rows)
    starts = [torch.cat([s, s.new_zeros(rows, *s.shape[1:])]) for s in state]
    transitions: dict[Group, Tensor | None] = {}
    for level in range(call.plan.levels):
        groups = call.plan.at(level)
        begin = [s[:rows] for s in starts]
        for g in groups:
            for i in g.leaves:
                begin[i] = torch.zeros_like(begin[i])
        if level == 0 and all(g.zero for g in groups) and tokens.write is None:
            after = flat(call.step(first.x[-1], call.rebuild(begin))[1])[0]
            for g in groups:
                transitions[g] = None
                for i in g.leaves:
                    starts[i] = torch.cat([state[i], after[i].to(state[i].dtype)])
            continue
        offset = _ends(call, first, begin)
        runs = max(g.runs(state) for g in groups)
        basis = [s.repeat(runs, *(1,) * (s.ndim - 1)) for s in begin]
        scales: dict[Group, Tensor] = {}
        for g in groups:
            P, K, V = g.shape(state)
            eye = torch.eye(K, runs * V, dtype=state[g.leaves[0]].dtype, device=state[g.leaves[0]].device)
            if eye.dtype.is_floating_point or eye.dtype.is_complex:
                scales[g] = _scale(g.pack(offset), g.pack(state), B)
                eye = eye * scales[g].to(eye.dtype)[..., 0]
            else:
                eye = eye.expand(B, 1, K, runs * V)[:, 0]
            eye = eye.unflatten(2, (runs, V)).permute(2, 0, 1, 3)[:, None, :, None]  # [runs, 1, B, 1, K, V]
            packed = eye.expand(runs, n - 1, B, P, K, V).flatten(0, 2)
            for i, leaf in zip(g.leaves, g.unpack(packed, state)):
                basis[i] = leaf
        ended = _ends(call, tokens.take(rows, runs), basis)
        for g in groups:
            K = g.shape(state)[1]
            b = g.pack(offset)
            A = (g.pack(ended).unflatten(0, (runs, rows)) - b).permute(1, 2, 3, 0, 4).flatten(3)[..., :K]
            A, b = A.unflatten(0, (n - 1, B)), b.unflatten(0, (n - 1, B))
            if g in scales:
                A = A / scales[g].to(A.dtype)
            transitions[g] = A
            s = _compose(A, b, g.pack(state)).flatten(0, 1)
            for i, leaf in zip(g.leaves, g.unpack(s, state)):
                starts[i] = leaf
    return starts, [transitions[g] for g in call.plan.groups]


def _gap(call: _Call, starts: list[Tensor], ends: list[Tensor]) -> float:
    """How far blocks end from where the next ones started, in units of what is allowed; above 1 is too far."""
    worst = []
    for start, end in zip(starts, ends):
        missing = (end[: -call.batch] - start[call.batch :]).abs().unflatten(0, (-1, call.batch))
        missing = missing.flatten(2).amax((0, 2)) if missing.ndim > 2 else missing.amax(0)
        if not (start.dtype.is_floating_point or start.dtype.is_complex):
            worst.append((missing > 0).double().amax() * math.inf if missing.any() else torch.zeros(()))
            continue
        size = start.abs().unflatten(0, (-1, call.batch))
        size = size.flatten(2).amax((0, 2)) if size.ndim > 2 else size.amax(0)
        allowed = TOLERANCE.get(start.dtype, COARSE) * torch.maximum(size, 1e-6 * size.amax()).clamp_min(1e-30)
        worst.append((missing / allowed).amax())
    found = torch.stack([w.double().to(starts[0].device) for w in worst]).amax().item()
    return math.inf if math.isnan(found) else found


class _Backward(torch.autograd.Function):
    """Returns what was computed; its backward pass repeats the last run with gradients, all blocks side by side."""

    @staticmethod
    def forward(ctx: Any, call: _Call, ran: _Ran, kept: tuple, reset: Tensor | None, counts: tuple[int, int, int],
                x: Tensor, write: Tensor | None, *rest: Tensor) -> tuple[Tensor, ...]:
        leaves, initial, _ = counts
        ctx.call, ctx.counts = call, counts
        ctx.parameters = rest[leaves + initial :]
        ctx.versions = [p._version for p in ctx.parameters]
        starts, transitions = kept
        ctx.save_for_backward(x, write, reset, *rest[leaves : leaves + initial], *starts, *transitions)
        final = [s[-call.batch :].clone() for s in ran.ends]
        outs = (ran.y, *final, *ran.emitted)
        ctx.mark_non_differentiable(*(o for o in outs if not smooth(o)))
        return outs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # As it was when the call was made: settings of kernels, and what else the step reads from its context.
        return ctx.call.context.copy().run(_backward, ctx, grads)


def _backward(ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    call: _Call = ctx.call
    leaves, initials, _ = ctx.counts
    if ctx.versions != [p._version for p in ctx.parameters]:
        raise RuntimeError("a parameter has been changed in place since the call whose gradient is wanted: call "
                           "backward before the optimiser's step")
    x, write, reset, *rest = ctx.saved_tensors
    initial, starts, transitions = rest[:initials], rest[initials : initials + leaves], rest[initials + leaves :]
    with torch.enable_grad(), call.autocast():
        x = x.detach().requires_grad_(ctx.needs_input_grad[5])
        write = None if write is None else write.detach().requires_grad_(ctx.needs_input_grad[6])
        initial = [v.detach().requires_grad_(smooth(v)) for v in initial]
        starts = [v.detach().requires_grad_(smooth(v)) for v in starts]
        rows = [v.repeat(call.blocks, *(1,) * (v.ndim - 1)) for v in initial] if initials else None
        tokens = _Tokens(call.fold(x), call.fold(reset), call.fold(write), rows)  # type: ignore[arg-type]
        ran = _run(call, tokens, starts)
    received = [torch.zeros_like(e) for e in ran.ends]
    for place, g in zip(received, grads[1 : 1 + leaves]):
        if g is not None and smooth(place):
            place[-call.batch :] = g

    def back(inputs: list[Tensor]) -> tuple[Tensor | None, ...]:
        pairs = [(o, g) for o, g in zip((ran.y, *ran.emitted, *ran.ends),
                                        (grads[0], *grads[1 + leaves :], *received))
                 if o.requires_grad and g is not None]
        if not pairs or not inputs:
            return (None,) * len(inputs)
        # Retained: the step may read what was made of parameters before the call, whose graph others use too.
        return torch.autograd.grad([o for o, _ in pairs], inputs, [g.to(o.dtype) for o, g in pairs],
                                   retain_graph=True, allow_unused=True)

    past: list[Tensor | None] = [None] * leaves
    for level in reversed(range(call.plan.levels)):
        own = [i for g in call.plan.at(level) for i in g.leaves if starts[i].requires_grad]
        direct = dict(zip(own, back([starts[i] for i in own])))
        for g, A in zip(call.plan.groups, transitions):
            if g.level != level or g.leaves[0] not in direct:
                continue
            each = [torch.zeros_like(starts[i]) if direct.get(i) is None else direct[i] for i in range(leaves)]
            total = _adjoint(g, A, each, starts, call.batch)
            for i, leaf in zip(g.leaves, total):
                received[i][: -call.batch] = leaf[call.batch :]
                past[i] = leaf[: call.batch]
    wanted = [v for v in (x, write, *initial, *ctx.parameters) if v is not None and v.requires_grad]
    found = {id(v): g for v, g in zip(wanted, back(wanted))}
    mine = [None if v is None else found.get(id(v)) for v in (x, write)]
    return (None, None, None, None, None, *mine, *past, *(found.get(id(v)) for v in initial),
            *(found.get(id(v)) for v in ctx.parameters))


def _adjoint(g: Group, A: Tensor | None, direct: list[Any], like: list[Tensor], batch: int) -> list[Tensor]:
    """Gradients of a group's starts [n * B, ...] by leaf, from what they receive inside their own block."""
    c = g.pack(direct)
    if A is None:
        return g.unpack(c, like)
    c = c.unflatten(0, (-1, batch))
    found = [c[-1]]
    for A_j, c_j in zip(A.flip(0), c[:-1].flip(0)):
        found.append(c_j + (A_j.conj() * found[-1] if c.shape[3] == 1 else A_j.mH @ found[-1]))
    return g.unpack(torch.stack(found[::-1]).flatten(0, 1), like)


def _autocast(device: str) -> Callable[[], AbstractContextManager]:
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled)


def in_blocks(
    step: Step,
    plan: Plan,
    x: Tensor,
    state: Tree,
    *,
    parameters: Sequence[Tensor] = (),
    block: int | None = None,
    reset: Tensor | None = None,
    initial: Tree = None,
    write: Tensor | None = None,
    emit: int | None = None,
) -> tuple[Any, float]:
    """Run step(x_t, state) -> (y_t, state) over T tokens in blocks, as `plan` says.

    Args:
        step, x, state, reset, initial, write, emit: as `sequential` takes them; x and y are tensors, [B, T, ...].
            The step must treat rows separately and draw no random numbers.
        plan: from `affine.structure.recognise`.
        parameters: every tensor outside the arguments that the step reads and that a gradient shall reach.
        block: tokens per block; changes speed, not results.

    Returns:
        (what `sequential` returns, gap): gap is how far any block's end lay from the next one's start, in units of what
        rounding explains. Above 1 the step is not what the plan says (or the values are not finite), and what is
        returned is None.

    Gradients are first-order. The backward pass keeps the states at block starts and repeats one run over the tokens.
    """
    leaves, rebuild = flat(state)
    B, T = x.shape[:2]
    block = min(T, block or tokens_per_block(T))
    call = _Call(step, rebuild, plan, B, T, block, emit, _autocast(x.device.type), copy_context())
    if call.blocks < 2:
        raise ValueError(f"in_blocks: {T} tokens are one block of {block}; give a smaller block or use `sequential`")
    begin = None if initial is None else flat(initial)[0]
    if begin is not None:
        begin = [v.to(s.dtype).expand(B, *s.shape[1:]) for v, s in zip(begin, leaves)]
    with torch.no_grad():
        rows = None if begin is None else [v.repeat(call.blocks, *(1,) * (v.ndim - 1)) for v in begin]
        tokens = _Tokens(call.fold(x), call.fold(reset), call.fold(write), rows)  # type: ignore[arg-type]
        starts, transitions = _starts(call, tokens, leaves)
        ran = _run(call, tokens, starts)
        gap = _gap(call, starts, ran.ends)
    if not gap <= 1:
        return None, gap
    given = [*leaves, *(begin or ()), *parameters]
    if recorded(x, write, *given):
        counts = (len(leaves), len(begin or ()), len(parameters))
        y, *outs = _Backward.apply(call, ran, (starts, transitions), reset, counts, x, write, *given)  # type: ignore[misc]
    else:
        y, outs = ran.y, [*(s[-B:] for s in ran.ends), *ran.emitted]
    after = rebuild(outs[: len(leaves)])
    return ((y, after) if emit is None else (y, after, rebuild(outs[len(leaves) :]))), gap


def tokens_per_block(T: int) -> int:
    """A block's step costs many operations and a start one: blocks are shorter than sqrt(T)."""
    return max(2, round(math.sqrt(T) / 2))
