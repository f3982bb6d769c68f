"""postformer list: the recipes, kinds, tasks and corpora there are."""

from __future__ import annotations

from postformer.cli.console import Json, finish


def list_(json: Json = False) -> None:
    """Show the recipes that ship with postformer, and the kinds and tasks known here."""
    import yaml

    from postformer.design import kinds, names
    from postformer.design.loading import shipped
    from postformer.task import names as task_names

    recipes = {}
    for name in names():
        raw = yaml.safe_load(shipped(name))
        recipes[name] = {"paper": raw.get("paper"), "summary": raw.get("summary", ""), "sizes": raw.get("sizes", {})}
    tasks = task_names()
    width = max(map(len, recipes))
    print("recipes")
    for name, about in recipes.items():
        print(f"  {name:<{width}}  {about['paper'] or '':<11} {about['summary']}")
        if about["sizes"]:
            print(f"  {'':<{width}}  {'':<11} also as {', '.join(f'{name}-{size}' for size in about['sizes'])}")
    print("\nkinds of mixers\n  " + ", ".join(kinds()))
    print("\ntasks\n  " + ", ".join(tasks))
    print("\ndata\n  stdlib, enwik8, or any file or directory")
    print("\n`postformer explain RECIPE` tells more; `postformer verify RECIPE` checks a recipe, yours included.")
    finish({"recipes": recipes, "kinds": kinds(), "tasks": tasks}, json)
