"""Checks that any split of the tokens, any company in the batch and any gates give the same."""

from __future__ import annotations

import math
from typing import Any

import torch

from postformer.contract import state as states
from postformer.contract.context import Context
from postformer.model.language import LMState
from postformer.verify.check import FP64, Found, check, driven, in_pieces, no_gates, no_streaming
from postformer.verify.compare import emitted_at, error, state_error, used
from postformer.verify.subject import Subject


@check("pieces = whole, outputs and state", no_streaming)
def pieces(s: Subject) -> Found:
    x = s.input(2, 70, 6)
    with torch.no_grad():
        out, after = s(x)
        worst = 0.0
        for sizes in ([1, 69], [33, 37], [17, 1, 1, 31, 20]):
            y, state = in_pieces(s, x, sizes)
            worst = max(worst, error(y, out.y), state_error(state, after))
        with driven(s, 30.0):
            out, after = s(x)
            y, state = in_pieces(s, x, [33, 37])
        worst = max(worst, error(y, out.y), state_error(state, after))
    return worst, FP64, ""


@check("pieces = whole and rows = each alone, where segments, documents and streams end", no_streaming)
def bounded(s: Subject) -> Found:
    x, generator = s.input(2, 17, 30), torch.Generator().manual_seed(31)
    boundary = torch.randint(1, 4, (2, 17), generator=generator, dtype=torch.int8)
    boundary = boundary * (torch.rand(2, 17, generator=generator) < 0.25)
    ctx = Context(boundary=boundary, valid=torch.rand(2, 17, generator=generator) < 0.8)
    with torch.no_grad():
        out, after = s(x, None, ctx)
        y, state = in_pieces(s, x, [1, 7, 9], ctx)
        worst = max(error(y, out.y), state_error(state, after))
        alone, state = s(x[1:], None, Context(boundary=boundary[1:], valid=ctx.valid[1:]))  # type: ignore[index]
        worst = max(worst, error(alone.y, out.y[1:]), state_error(state, states.select(after, [1])))
    return worst, FP64, ""


@check("prefill + single steps = whole; a state given away gives the same", no_streaming)
def steps(s: Subject) -> Found:
    x = s.input(2, 37, 7)
    with torch.no_grad():
        out, after = s(x)
        y, state = in_pieces(s, x, [21] + [1] * 16)
        worst = max(error(y, out.y), state_error(state, after))
        _, given = s(x[:, :21])
        touched = False
        for held in (given, s(x[:, 21:22], given)[1]):  # the second has room to spare in its lists
            kept = [leaf.clone() for leaf in states.leaves(held)]
            s(x[:, 22:23], held)
            s(x[:, 22:28], held)
            touched |= any(not torch.equal(a, b) for a, b in zip(kept, states.leaves(held)))
        ys = []
        for t in range(21, 37):
            step, given = s(x[:, t : t + 1], given, Context(consume=True))
            ys.append(step.y)
        worst = max(worst, error(torch.cat(ys, 1), out.y[:, 21:]))
    return math.inf if touched else worst, FP64, "a state that was not given away changed" if touched else ""


@check("emitted states = states of the prefixes, and blocks folded into the batch go on from them", no_streaming)
def emitted(s: Subject) -> Found:
    x, block = s.input(2, 37, 8), 9
    with torch.no_grad():
        _, start = s(s.input(2, 4, 24))
        out, _ = s(x, start, Context(emit=block))
        if out.emitted is None:
            return math.inf, FP64, "nothing was emitted"
        worst = error(out.y, s(x, start)[0].y)
        for i in range(5):
            state = s(x[:, : block * i], start)[1] if i else start
            worst = max(worst, state_error(emitted_at(out.emitted, i), state.stack))
        folded = states.map_state(lambda leaf: leaf[:, :4].flatten(0, 1), out.emitted)
        following = (start.next[:, None] + torch.arange(4) * block).flatten()
        y = s(x[:, :36].unflatten(1, (4, block)).flatten(0, 1), LMState(folded, following))[0].y
        worst = max(worst, error(y.unflatten(0, (2, 4)).flatten(1, 2), out.y[:, :36]))
    return worst, FP64, ""


@check("a row's company in the batch changes nothing")
def batch(s: Subject) -> Found:
    x = s.input(3, 37, 9)
    with torch.no_grad():
        y = s(x)[0].y
        alone = s(x[1:2])[0].y
        other = x.clone()
        other[0] = 50 * x[2]
        changed = s(other)[0].y
    return max(error(alone, y[1:2]), error(changed[1:], y[1:])), FP64, ""


@check("rows of different age in one batch = each alone", no_streaming)
def ages(s: Subject) -> Found:
    x = s.input(3, 40, 13)
    with torch.no_grad():
        parts = [s(x[i : i + 1, :n])[1] for i, n in enumerate((3, 25, 12))]
        joined = states.concat(parts)
        more = s.input(3, 9, 14)
        y, after = s(more, joined)
        worst = 0.0
        for i, part in enumerate(parts):
            alone, state = s(more[i : i + 1], part)
            worst = max(worst, error(y.y[i : i + 1], alone.y), state_error(states.select(after, [i]), state))
    return worst, FP64, ""


@check("read-only tokens leave the state; full gates change nothing; soft gates: pieces = whole", no_gates)
def gated(s: Subject) -> Found:
    x = s.input(2, 37, 19)
    gate = (torch.rand(2, 37, generator=torch.Generator().manual_seed(20)) > 0.3).double()
    gate[0, :2] = 0  # also before anything was written
    one = torch.ones(2, 37, dtype=torch.float64)
    with torch.no_grad():
        out, after = s(x)
        full, full_after = s(x, None, Context(tick=one, write=one))
        worst = max(error(full.y, out.y), state_error(full_after, after))
        position = torch.arange(37).expand(2, -1)
        _, after = s(x, None, Context(tick=gate, write=gate, position=position))
        for i in range(2):
            keep = gate[i] > 0
            _, state = s(x[i : i + 1, keep], None, Context(position=position[i : i + 1, keep]))
            worst = max(worst, memory_error(states.select(after.stack, [i]), state.stack))
        soft = torch.rand(2, 2, 37, generator=torch.Generator().manual_seed(25), dtype=torch.float64)
        ctx = Context(tick=soft[0], write=soft[1], position=position)
        whole, after = s(x, None, ctx)
        y, state = in_pieces(s, x, [17, 1, 19], ctx)
        worst = max(worst, error(y, whole.y), state_error(state, after))
    return worst, FP64, ""


def memory_error(a: Any, b: Any) -> float:
    """Difference of two states but for their position counters (a read-only token does advance those)."""
    left = [leaf for leaf in used(a) if leaf.dtype.is_floating_point or leaf.dtype.is_complex]
    right = [leaf for leaf in used(b) if leaf.dtype.is_floating_point or leaf.dtype.is_complex]
    return max((error(x, y, 1e-3) for x, y in zip(left, right, strict=True)), default=0.0)
