"""The plan of a design: every site of its stack, what it costs, and the checks that need more than one field."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from postformer.design import registry
from postformer.design.base import Design, DesignError, nearest
from postformer.design.cost import Cost
from postformer.design.cost import linear as linear_cost
from postformer.design.depth import SELF
from postformer.design.grammar import Model, Norm, Recipe, Sublayer
from postformer.design.place import Place, mixer_cost


@dataclass(frozen=True)
class Planned:
    """One sublayer of the stack."""

    sublayer: Sublayer
    place: Place
    design: Any
    """None: a shared block"""
    shared: tuple[str, int] | None = None
    """(name, copy) of a shared block"""


def norm_params(norm: Norm, width: int) -> int:
    """Parameters of a norm over `width` channels."""
    if norm.kind == "none" or not norm.affine:
        return 0
    return width * (2 if norm.kind == "layer" and norm.bias else 1)


def key_of(use: str | Design, model: Model) -> str:
    """What counts as 'the same mixer' when uses are ranked: its content, whatever it is called, or a shared block."""
    if isinstance(use, str) and use in model.shared:
        return f"shared.{use}"
    return json.dumps(model.mixer_of(use).dump(), sort_keys=True)


def input_width(sublayer: Sublayer, model: Model) -> int:
    return model.width * len(sublayer.input)


def asked(sub: Sublayer) -> frozenset[str]:
    """What a sublayer's mixer is to publish; the rest its depth does."""
    return frozenset(sub.publish.values()) - set(sub.depth.publishes)


def planned(model: Model) -> Iterator[list[Planned]]:
    """Layer by layer, the sublayers with their places."""
    counts = Counter(key_of(s.use, model) for name in model.stack for s in model.layers[name])
    order = {key: str(i) for i, key in enumerate(counts)}
    seen: Counter[str] = Counter()
    for i, name in enumerate(model.stack):
        layer = []
        for j, sub in enumerate(model.layers[name]):
            key = key_of(sub.use, model)
            place = Place(
                path=f"stack.{i}.{j}", layer=i, num_layers=len(model.stack), rank=seen[key], count=counts[key],
                width=input_width(sub, model), dim_out=model.width, publish=asked(sub),
                identity=order[key], linears=model.linear,
            )
            if isinstance(sub.use, str) and sub.use in model.shared:
                layer.append(Planned(sub, place, None, (sub.use, seen[key] % model.shared[sub.use].copies)))
            else:
                layer.append(Planned(sub, place, model.mixer_of(sub.use)))
            seen[key] += 1
        yield layer


def shared_places(model: Model, name: str, copy: int, num_layers: int) -> list[Planned]:
    """The sublayers of one copy of a shared block."""
    return [
        Planned(sub, Place(path=f"shared.{name}.{copy}.{j}", layer=0, num_layers=num_layers, rank=copy,
                           count=model.shared[name].copies, width=input_width(sub, model), dim_out=model.width,
                           publish=asked(sub), identity=f"shared.{name}.{j}", linears=model.linear),
                model.mixer_of(sub.use))
        for j, sub in enumerate(model.shared[name].layer)
    ]


def used_copies(model: Model) -> list[tuple[str, int]]:
    """(name, copy) of the shared blocks that some site uses; only these are built."""
    return list(dict.fromkeys(item.shared for layer in planned(model) for item in layer if item.shared))


def _inside(item: Planned, model: Model) -> list[Planned]:
    """The sublayers of the shared block that stands at a site."""
    assert item.shared is not None
    return shared_places(model, *item.shared, len(model.stack))


def able(item: Planned, model: Model) -> tuple[bool, bool]:
    """Whether the mixer of a sublayer, or of those of its shared block any, has a state; whether all that have one
    honour soft gates."""
    designs = [item.design] if item.shared is None else [inner.design for inner in _inside(item, model)]
    traits = [registry.resolve(design.kind).traits(design) for design in designs]
    return any(t.stateful for t in traits), all(t.soft_gates for t in traits if t.stateful)


def sublayer_cost(item: Planned, model: Model) -> Cost:
    """Norms, mixer, output map and scale of one sublayer; of a shared block only the site's own part."""
    sub, width = item.sublayer, item.place.width
    total = Cost(params=norm_params(sub.norm or model.norm, width) + norm_params(sub.post_norm, model.width))
    if item.shared is None:
        inner = mixer_cost(item.design, item.place)
    else:
        inner = sum((sublayer_cost(b, model) for b in _inside(item, model)), Cost()).shared()
    if sub.out:
        inner += item.place.linear_cost(model.width, model.width)
    stateful, _ = able(item, model)
    total += sub.depth.cost(inner, item.place, model.width, stateful)
    if sub.scale == "learned":
        total += Cost(params=model.width)
    return total


def cost(model: Model) -> Cost:
    """Cost of the whole language model; the state includes its position counter."""
    total = Cost(params=model.vocab * model.width + norm_params(model.embedding.norm, model.width), state=8)
    head = linear_cost(model.width, model.vocab)
    total += head.shared() if model.embedding.tie else head
    total += Cost(params=norm_params(model.stack_norm or model.norm, model.width))
    total += sum((sublayer_cost(item, model) for layer in planned(model) for item in layer), Cost())
    for name, copy in used_copies(model):
        block = shared_places(model, name, copy, len(model.stack))
        total += Cost(params=sum((sublayer_cost(b, model) for b in block), Cost()).params)
    return total


