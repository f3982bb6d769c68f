"""postformer explain: what a recipe is, what it costs, and where it comes from."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from postformer.cli.console import Json, Layers, Set, Width, finish, number, size, split_overrides

CONTEXTS = (128, 1024, 8192, 65536, 1048576)


def explain(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or file.")],
    width: Width = None, layers: Layers = None, set_: Set = None, json: Json = False,
) -> None:
    """Show a recipe: the four choices of each memory, the stack, params, FLOPs, state against context, the BibTeX."""
    from postformer.design import load, registry
    from postformer.design.papers import bibtex, title

    made = load(recipe, split_overrides(set_)[0], width, layers)
    model, cost = made.model, made.cost()
    about: dict[str, Any] = {
        "name": made.name, "id": made.id, "paper": made.paper, "width": model.width, "layers": len(model.stack),
        "params": cost.params, "memories": {}, "stack": list(model.stack),
        "flops_per_token": {c: cost.flops(1, c - 1) for c in CONTEXTS},
        "state_bytes": {c: cost.state_bytes(c) for c in CONTEXTS},
    }
    print(f"{made.name} - {made.summary}" if made.summary else made.name)
    if made.paper:
        print(f"paper: {title(made.paper) or ''} (arXiv {made.paper})")
    print(f"id: {made.id[:16]}\n")
    for name, design in model.mixers.items():
        for where, child in [(name, design), *_children(name, design)]:
            choices = registry.resolve(child.kind).choices(child)
            if choices is None:
                continue
            about["memories"][where] = choices._asdict()
            print(f"{where} ({child.kind})")
            for label, text in zip(("memory", "inner loss", "retention", "update", "equation"), choices, strict=True):
                print(f"  {label:<11} {text}")
    print(f"\nstack: width {model.width}, {len(model.stack)} layers, vocabulary {model.vocab}")
    for count, layer in _runs(list(model.stack)):
        parts = [s.use if isinstance(s.use, str) else s.use.kind for s in model.layers[layer]]
        kinds = [f"{p} ({model.mixers[p].kind})" if p in model.mixers else f"{p} (shared)" for p in parts]
        print(f"  {count:>3} x  {'  then  '.join(kinds)}")
    print(f"\nparams: {cost.params:,} ({number(cost.params)})")
    print(f"{'context':>10}  {'FLOPs/token':>12}  {'state of one sequence':>22}")
    for c in CONTEXTS:
        print(f"{c:>10,}  {number(cost.flops(1, c - 1)):>12}  {size(cost.state_bytes(c)):>22}")
    print("(FLOPs: two per multiply-add of a forward pass; state in fp32, key-value lists included)")
    if made.paper:
        print("\n" + bibtex(made.paper))
    finish(about, json)


def _children(name: str, design: Any) -> list[tuple[str, Any]]:
    """Mixers inside a composite."""
    found = []
    for i, child in enumerate(getattr(design, "of", ())):
        found += [(f"{name}.of.{i}", child), *_children(f"{name}.of.{i}", child)]
    return found


def _runs(stack: list[str]) -> list[tuple[int, str]]:
    """Consecutive equal layers counted."""
    found: list[tuple[int, str]] = []
    for name in stack:
        if found and found[-1][1] == name:
            found[-1] = (found[-1][0] + 1, name)
        else:
            found.append((1, name))
    return found
