"""postformer demo: the main job, in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from postformer.cli.console import Json, Quiet, finish


def demo(
    minutes: Annotated[float, typer.Option(min=0.1, help="Time to spend, on two CPU cores.")] = 4.0,
    out: Annotated[Path, typer.Option(help="Directory of the runs and the page.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    quiet: Quiet = False, json: Json = False,
) -> None:
    """Train five very different architectures on the same work and show what each can and cannot do, on one page."""
    from postformer.report import render
    from postformer.study.demo import run_demo

    run_demo(out, minutes=minutes, seed=seed, quiet=quiet)
    page = render(out)
    print(f"report: {page}")
    finish({"report": str(page), "directory": str(out)}, json)