def check(recipe: Recipe) -> None:
    """What no single field can see: names, sizes that fit the width, publications read after they are written, once.

    Raises DesignError.
    """
    model = recipe.model
    blocks = {f"model.layers.{name}": layer for name, layer in model.layers.items()}
    blocks |= {f"model.shared.{name}.layer": block.layer for name, block in model.shared.items()}
    if both := set(model.mixers) & set(model.shared):
        raise DesignError(f"'{min(both)}' names a mixer and a shared block; rename one",
                          path=f"model.shared.{min(both)}")
    for where, layer in blocks.items():
        known = [*model.mixers, *(model.shared if where.startswith("model.layers.") else ())]
        if not layer:
            raise DesignError("a layer without sublayers does nothing; give it at least one, e.g. [{use: memory}]",
                              path=where)
        for j, sub in enumerate(layer):
            if isinstance(sub.use, str) and sub.use not in known:
                raise DesignError(f"no mixer '{sub.use}'.{nearest(sub.use, known)}", path=f"{where}.{j}.use")
            if sub.residual == "next" and j + 1 == len(layer):
                raise DesignError("residual: next needs a sublayer after it in the same layer",
                                  path=f"{where}.{j}.residual")
    if unused := set(model.mixers) - {s.use for layer in blocks.values() for s in layer if isinstance(s.use, str)}:
        raise DesignError(f"mixer '{min(unused)}' stands in no layer of the stack. Use it in `stack` or remove it"
                          " (scaling to few layers can cut it off: ask for more layers).",
                          path=f"model.mixers.{min(unused)}")
    published: set[str] = {"embedding", "tokens"}
    for layer in planned(model):
        for j, item in enumerate(layer):
            where = f"model.layers.{model.stack[item.place.layer]}.{j}"
            if item.shared is None:
                offered = _fits(item, where, published)
            else:
                name, copy = item.shared
                inside = set(published)
                for k, inner in enumerate(shared_places(model, name, copy, len(model.stack))):
                    there = f"model.shared.{name}.layer.{k}"
                    own = _fits(inner, there, inside)
                    _deep(inner, own, model.shared[name].layer[:k], there, inside, model)
                    _publish(inner.sublayer, own, there, inside)
                offered = tuple(inside - published)
            _deep(item, offered, model.layers[model.stack[item.place.layer]][:j], where, published, model)
            _publish(item.sublayer, offered, where, published)


def _fits(item: Planned, where: str, published: set[str]) -> tuple[str, ...]:
    """What the mixer of a sublayer publishes, after checks that it can stand there."""
    use, kind = item.sublayer.use, registry.resolve(item.design.kind)
    own = f"model.mixers.{use}" if isinstance(use, str) else f"{where}.use"
    try:
        traits = kind.traits(item.design)
        kind.cost(item.design, item.place)
    except DesignError as e:
        # A composite whose child declares no cost can be built all the same.
        traits = kind.traits(item.design)
        if "declares no cost" not in e.message:
            raise DesignError(e.message, path=own) from None
    except ValueError as e:
        raise DesignError(str(e), path=own) from None
    for i, name in enumerate(item.sublayer.input):
        if name == "tokens":
            raise DesignError("'tokens' are numbers, not channels; as an input use embedding",
                              path=f"{where}.input.{i}")
        if name != "x" and name not in published:
            raise DesignError(f"input '{name}' is read before any earlier sublayer publishes it."
                              f"{nearest(name, {'x', *published} - {'tokens'})}", path=f"{where}.input.{i}")
    for name in traits.reads:
        if name.startswith("input."):
            raise DesignError(f"'{name.removeprefix('input.')}' is fed by what stands around a mixer, and nothing here "
                              "does so (to a slow memory: kind timescales with a filter as its first level)",
                              path=where)
        if name not in published:
            raise DesignError(f"'{name}' is read before any earlier sublayer publishes it.{nearest(name, published)}",
                              path=where)
    return traits.publishes


def _deep(item: Planned, offered: tuple[str, ...], earlier: tuple[Sublayer, ...], where: str, published: set[str],
          model: Model) -> None:
    """A depth fits its sublayer, its mixer, which offers these publications, and the sublayers of its layer so far."""
    sub = item.sublayer
    if sub.depth.kind == "fixed":
        return
    path = f"{where}.depth"
    own = [what for what in sub.publish.values() if what in offered]
    if why := sub.depth.refused(sub, own, *able(item, model)):
        raise DesignError(why, path=path)
    if earlier and earlier[-1].residual == "next":
        raise DesignError("what the sublayer before leaves for this one's input alone (residual: next) is no part of "
                          "the stream, and would be lost at tokens that skip or repeat this one; give that one "
                          "residual: add, or leave depth fixed here", path=path)
    score = sub.depth.score
    if score != SELF and score not in published - {"embedding", "tokens"}:
        raise DesignError(f"score '{score}' is read before any earlier sublayer publishes it."
                          f"{nearest(score, {SELF, *published} - {'embedding', 'tokens'})}", path=f"{path}.score")


def _publish(sub: Sublayer, offered: tuple[str, ...], where: str, published: set[str]) -> None:
    offered = (*offered, *sub.depth.publishes)
    for name, what in sub.publish.items():
        path = f"{where}.publish.{name}"
        if what not in offered:
            rest = nearest(what, offered) if offered else " It publishes nothing."
            raise DesignError(f"'{what}' is nothing that this sublayer's mixer publishes.{rest}", path=path)
        if name == "x" or name in published:
            raise DesignError(f"'{name}' is {'the stream' if name == 'x' else 'published twice'}; "
                              "give each publication its own name", path=path)
        published.add(name)
