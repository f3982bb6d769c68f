"""The checks: each takes a subject in fp64 and returns (value, tolerance, note); it passes when value <= tolerance.

They state the contract of every mixer: causal, the same in parallel as token by token, for any split of the tokens,
for any company in the batch, for any padding, packing or age of rows, and pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from postformer.block.sublayer import Sublayer
from postformer.contract import state as states
from postformer.contract.context import LEVELS, Context
from postformer.contract.mixer import Mixer, Traits
from postformer.kernels import use
from postformer.model.language import LMState
from postformer.verify.compare import emitted_at, error, finite, gradient_error, state_error, used
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


def _not_causal(traits: Traits) -> str | None:
    return None if traits.causal else "the design is not causal"


def _no_streaming(traits: Traits) -> str | None:
    return "the design cannot stream" if traits.streaming == "none" or not traits.causal else None


def _no_gates(traits: Traits) -> str | None:
    return None if traits.soft_gates else "local mixing stands before a memory: read-only tokens would enter its taps"


def gradients(s: Subject, x: Tensor, state: Any, scale: float, backend: str) -> tuple[Any, Any, dict[str, Any]]:
    """Outputs, final state and all gradients (parameters, x, floating state leaves) of a random functional."""
    x = x.clone().requires_grad_()
    state = states.map_state(
        lambda leaf: leaf.detach().clone().requires_grad_(leaf.dtype.is_floating_point or leaf.dtype.is_complex), state)
    with use(backend=backend, decay_scale=scale):
        out, after = s(x, state)
    weight = torch.randn(out.y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(out.y)
    total = (out.y * weight).sum()
    for leaf in states.leaves(after):
        if leaf.requires_grad:
            total = total + (leaf.real if leaf.is_complex() else leaf).to(total.dtype).square().sum() * 1e-2
    named = {n: p for n, p in s.model.named_parameters() if p.requires_grad}
    past = {f"state.{i}": leaf for i, leaf in enumerate(states.leaves(state)) if leaf.requires_grad}
    inputs = {**named, "x": x, **past}
    found = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
    return out.y.detach(), states.detach(after), dict(zip(inputs, found))


@check("parallel = token by token, fp64: outputs, state, gradients; decay x 0.1, 5, 60")
def parallel(s: Subject) -> Found:
    start = states.detach(s(s.input(2, 5, 1))[1])
    x, worst, where = s.input(2, 83, 2), 0.0, ""
    for scale in (0.1, 5.0, 60.0):
        y, after, grads = gradients(s, x, start, scale, "auto")
        y_ref, after_ref, grads_ref = gradients(s, x, start, scale, "reference")
        gap, name = gradient_error(grads, grads_ref)
        found = {"outputs": error(y, y_ref), "state": state_error(after, after_ref), f"gradient of {name}": gap}
        top = max(found, key=lambda k: found[k])
        if found[top] > worst or not where:
            worst, where = found[top], f"{top}, decay x {scale:g}"
    return worst, FP64, where


@check("parallel = token by token, fp32")
def parallel_fp32(s: Subject) -> Found:
    x = s.input(2, 83, 2)
    with torch.no_grad(), use(backend="reference"):
        truth = s(x)[0].y
    s.model.float()
    try:
        with torch.no_grad():
            y = s(x.float())[0].y
    finally:
        s.model.double()
    return error(y.double(), truth), FP32, "against fp64 token by token"


@check("causal: a later token changes nothing before it", _not_causal)
def perturbed(s: Subject) -> Found:
    x, worst = s.input(2, 37, 3), 0.0
    with torch.no_grad():
        y = s(x)[0].y
        for t in (1, 16, 36):
            changed = x.clone()
            changed[:, t:] = s.input(2, 37 - t, 4) * 3
            worst = max(worst, error(s(changed)[0].y[:, :t], y[:, :t]))
    return worst, 1e-12, ""


@check("causal: no gradient from an output to a later token", _not_causal)
def causal_gradient(s: Subject) -> Found:
    x, worst = s.input(2, 37, 3).requires_grad_(), 0.0
    y = s(x)[0].y
    for t in (1, 16, 36):
        (g,) = torch.autograd.grad(y[:, :t].square().sum(), x, retain_graph=True)
        worst = max(worst, g[:, t:].abs().max().item())
    return worst, EXACT, ""


def _pieces(s: Subject, x: Tensor, sizes: list[int], ctx: Context | None = None) -> tuple[Tensor, Any]:
    ys, at, state = [], 0, None
    for size in sizes:
        out, state = s(x[:, at : at + size], state, None if ctx is None else ctx.narrow(at, at + size, x.shape[1]))
        ys.append(out.y)
        at += size
    return torch.cat(ys, 1), state


@check("pieces = whole, outputs and state", _no_streaming)
def pieces(s: Subject) -> Found:
    x = s.input(2, 70, 6)
    with torch.no_grad():
        out, after = s(x)
        worst = 0.0
        for sizes in ([1, 69], [33, 37], [17, 1, 1, 31, 20]):
            y, state = _pieces(s, x, sizes)
            worst = max(worst, error(y, out.y), state_error(state, after))
        with driven(s, 30.0):
            out, after = s(x)
            y, state = _pieces(s, x, [33, 37])
        worst = max(worst, error(y, out.y), state_error(state, after))
    return worst, FP64, ""


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


@check("prefill + single steps = whole; a state given away gives the same", _no_streaming)
def steps(s: Subject) -> Found:
    x = s.input(2, 37, 7)
    with torch.no_grad():
        out, after = s(x)
        y, state = _pieces(s, x, [21] + [1] * 16)
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


@check("emitted states = states of the prefixes, and blocks folded into the batch go on from them", _no_streaming)
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


def _ends(s: Subject) -> tuple[int, int]:
    """(boundary level that ends the longest memory of the design, highest level that ends none of them)."""
    named = [getattr(m, "forget_at", None) for m in s.model.modules()]
    levels = [LEVELS[name] for name in named if isinstance(name, str)]
    levels.append(LEVELS["document"])  # positions
    return max(levels), min(levels) - 1


def _packed(s: Subject, lengths: list[int], batch: int) -> Tensor:
    boundary = torch.zeros(batch, sum(lengths), dtype=torch.int8)
    at = 0
    for n in lengths[:-1]:
        at += n
        boundary[:, at] = _ends(s)[0]
    return boundary


@check("packed documents = separate documents", _not_causal)
def packed(s: Subject) -> Found:
    lengths = [7, 30, 1, 19]
    x, boundary = s.input(2, sum(lengths), 10), _packed(s, lengths, 2)
    with torch.no_grad():
        out, after = s(x, None, Context(boundary=boundary))
        worst, at = 0.0, 0
        for i, n in enumerate(lengths):
            alone, state = s(x[:, at : at + n])
            worst = max(worst, error(out.y[:, at : at + n], alone.y))
            if i == len(lengths) - 1:
                worst = max(worst, state_error(after, state))
            at += n
        # a boundary at the first token of a call ends what the state holds; rows may differ
        boundary = torch.zeros(2, 11, dtype=torch.int8)
        boundary[0, 0] = _ends(s)[0]
        y = s(x[:, 20:31], s(x[:, :20])[1], Context(boundary=boundary))[0].y
        worst = max(worst, error(y[:1], s(x[:1, 20:31])[0].y), error(y[1:], s(x[1:, :31])[0].y[:, 20:]))
    return worst, FP64, ""


@check("a boundary below the level at which a memory forgets changes nothing", _not_causal)
def levels(s: Subject) -> Found:
    x, below = s.input(2, 37, 10), _ends(s)[1]
    boundary = torch.zeros(2, 37, dtype=torch.int8)
    boundary[0, 11] = boundary[1, 20] = below
    with torch.no_grad():
        out, after = s(x)
        ended, ended_after = s(x, None, Context(boundary=boundary))
    note = "" if below else "a memory forgets at every boundary"
    return max(error(ended.y, out.y), state_error(ended_after, after)), FP64, note


@check("nothing of a finished document is left: outputs and gradients, decay x 0.1, 60", _not_causal)
def forgotten(s: Subject) -> Found:
    lengths, worst = [23, 14], 0.0
    boundary = _packed(s, lengths, 2)
    for scale in (0.1, 60.0):
        x = s.input(2, 37, 11).requires_grad_()
        with use(decay_scale=scale):
            y = s(x, None, Context(boundary=boundary))[0].y[:, 23:]
            (g,) = torch.autograd.grad(y.square().sum(), x)
            with torch.no_grad():
                other = torch.cat([s.input(2, 23, 12) * 10, x[:, 23:]], 1)
                changed = s(other, None, Context(boundary=boundary))[0].y[:, 23:]
        worst = max(worst, g[:, :23].abs().max().item(), error(changed, y))
    return worst, 1e-13, ""


@check("rows of different age in one batch = each alone", _no_streaming)
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


@check("garbage at tokens that do not exist changes nothing; they count as removed", _not_causal)
def padding(s: Subject) -> Found:
    x = s.input(2, 37, 15)
    valid = torch.rand(2, 37, generator=torch.Generator().manual_seed(16)) > 0.4
    valid[0, :6], valid[1, -5:], valid[:, 20] = False, False, True
    junk = torch.where(valid[..., None], x, 1e3 * s.input(2, 37, 17))
    with torch.no_grad():
        start = s(s.input(2, 6, 18))[1]
        out, after = s(x, start, Context(valid=valid))
        out2, after2 = s(junk, start, Context(valid=valid))
        worst = max(error(out2.y, out.y), state_error(after2, after))
        if bool(out.y[~valid].any()):
            return math.inf, FP64, "y is not zero at an invalid token"
        for i in range(2):
            alone, state = s(x[i : i + 1, valid[i]], states.select(start, [i]))
            worst = max(worst, error(out.y[i : i + 1, valid[i]], alone.y),
                        state_error(states.select(after, [i]), state))
        # packing and padding together: a document that starts at a token that does not exist still starts
        boundary = torch.zeros(2, 37, dtype=torch.int8)
        boundary[0, 3] = boundary[1, 20] = _ends(s)[0]
        y = s(x, start, Context(valid=valid, boundary=boundary))[0].y
        for i, cut in enumerate((3, 20)):
            keep = valid[i].clone()
            keep[:cut] = False
            worst = max(worst, error(y[i : i + 1, keep], s(x[i : i + 1, keep])[0].y))
    return worst, FP64, ""


@check("read-only tokens leave the state; full gates change nothing; soft gates: pieces = whole", _no_gates)
def gated(s: Subject) -> Found:
    x = s.input(2, 37, 19)
    gate = (torch.rand(2, 37, generator=torch.Generator().manual_seed(20)) > 0.3).double()
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
            worst = max(worst, _memory_error(states.select(after.stack, [i]), state.stack))
        soft = torch.rand(2, 2, 37, generator=torch.Generator().manual_seed(25), dtype=torch.float64)
        ctx = Context(tick=soft[0], write=soft[1], position=position)
        whole, after = s(x, None, ctx)
        y, state = _pieces(s, x, [17, 1, 19], ctx)
        worst = max(worst, error(y, whole.y), state_error(state, after))
    return worst, FP64, ""


def _memory_error(a: Any, b: Any) -> float:
    """Difference of two states but for their position counters (a read-only token does advance those)."""
    left = [leaf for leaf in used(a) if leaf.dtype.is_floating_point or leaf.dtype.is_complex]
    right = [leaf for leaf in used(b) if leaf.dtype.is_floating_point or leaf.dtype.is_complex]
    return max((error(x, y, 1e-3) for x, y in zip(left, right, strict=True)), default=0.0)


@check("finite outputs and gradients: extreme gates, zero input, huge input")
def extreme(s: Subject) -> Found:
    bad = []
    for name, factor, gain, scale in (("zero input", 0.0, 1.0, 1.0), ("huge input", 1e4, 1.0, 1.0),
                                      ("huge input of every mixer", 1.0, 300.0, 1.0),
                                      ("decay x 2000", 1.0, 1.0, 2000.0)):
        with driven(s, gain):
            y, after, grads = gradients(s, s.input(2, 37, 21) * factor, s(s.input(2, 3, 22))[1], scale, "auto")
        if not finite([y, *states.leaves(after), *grads.values()]):
            bad.append(name)
    return float(len(bad)), EXACT, ", ".join(bad)


@check("gradients = finite differences of the outputs", lambda traits: None if traits.exact_gradients else
       "the design declares gradients that are no derivatives")
def differences(s: Subject) -> Found:
    x, start = s.input(2, 19, 26), states.detach(s(s.input(2, 5, 1))[1])
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def total() -> Tensor:
        return (s(x, start)[0].y * weight).sum()

    named = dict(s.model.stack.named_parameters())
    grads = dict(zip(named, torch.autograd.grad(total(), list(named.values()), allow_unused=True)))
    groups: dict[str, list[str]] = {}
    for name in named:
        groups.setdefault(".".join(name.split(".")[:4]), []).append(name)  # one sublayer
    worst, where, step = 0.0, "", 1e-6
    generator = torch.Generator().manual_seed(27)
    with torch.no_grad():
        for group, members in groups.items():
            # One direction of all its parameters, each weighted to matter as much as the others.
            along, told = {}, []
            for name in members:
                way = torch.randn(named[name].shape, generator=generator, dtype=torch.float64)
                g = grads[name]
                share = torch.zeros_like(way) if g is None else g * way
                weight_of = 1 / max(share.norm().item(), 1e-2)
                along[name] = way * weight_of
                told.append(share.sum() * weight_of)
            kept = {name: named[name].clone() for name in members}

            def moved(by: float, along=along, kept=kept) -> float:
                for name, way in along.items():
                    named[name].copy_(kept[name] + by * way)
                return total().item()

            slope = (moved(step) - moved(-step)) / (2 * step)
            moved(0.0)
            gap = abs(slope - torch.stack(told).sum().item()) / max(abs(slope), len(members) ** 0.5)
            if gap > worst or not where:
                worst, where = gap, group
    return worst, 1e-5, where


@check("the same with and without gradients, in training and in evaluation")
def pure(s: Subject) -> Found:
    x = s.input(2, 37, 23)
    y = s(x)[0].y.detach()
    worst = 0.0
    with torch.no_grad():
        worst = max(worst, error(s(x)[0].y, y))
    with torch.inference_mode():
        worst = max(worst, error(s(x)[0].y, y))
    s.model.eval()
    worst = max(worst, error(s(x)[0].y.detach(), y))
    s.model.train()
    if changed := _overwritten(s, x):
        return math.inf, 1e-12, f"{changed} overwrites its input"
    return worst, 1e-12, ""


def _overwritten(s: Subject, x: Tensor) -> str:
    """The first mixer that changes its x in place (two readers of one tensor would then see different things)."""
    before: dict[Any, int] = {}
    found: list[str] = []
    names: dict[Any, str] = {m: name for name, m in s.model.named_modules() if isinstance(m, Mixer)}

    def enter(mixer: Any, args: Any) -> None:
        before[mixer] = args[0]._version

    def leave(mixer: Any, args: Any, out: Any) -> None:
        if args[0]._version != before[mixer]:
            found.append(names[mixer])

    hooks: list[Any] = [m.register_forward_pre_hook(enter) for m in names]
    hooks += [m.register_forward_hook(leave) for m in names]
    with torch.no_grad():
        s(x)
    for hook in hooks:
        hook.remove()
    return found[0] if found else ""
