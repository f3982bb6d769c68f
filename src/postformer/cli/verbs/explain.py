"""postformer explain: what a recipe is, what it costs, and where it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from postformer.cli.console import Json, Layers, Set, Width, finish, number, size

if TYPE_CHECKING:
    from postformer.design import Model
    from postformer.design.grammar import Sublayer

CONTEXTS = (128, 1024, 8192, 65536, 1048576)


def explain(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or file.")],
    width: Width = None, layers: Layers = None, set_: Set = None, json: Json = False,
) -> None:
    """Show a recipe: the four choices of each memory, the stack, params, FLOPs, state against context, the BibTeX."""
    from postformer.design import DesignError, load, registry
    from postformer.design.papers import bibtex, title

    made = load(recipe, set_ or (), width, layers)
    model, cost, undeclared = made.model, None, ""
    try:
        cost = made.cost()
    except DesignError as e:  # a memory need not declare its cost, and can be trained all the same
        undeclared = e.message
    about: dict[str, Any] = {
        "name": made.name, "id": made.id, "paper": made.paper, "width": model.width, "layers": len(model.stack),
        "params": cost and cost.params, "memories": {}, "stack": list(model.stack),
        "flops_per_token": cost and {c: cost.flops(1, c - 1) for c in CONTEXTS},
        "state_bytes": cost and {c: cost.state_bytes(c) for c in CONTEXTS},
        "linear": model.linear.in_words, "depth": {},
    }
    print(f"{made.name} - {made.summary}" if made.summary else made.name)
    if made.paper:
        print(f"paper: {title(made.paper) or ''} (arXiv {made.paper})")
    print(f"id: {made.id[:16]}\n")
    for name, design in _mixers(model).items():
        for where, child in [(name, design), *registry.inside(design, name)]:
            kind = registry.resolve(child.kind)
            choices = kind.choices(child)
            if words := kind.words(child):
                print(f"{where} ({child.kind}): {words}")
            if choices is None:
                continue
            about["memories"][where] = choices._asdict()
            print(f"{where} ({child.kind})")
            for label, text in zip(("memory", "inner loss", "retention", "update", "equation"), choices, strict=True):
                print(f"  {label:<11} {text}")
    print(f"\nstack: width {model.width}, {len(model.stack)} layers, vocabulary {model.vocab}")
    for count, layer in _runs(list(model.stack)):
        print(f"  {count:>3} x  {_sequence(model, model.layers[layer])}")
    for where, depth in _depths(model).items():
        about["depth"][where] = depth.dump()
    for name, block in model.shared.items():
        copies = "" if block.copies == 1 else f", {block.copies} copies"
        print(f"  shared block {name}{copies}:  {_sequence(model, block.layer)}")
    if maps := model.linear.in_words:
        print(f"  linear maps: {maps}")
    if cost is None:
        print(f"\ncost: not declared by {undeclared.replace(' declares no cost', '')}")
    else:
        print(f"\nparams: {cost.params:,} ({number(cost.params)})")
        print(f"{'context':>10}  {'FLOPs/token':>12}  {'state of one sequence':>22}")
        for c in CONTEXTS:
            print(f"{c:>10,}  {number(cost.flops(1, c - 1)):>12}  {size(cost.state_bytes(c)):>22}")
        print("(FLOPs: two per multiply-add of a forward pass; state in fp32, key-value lists included)")
        if about["depth"]:
            print("(FLOPs of tokens whose depth adapts: mod at its capacity, loop and ode at the most steps)")
    if made.paper:
        print("\n" + bibtex(made.paper))
    finish(about, json)


def _mixers(model: Model) -> dict[str, Any]:
    """Every mixer that the stack uses: by its name, or where it is written if it stands inside a layer."""
    from postformer.design.plan import planned

    found: dict[str, Any] = dict(model.mixers)
    for layer in planned(model):
        for j, item in enumerate(layer):
            if item.design is not None and not isinstance(item.sublayer.use, str):
                found.setdefault(f"layers.{model.stack[item.place.layer]}.{j}", item.design)
    for name, block in model.shared.items():
        for j, sub in enumerate(block.layer):
            if not isinstance(sub.use, str):
                found[f"shared.{name}.layer.{j}"] = sub.use
    return found


def _sequence(model: Model, layer: Sequence[Sublayer]) -> str:
    """The sublayers of one layer, in words."""
    words = []
    for sub in layer:
        if not isinstance(sub.use, str):
            said = sub.use.kind
        elif sub.use in model.mixers:
            said = f"{sub.use} ({model.mixers[sub.use].kind})"
        else:
            said = f"{sub.use} (shared)"
        words.append(f"{said} [{depth}]" if (depth := sub.depth.in_words) else said)
    return "  then  ".join(words)


def _depths(model: Model) -> dict[str, Any]:
    """Every depth that is not fixed, by where it is written."""
    written = {f"layers.{name}": layer for name, layer in model.layers.items()}
    written |= {f"shared.{name}.layer": block.layer for name, block in model.shared.items()}
    return {f"{where}.{j}": sub.depth for where, layer in written.items() for j, sub in enumerate(layer)
            if sub.depth.in_words}


def _runs(stack: list[str]) -> list[tuple[int, str]]:
    """Consecutive equal layers counted."""
    found: list[tuple[int, str]] = []
    for name in stack:
        if found and found[-1][1] == name:
            found[-1] = (found[-1][0] + 1, name)
        else:
            found.append((1, name))
    return found
