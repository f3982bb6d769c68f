"""The plan of a design: every site of its stack, what it costs, and the checks that need more than one field."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from postformer.design import registry
from postformer.design.base import Design, DesignError, nearest
from postformer.design.cost import Cost
from postformer.design.cost import linear as linear_cost
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


def key_of(use: str | Design) -> str:
    """What counts as 'the same mixer' when uses are ranked: its name, or for an inline one its content."""
    return use if isinstance(use, str) else str(sorted(use.dump().items(), key=str))


def input_width(sublayer: Sublayer, model: Model) -> int:
    return model.width * len(sublayer.input)


def planned(model: Model) -> Iterator[list[Planned]]:
    """Layer by layer, the sublayers with their places."""
    counts = Counter(key_of(s.use) for name in model.stack for s in model.layers[name])
    seen: Counter[str] = Counter()
    for i, name in enumerate(model.stack):
        layer = []
        for j, sub in enumerate(model.layers[name]):
            key = key_of(sub.use)
            place = Place(
                path=f"stack.{i}.{j}", layer=i, num_layers=len(model.stack), rank=seen[key], count=counts[key],
                width=input_width(sub, model), dim_out=model.width, publish=frozenset(sub.publish.values()),
                linears=model.linear,
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
                           linears=model.linear),
                model.mixer_of(sub.use))
        for j, sub in enumerate(model.shared[name].layer)
    ]


def sublayer_cost(item: Planned, model: Model) -> Cost:
    """Norms, mixer, output map and scale of one sublayer; of a shared block only the site's own part."""
    sub, width = item.sublayer, item.place.width
    total = Cost(params=norm_params(sub.norm or model.norm, width) + norm_params(sub.post_norm, model.width))
    if item.shared is None:
            total += mixer_cost(item.design, item.place)
    else:
        block = shared_places(model, item.shared[0], item.shared[1], len(model.stack))
        total += sum((sublayer_cost(b, model) for b in block), Cost()).shared()
    if sub.out:
        total += linear_cost(model.width, model.width)
    if sub.scale == "learned":
        total += Cost(params=model.width)
    return total


def cost(model: Model) -> Cost:
    """Cost of the whole language model; the state includes its position counter."""
    total = Cost(params=model.vocab * model.width + norm_params(model.embedding.norm, model.width), state=8)
    head = linear_cost(model.width, model.vocab)
    total += head.shared() if model.embedding.tie else head
    total += Cost(params=norm_params(model.stack_norm or model.norm, model.width))
    used: set[tuple[str, int]] = set()
    for layer in planned(model):
        for item in layer:
            total += sublayer_cost(item, model)
            if item.shared:
                used.add(item.shared)
    for name, copy in used:
        block = shared_places(model, name, copy, len(model.stack))
        total += Cost(params=sum((sublayer_cost(b, model) for b in block), Cost()).params)
    return total


def check(recipe: Recipe) -> None:
    """What no single field can see: names, publications read after they are written, once. Raises DesignError."""
    model = recipe.model
    for name, layer in model.layers.items():
        for j, sub in enumerate(layer):
            path = f"model.layers.{name}.{j}"
            if isinstance(sub.use, str) and sub.use not in model.mixers and sub.use not in model.shared:
                raise DesignError(f"no mixer '{sub.use}'.{nearest(sub.use, [*model.mixers, *model.shared])}",
                                  path=f"{path}.use")
            if sub.residual == "next" and j + 1 == len(layer):
                raise DesignError("residual: next needs a sublayer after it in the same layer", path=path)
    if unused := set(model.mixers) - {
        s.use for layer in [*model.layers.values(), *(b.layer for b in model.shared.values())] for s in layer
        if isinstance(s.use, str)
    }:
        raise DesignError(f"mixer '{min(unused)}' stands in no layer of the stack. Use it in `stack` or remove it"
                          " (scaling to few layers can cut it off: ask for more layers).",
                          path=f"model.mixers.{min(unused)}")
    published: set[str] = {"embedding"}
    for layer in planned(model):
        for item in layer:
            if item.design is None:
                continue
            traits = registry.resolve(item.design.kind).traits(item.design)
            where = f"model.layers.{model.stack[item.place.layer]}"
            for name in traits.reads:
                if name not in published:
                    raise DesignError(f"'{name}' is read before any earlier sublayer publishes it."
                                      f"{nearest(name, published)}", path=where)
            for name, what in item.sublayer.publish.items():
                if what not in traits.publishes:
                    raise DesignError(f"kind '{item.design.kind}' does not publish '{what}'."
                                      f"{nearest(what, traits.publishes)}", path=f"{where}.publish.{name}")
                if name in published:
                    raise DesignError(f"'{name}' is published twice; give each publication its own name",
                                      path=f"{where}.publish.{name}")
                published.add(name)
