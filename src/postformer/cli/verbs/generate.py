"""postformer generate: continue a prompt with a trained run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from postformer.cli.console import Json, Quiet, finish


def generate(
    run: Annotated[Path, typer.Argument(help="The directory of a trained run.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "def ",
    tokens: Annotated[int, typer.Option(min=1, help="How many to add.")] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the most likely.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Nucleus: smallest set with this probability.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the random draws.")] = 0,
    set_: Annotated[list[str] | None, typer.Option(
        "-s", "--set", metavar="FIELD=VALUE", help="top_k, min_p, repetition_penalty, stop=['...'].")] = None,
    quiet: Quiet = False, json: Json = False,
) -> None:
    """Continue a prompt, carrying the state: nothing is computed twice, and a constant state stays constant."""
    import time

    from postformer.api import Run
    from postformer.design.loading import override

    more: dict[str, Any] = {}
    for item in set_ or []:
        override(more, item)
    more = {"temperature": temperature, "top_p": top_p, "seed": seed, **more}
    pieces = Run(run).stream(prompt, tokens, **more)
    start, made = time.perf_counter(), bytearray()
    sys.stdout.write(prompt)
    pending = b""
    for raw in pieces:
        made += raw
        pending += raw
        try:
            sys.stdout.write(pending.decode("utf-8"))
            pending = b""
        except UnicodeDecodeError:
            if len(pending) > 3:
                sys.stdout.write(pending.decode("utf-8", errors="replace"))
                pending = b""
        sys.stdout.flush()
    seconds = time.perf_counter() - start
    print(pending.decode("utf-8", errors="replace"))
    if not quiet:
        print(f"\n{len(made)} bytes in {seconds:.2f} s ({len(made) / seconds:.0f}/s)", file=sys.stderr)
    finish({"prompt": prompt, "text": made.decode("utf-8", errors="replace"), "seconds": seconds}, json)
