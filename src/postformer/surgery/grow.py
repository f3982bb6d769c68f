"""Growth in depth: a trained model of l layers becomes one of L > l, made of the layers it has.

    stack       new layer i is old layer i mod l (G_stack, 2405.15319)
    interleave  every layer, or tile of layers, is repeated in place: new unit k is old unit floor(k u / U)
    identity    interleave, and what ends each new branch starts at zero: the logits are those of the small model
                (2401.02415)

The units are whole tiles of the stack, so that a hybrid keeps its pattern. A layer that publishes something stands in
the stack once, as before: the runs of layers between such layers are grown.

Every tensor of a layer is a copy of its source's. Nothing is scaled: initial values that depend on a layer's place
(`out` maps smaller with depth, ratios of RWKV-7) were starts of a training that has since moved them. Embedding, head,
last norm and shared blocks are carried over; of a parameter that the stack holds for all uses of a mixer (one row for
each) the rows are copied. The optimiser of a grown model starts afresh, since the gradients' scales are others.

Limits: `stack` and `interleave` change what the model computes, and training repairs it in few steps. With `identity`
only what was zeroed has a gradient at first, the rest of a new layer from the second step on; auxiliary losses of new
layers (routers) count from the start; and a design whose layers share rows of one normalised parameter (HGRN2's bounds)
cannot be grown so, which is found out and refused.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field, model_validator

from postformer.design import DesignError, Recipe
from postformer.design import load as load_recipe
from postformer.design.grammar import Model
from postformer.design.plan import planned
from postformer.model import LanguageModel, build, evaluating
from postformer.surgery.base import Surgery, register
from postformer.surgery.silence import long_text, silences

How = Literal["stack", "interleave", "identity"]


@register
class Grow(Surgery):
    """Depth times `factor`, or to `layers`."""

    kind: Literal["grow"] = "grow"
    how: How = "stack"
    factor: int | None = Field(default=None, ge=2)
    """Of the layers that can be repeated"""
    layers: int | None = Field(default=None, ge=2)
    """Instead of factor: of the whole stack"""

    @model_validator(mode="after")
    def _one(self) -> Grow:
        if (self.factor is None) == (self.layers is None):
            raise ValueError("give either factor or layers: how deep the model shall be")
        return self

    def recipe(self, recipe: Recipe) -> Recipe:
        return load_recipe({**recipe.said(), "model": grown(recipe.model, self)[0].said()})

    def preserves(self) -> str:
        return "the logits" if self.how == "identity" else "the weights of every layer, not the logits"

    def operate(self, model: LanguageModel) -> LanguageModel:
        return _operate(model, self)


def grow(model: LanguageModel, layers: int | None = None, *, factor: int | None = None,
         how: How = "stack") -> LanguageModel:
    """The model with more layers; the one given is left as it was.

    layers: of the new stack; factor: how many times as many, instead. The result is on the same device, of the same
    dtype, and trains what was trained. Raises ValueError, or DesignError where the stack cannot be grown so.
    """
    return Grow(layers=layers, factor=factor, how=how).operate(model)


def grown(model: Model, how: Grow) -> tuple[Model, list[int], list[int]]:
    """-> the design, for each of its layers the layer it is a copy of, and the layers that are additions (the copies
    beside what `identity` keeps).

    Raises DesignError for a stack that cannot be grown so.
    """
    signs, single = _signs(model)
    runs = _runs(single)
    old = sum(len(run) for run in runs)
    if not runs:
        raise DesignError("every layer publishes something, which it can do only once: there is nothing to repeat",
                          path="model.stack")
    source: list[int] = []
    added: list[int] = []
    at = 0
    for run in runs:
        source += range(at, run.start)  # layers that publish
        tile = _tile([signs[i] for i in run], run, len(model.stack))
        size = _size(len(run), tile, old, len(model.stack), how)
        fresh: set[int] = set()
        for k in range(size):
            unit, inside = divmod(k, tile)
            units, before = size // tile, len(run) // tile
            if how.how == "stack":
                chosen, repeated = k % len(run), k >= len(run)
            else:
                from_unit = unit * before // units
                chosen, repeated = from_unit * tile + inside, unit > 0 and (unit - 1) * before // units == from_unit
            if repeated:
                fresh.add(len(source))
            source.append(run.start + chosen)
        added += sorted(fresh)
        at = run.stop
    source += range(at, len(model.stack))
    new = model.model_copy(update={"stack": tuple(model.stack[i] for i in source)})
    # A shared block's copies take turns over its sites; a copy that came to stand elsewhere would not be grown.
    if [signs[i] for i in source] != _signs(new)[0]:
        raise DesignError(f"how: {how.how} would give sites another copy of a shared block than they were trained "
                          "with; start from a model whose copies have all had as many turns", path="model.shared")
    return new, source, added


def _signs(model: Model) -> tuple[list[tuple], list[bool]]:
    """For each layer: what it is, shared copies included; and whether it can stand in a stack only once."""
    signs, single = [], []
    for name, layer in zip(model.stack, planned(model), strict=True):
        signs.append((name, *(item.shared for item in layer)))
        inner = [s for item in layer if item.shared for s in model.shared[item.shared[0]].layer]
        single.append(any(s.publish for s in (*(item.sublayer for item in layer), *inner)))
    return signs, single


def _runs(single: list[bool]) -> list[range]:
    """The stretches of layers that may be repeated."""
    edges = [-1, *(i for i, s in enumerate(single) if s), len(single)]
    return [range(a + 1, b) for a, b in pairwise(edges) if b - a > 1]


def _tile(signs: list[tuple], run: range, total: int) -> int:
    """Layers of the pattern that the run repeats; all of it where it repeats none. Raises DesignError for a run that
    ends in the middle of its pattern."""
    n = len(signs)
    tile = next(p for p in range(1, n + 1) if all(signs[i] == signs[i - p] for i in range(p, n)))
    if n % tile == 0 or 2 * tile > n:
        return tile if n % tile == 0 else n
    less, more = total - n % tile, total + tile - n % tile
    raise DesignError(f"the stack ends in the middle of its pattern: {n} layers from layer {run.start} on repeat a "
                      f"tile of {tile}. Start from whole tiles (--layers {less} or {more})", path="model.stack")


def _size(length: int, tile: int, old: int, total: int, how: Grow) -> int:
    """Layers of a grown run of `length`."""
    if how.factor is not None:
        return length * how.factor
    assert how.layers is not None
    if how.layers <= total:
        raise DesignError(f"layers is {how.layers} and the model has {total}: growth adds layers; ask for more",
                          path="surgery.layers")
    room = length * (how.layers - (total - old))
    if room % (old * tile) == 0:
        return room // old
    near = [total - old + old * factor for factor in (2, 3, 4)]
    pattern = f"tiles of {tile}" if length == old else "whole tiles, all runs alike"
    raise DesignError(f"{how.layers} layers are not {pattern} (of {total}, {total - old} stand only once); "
                      f"there are {near[0]}, {near[1]}, {near[2]} (factor 2, 3, 4)", path="surgery.layers")


def _operate(model: LanguageModel, how: Grow) -> LanguageModel:
    design, source, added = grown(model.design, how)
    large = build(design).to(model.embedding.weight)
    _copy(model, large, source)
    if how.how == "identity":
        with torch.no_grad():
            for name, value in silences(design, added).items():
                large.get_parameter(name).fill_(value)
        _same(model, large)
    large.gradient_checkpointing = model.gradient_checkpointing
    large.train(model.training)
    return large


def _copy(small: LanguageModel, large: LanguageModel, source: list[int]) -> None:
    """Every tensor of the large model from its source in the small one; frozen ones stay frozen."""
    have, frozen = small.state_dict(), {n for n, p in small.named_parameters() if not p.requires_grad}
    tied, called = large.tied(), {what: name for name, what in small.tied().items()}
    with torch.no_grad():
        for name, value in large.state_dict().items():
            if name in tied:
                origin = called[tied[name]]
                rows = _rows(small.design, large.design, source, tied[name][0])
                same = value.shape == have[origin].shape
                value.copy_(have[origin] if same else have[origin][rows])
            else:
                origin = _origin(name, source)
                value.copy_(have[origin])
            if origin in frozen:
                large.get_parameter(name).requires_grad_(False)


def _origin(name: str, source: list[int]) -> str:
    """stack.layers.I.REST -> stack.layers.SOURCE[I].REST; other names as they are."""
    head, mark, rest = name.partition("stack.layers.")
    if head or not mark:
        return name
    layer, _, rest = rest.partition(".")
    return f"{mark}{source[int(layer)]}.{rest}"


def _rows(small: Model, large: Model, source: list[int], owner: str) -> list[int]:
    """For each use of a mixer in the large model, the use in the small one that it is a copy of."""
    top = owner.partition(".")[0]
    ranks = {(i, j): item.place.rank for i, layer in enumerate(planned(small)) for j, item in enumerate(layer)}
    uses = [(item.place.rank, ranks[source[i], j]) for i, layer in enumerate(planned(large))
            for j, item in enumerate(layer) if item.place.identity == top]
    return [old for _, old in sorted(uses)]


def _same(small: LanguageModel, large: LanguageModel) -> None:
    """Raises DesignError unless both give the same logits."""
    device = small.embedding.weight.device
    tokens, ctx = long_text(small.design)
    tokens, ctx = tokens.to(device), ctx.replace(boundary=ctx.boundary.to(device))  # type: ignore[union-attr]
    with torch.no_grad(), evaluating(small), evaluating(large):
        before, after = small(tokens, None, ctx).logits, large(tokens, None, ctx).logits
    error, size = float((before - after).abs().max()), float(before.abs().max())
    if not error <= size * (1e-10 if before.dtype == torch.float64 else 1e-5):
        rows = ", ".join(sorted({called for _, called in large.tied().values()}))
        why = f": one parameter holds all layers' {rows}, and more rows change the old ones" if rows else ""
        raise DesignError(f"this design cannot grow by how: identity{why} (logits would change by {error:.2g}). Use "
                          "how: stack or interleave", path="surgery.how")
