"""Is a step affine in its state, and what does its transition look like? Found by trying, with no formula asked.

A leaf acts on another if changing the first changes the second's next value. Leaves that act on each other form a
group; a group may depend in any way on groups before it (a key made from the token before, which the state carries),
and has to be affine in itself. Affine is tried by superposition, F(a s + b t + c r) = a F(s) + b F(t) + c F(r) with
a + b + c = 1, on random states from 1e-4 to 1e6 and inputs from 0 to 100.

The form of a transition L is found axis by axis: it treats all entries along an axis alike exactly if it commutes with
every matrix acting there (two random ones generate them all), and keeps the entries apart exactly if it commutes with
a diagonal matrix of different entries.

Limits: a departure below 1e-10 of the state, or one at inputs or states that were not tried, is not seen here.
`in_blocks` sees it: it checks each of its calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import Step
from .plan import Group, Plan, flat, smooth

TOLERANCE = 1e-10
SIZES = (1e-4, 1e-2, 1.0, 1e2, 1e4, 1e6)
INPUTS = (0.0, 0.01, 1.0, 1.0, 10.0, 100.0)
"""Sizes of the random states, and of the random inputs by row."""
MOST_RUNS = 64
"""A transition that takes more runs over the tokens is not worth them."""


class NotAffine(Exception):
    """Why a step cannot be run in blocks."""


def recognise(step: Step, state: Any, width: int, generator: torch.Generator, names: Sequence[str] = ()) -> Plan:
    """The plan by which `in_blocks` may run a step, or NotAffine with the reason.

    step: in double precision, free of gradients; state: an example of its state, with len(INPUTS) rows; width: channels
    of x; names: of the leaves, for the reason.
    """
    return _Probe(step, state, width, generator, names).plan()


class _Probe:
    def __init__(self, step: Step, state: Any, width: int, generator: torch.Generator, names: Sequence[str]) -> None:
        self.like, rebuild = flat(state)
        if not self.like:
            raise NotAffine("it carries no state")
        self.names = names or [f"state leaf {i}" for i in range(len(self.like))]
        self.generator = generator
        device = self.like[0].device
        size = torch.tensor(INPUTS, dtype=torch.float64)[:, None]
        self.x = (torch.randn(len(INPUTS), width, generator=generator, dtype=torch.float64) * size).to(device)

        def run(leaves: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
            y, new = step(self.x, rebuild(leaves))
            return y, flat(new)[0]

        self.run = run

    def random(self, i: int, size: float = 1.0) -> Tensor:
        """A random value of leaf i."""
        like = self.like[i]
        if not smooth(like):
            return torch.randint(0, 6, like.shape, generator=self.generator).to(like)
        made = torch.randn(like.shape, generator=self.generator, dtype=torch.promote_types(like.dtype, torch.float64))
        return (made * size).to(like)

    def all(self, size: float = 1.0) -> list[Tensor]:
        return [self.random(i, size) for i in range(len(self.like))]

    def plan(self) -> Plan:
        self.sound()
        acts = self.dependences()
        count = len(self.like)
        reach = [[acts[j][i] for i in range(count)] for j in range(count)]
        for k in range(count):
            for j in range(count):
                for i in range(count):
                    reach[j][i] |= reach[j][k] and reach[k][i]
        together: list[tuple[int, ...]] = []
        for i in range(count):
            own = tuple(j for j in range(count) if j == i or (reach[i][j] and reach[j][i]))
            if own not in together:
                together.append(own)

        def depth(own: tuple[int, ...]) -> int:
            """Longest chain of groups that depend on this one."""
            return max((1 + depth(o) for o in together if o != own and any(reach[i][j] for i in own for j in o)),
                       default=0)

        most = max(depth(own) for own in together)
        groups = [self.form(own, most - depth(own), zero=not any(acts[j][i] for j in own for i in own))
                  for own in together]
        for g in groups:
            if (runs := g.runs(self.like)) > MOST_RUNS:
                _, K, V = g.shape(self.like)
                raise NotAffine(f"{self.called(g.leaves)} is affine, but its transition is {K}x{K}, the same for {V} "
                                f"columns only: {runs} runs over the tokens to find it, more than {MOST_RUNS}")
        return Plan(tuple(sorted(groups, key=lambda g: (g.level, g.leaves))))

    def called(self, own: Sequence[int]) -> str:
        return " with ".join(self.names[i] for i in own)

    def sound(self) -> None:
        """A step that returns the same for the same, of the same shape, and leaves its arguments alone."""
        for size in (1.0, 1e3):
            state = self.all(size)
            before = [s.clone() for s in state]
            y, new = self.run(state)
            if any(not torch.equal(a, b) for a, b in zip(before, state)):
                raise NotAffine("step changes its state in place")
            if [n.shape for n in new] != [s.shape for s in state]:
                raise NotAffine("step changes the shapes of the state")
            again_y, again = self.run(before)
            if not all(map(_same, (y, *new), (again_y, *again))):
                raise NotAffine("step returns something else for the same token and state: it draws random numbers, "
                                "or keeps something outside its state")
            _, near = self.run([torch.cat([s[:1], t[1:]]) for s, t in zip(state, self.all(size))])
            for name, a, b in zip(self.names, new, near):
                if not torch.allclose(a[:1], b[:1], rtol=1e-9, atol=1e-9 * size, equal_nan=True):
                    raise NotAffine(f"a row of {name} depends on the other rows of the batch")

    def dependences(self) -> list[list[bool]]:
        """acts[j][i]: the next value of leaf i depends on leaf j."""
        count = len(self.like)
        acts = [[False] * count for _ in range(count)]
        for size in SIZES:
            state = self.all(size)
            new = self.run(state)[1]
            for j in range(count):
                other = self.run([self.random(j, size) if i == j else s for i, s in enumerate(state)])[1]
                for i in range(count):
                    acts[j][i] |= not _same(new[i], other[i])
        return acts

    def form(self, own: tuple[int, ...], level: int, zero: bool) -> Group:
        if not all(smooth(self.like[i]) for i in own):
            return self.counter(own, level, zero)
        for size in SIZES:
            rest, points = self.all(), [[self.random(i, size) for i in own] for _ in range(3)]
            weights = (0.7, -1.9, 2.2)
            mixed = [sum(w * p[k] for w, p in zip(weights, points)) for k in range(len(own))]
            images = [self.next(own, rest, p) for p in points]
            found = self.next(own, rest, mixed)  # type: ignore[arg-type]
            for k, i in enumerate(own):
                self.compare(i, found[k], sum(w * m[k] for w, m in zip(weights, images)), images, k, size)
        separate, shared = self.axes(own)
        return Group(own, level, separate, shared, zero)

    def counter(self, own: Sequence[int], level: int, zero: bool) -> Group:
        """Integers may count (by what does not depend on them) or be set anew."""
        name = self.called(own)
        if any(self.like[i].dtype == torch.bool for i in own):
            raise NotAffine(f"{name} is boolean")
        if len(own) > 1:
            raise NotAffine(f"{name}: integers that depend on other leaves and these on them")
        if not zero:
            for _ in range(3):
                rest, point, other = self.all(), self.random(own[0]), self.random(own[0])
                added = self.next(own, rest, [point])[0] - point
                if not torch.equal(added, self.next(own, rest, [other])[0] - other):
                    raise NotAffine(f"{name} holds integers that do not just count")
        return Group(tuple(own), level, (), tuple(range(self.like[own[0]].ndim - 1)), zero)

    def next(self, own: Sequence[int], rest: list[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
        state = list(rest)
        for i, value in zip(own, values):
            state[i] = value
        new = self.run(state)[1]
        return [new[i] for i in own]

    def compare(self, i: int, a: Tensor, b: Any, images: list[list[Tensor]], k: int, size: float) -> None:
        scale = torch.stack([m[k].abs() for m in images]).flatten(2).amax((0, 2)) if a.ndim > 1 else \
            torch.stack([m[k].abs() for m in images]).amax(0)
        gap = (a - b).abs()
        gap = gap.flatten(1).amax(1) if gap.ndim > 1 else gap
        off = (gap / scale.clamp_min(1e-30)).amax().item()
        if not off <= TOLERANCE:
            hint = "; a step that computes in float32 where its state is float64 looks the same" if off < 1e-5 else ""
            raise NotAffine(f"{self.names[i]} is not affine (superposition off by {off:.0e} at states of size "
                            f"{size:g}{hint})")

    def axes(self, own: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(separate axes, shared axes) of a group's transition."""
        shapes = [self.like[i].shape[1:] for i in own]
        separate, shared = [], []
        for axis in range(min(map(len, shapes))):
            sizes = {s[axis] for s in shapes}
            if len(sizes) > 1:
                continue
            n = sizes.pop()
            dense = [torch.randn(n, n, generator=self.generator, dtype=torch.float64) / n**0.5 for _ in range(2)]
            if n == 1 or all(self.commutes(own, axis, lambda v, m=m: torch.tensordot(v, m.to(v), 1)) for m in dense):
                shared.append(axis)
                continue
            d = torch.rand(n, generator=self.generator, dtype=torch.float64) + torch.arange(n) % 7
            if self.commutes(own, axis, lambda v, d=d: v * d.to(v)):
                separate.append(axis)
        return tuple(separate), tuple(shared)

    def commutes(self, own: tuple[int, ...], axis: int, act: Callable[[Tensor], Tensor]) -> bool:
        def turned(values: list[Tensor]) -> list[Tensor]:
            return [act(v.movedim(1 + axis, -1)).movedim(-1, 1 + axis) for v in values]

        for size in (1.0, 1e3):
            rest, point = self.all(), [self.random(i, size) for i in own]
            zero = self.next(own, rest, [torch.zeros_like(p) for p in point])
            first = [a - b for a, b in zip(self.next(own, rest, turned(point)), zero)]
            then = turned([a - b for a, b in zip(self.next(own, rest, point), zero)])
            scale = max(v.abs().amax().item() for v in (*then, *zero, *point)) or 1.0
            if max((a - b).abs().amax().item() for a, b in zip(first, then)) > TOLERANCE * scale:
                return False
        return True


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, with NaN equal to NaN."""
    return torch.equal(a, b) or (smooth(a) and bool(((a == b) | (a.isnan() & b.isnan())).all()))


def describe(plan: Plan, state: Any, names: Sequence[str] = ()) -> str:
    """The plan in words; state: an example of it."""
    like = flat(state)[0]
    names = names or [f"leaf {i}" for i in range(len(like))]
    words = []
    for g in plan.groups:
        P, K, V = g.shape(like)
        name = " with ".join(f"{names[i]} {list(like[i].shape[1:])}" for i in g.leaves)
        if g.zero:
            form = "made from the token alone" if not g.level else "made anew at every token"
        elif not smooth(like[g.leaves[0]]):
            form = "a counter"
        elif K == 1:
            form = "one factor for all" if P == 1 else f"diagonal, {P} factors"
        else:
            axes = [a for a in range(like[g.leaves[0]].ndim - 1) if a not in g.separate and a not in g.shared]
            where = f"axis {axes[0]}" if len(axes) == 1 and (g.separate or g.shared) else "all of it"
            if len(g.leaves) > 1:
                where = "these leaves together"
            form = f"a {K}x{K} map of {where}" + (f", {P} of them" if P > 1 else "") + (
                f", the same for {V} columns" if V > 1 else "")
        words.append(f"{name}: {form}")
    return "; ".join(words)
