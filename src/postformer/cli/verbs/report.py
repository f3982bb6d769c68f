"""postformer report: one page about any runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from postformer.cli.console import Json, finish


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, or one demo or gauntlet directory.")],
    out: Annotated[Path | None, typer.Option(help="The file to write; default report.html in the first.")] = None,
    json: Json = False,
) -> None:
    """Write one self-contained HTML page about runs: curves, costs, the commands that made them."""
    from postformer.report import render
    from postformer.report.reading import unreadable

    missing = unreadable(runs)
    page = render(runs if len(runs) > 1 else runs[0], out)
    for directory, reason in missing.items():
        print(f"postformer: warning: {directory} has nothing to show: {reason}. The page lists it as failed.",
              file=sys.stderr)
    print(f"report: {page}")
    finish({"report": str(page), "missing": list(missing)}, json)
