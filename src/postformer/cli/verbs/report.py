"""postformer report: one page about any runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from postformer.cli.console import Json, finish


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, or one demo directory.")],
    out: Annotated[Path | None, typer.Option(help="The file to write; default report.html in the first.")] = None,
    json: Json = False,
) -> None:
    """Write one self-contained HTML page about runs: curves, costs, the commands that made them."""
    from postformer.report import render

    page = render(runs if len(runs) > 1 else runs[0], out)
    print(f"report: {page}")
    finish({"report": str(page)}, json)
