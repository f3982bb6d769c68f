"""postformer gauntlet: designs against tasks, to one compared result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from postformer.cli.console import Json, Quiet, finish


def gauntlet(
    recipes: Annotated[list[str] | None, typer.Argument(
        help="[LABEL=]RECIPE[@PATH=VALUE;...], names or files; the first is the measure for --match.")] = None,
    tier: Annotated[str, typer.Option(help="sprint, recall, palimpsest, standard or paper.")] = "sprint",
    tasks: Annotated[str | None, typer.Option(help="Only these, by name, with commas between.")] = None,
    match: Annotated[str | None, typer.Option(help="Make designs equal in params, flops or state.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trials that count, per design and task.")] = 3,
    out: Annotated[Path, typer.Option(help="Directory; the same one continues.")] = Path("runs/gauntlet"),
    workers: Annotated[str | None, typer.Option(
        metavar="NUMBER|ray", help="Processes of one thread each, default one per core; or a Ray cluster.")] = None,
    merge: Annotated[Path | None, typer.Option(help="A ledger.jsonl of another machine to take over first.")] = None,
    claims: Annotated[bool, typer.Option(help="Judge what is claimed in the literature, by this study.")] = False,
    set_: Annotated[list[str] | None, typer.Option(
        "-s", "--set", metavar="[TASK.]FIELD=VALUE", help="Change entries, e.g. -s mqar.tokens=500000.")] = None,
    quiet: Quiet = False, json: Json = False,
) -> None:
    """Train every design on every task, learning rates swept and seeds repeated, and show who can do what."""
    if not recipes and not claims:
        raise typer.BadParameter("name a recipe, for instance `postformer gauntlet transformer gated-deltanet`; "
                                 "`postformer list` shows them")
    from postformer.report import render

    found: dict[str, Any] | None = None
    if recipes:
        found = _run(recipes, tier, tasks, match, seeds, out, workers, merge, set_ or [], quiet)
    if claims:
        found = _judge(out, found, quiet)
    page = render(out)
    print(f"report: {page}")
    failed = sum(cell["status"] == "failed" for cell in (found or {}).get("cells", []))
    if failed:
        print(f"{failed} of {len((found or {})['cells'])} designs on tasks failed; the report says why")
    finish({"report": str(page), "directory": str(out), "failed": failed}, json)


def _run(recipes: list[str], tier: str, tasks: str | None, match: str | None, seeds: int, out: Path,
         workers: str | None, merge: Path | None, changes: list[str], quiet: bool) -> dict[str, Any]:
    from postformer.study.asking import ask
    from postformer.study.gauntlet import command_line, run_gauntlet

    if workers is not None and workers != "ray" and not (workers.isdigit() and int(workers)):
        raise typer.BadParameter(f"--workers is {workers!r}; give a number of processes, or ray")
    count = "ray" if workers == "ray" else workers and int(workers)
    text = None if merge is None else merge.read_text(encoding="utf-8")
    plan = ask(recipes, tier, tasks, match=match, seeds=seeds, changes=changes, command=command_line(
        f"postformer gauntlet {' '.join(recipes)}"))
    if not quiet:
        for line in plan.lines():
            print(line)
    return run_gauntlet(plan, out, workers=count or None, merge=text, progress=(lambda _: None) if quiet else None)


def _judge(out: Path, found: dict[str, Any] | None, quiet: bool) -> dict[str, Any]:
    from postformer.study.claims import REMARKS, claims
    from postformer.study.results import claims_only, read, write

    results = found or read(out) or claims_only()
    judged = claims(results if results["designs"] else None, quick=True)
    results["claims"] = [claim.model_dump(mode="json") for claim in judged]
    results["remarks"] = list(REMARKS)
    write(out, results)
    if not quiet:
        for claim in judged:
            print(f"{claim.id:4} {claim.verdict}: {claim.statement}")
    return results
