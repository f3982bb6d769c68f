"""postformer verify: the proof tool, over shipped recipes and a user's own."""

from __future__ import annotations

from typing import Annotated

import typer

from postformer.cli.console import FAILED_CHECK, Json, Quiet, finish


def verify(
    recipes: Annotated[list[str] | None, typer.Argument(help="Names or files of recipes.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every shipped recipe.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Only checks whose name contains this. Repeatable.")] = None,
    full: Annotated[bool, typer.Option(help="At the recipe's own size instead of width 32 (slow).")] = False,
    quiet: Quiet = False, json: Json = False,
) -> None:
    """Check that designs keep the contract: causal, parallel = token by token, any split, packing, padding, cost."""
    from rich.console import Console

    from postformer.design import names
    from postformer.verify import Verification
    from postformer.verify import verify as run

    if not recipes and not all_:
        raise typer.BadParameter("name at least one recipe, or give --all")
    console, done = Console(highlight=False, soft_wrap=True), []
    for recipe in [*(recipes or []), *(names() if all_ else [])]:
        result: Verification = run(recipe, only=only or (), full=full)
        done.append(result)
        failed = [r for r in result.results if r.passed is False]
        skipped = [r for r in result.results if r.passed is None]
        checked = len(result.results) - len(skipped)
        verdict = "[green]ok[/]" if result.passed else f"[red]{len(failed)} FAILED[/]"
        console.print(f"{result.recipe:<20} {verdict}  {checked} checks in {result.seconds:.1f} s  ({result.size})")
        shown = result.results if (len(recipes or []) == 1 and not all_ and not quiet) else failed
        for r in shown:
            mark = {True: "[green]ok  [/]", False: "[red]FAIL[/]", None: "[dim]n/a [/]"}[r.passed]
            value = "" if r.passed is None else f"  {r.value:.1e} (<= {r.tolerance:.0e})"
            console.print(f"  {mark} {r.name}{value}" + (f"  [dim]{r.note}[/]" if r.note else ""))
        if not shown and skipped and not quiet:
            console.print(f"  [dim]not checked: {'; '.join(f'{r.name} ({r.note})' for r in skipped)}[/]")
    good = all(r.passed for r in done)
    if len(done) > 1:
        console.print(f"{sum(r.passed for r in done)} of {len(done)} recipes keep the contract")
    finish({"passed": good, "recipes": [
        {"recipe": r.recipe, "passed": r.passed, "seconds": round(r.seconds, 2), "size": r.size,
         "checks": [c.__dict__ for c in r.results]} for r in done]}, json)
    if not good:
        raise typer.Exit(FAILED_CHECK)
