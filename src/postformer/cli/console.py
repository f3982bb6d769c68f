"""What every verb shares: options, overrides, and how results are printed; `trouble` has the errors and exit codes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer

UNEXPECTED, WRONG_INPUT, FULL, FAILED_CHECK, INTERRUPTED = 1, 2, 5, 7, 130

Width = Annotated[int | None, typer.Option("--width", help="Scale the design to this many channels.")]
Layers = Annotated[int | None, typer.Option("--layers", help="Scale the design to this many layers.")]
Set = Annotated[list[str] | None, typer.Option(
    "-s", "--set", metavar="PATH=VALUE", help="Override one field, e.g. -s model.mixers.memory.loss=l2. Repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="End with one line of JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results only.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]


def split_overrides(items: Sequence[str] | None) -> tuple[list[str], dict[str, Any]]:
    """(overrides of the design, nested mapping of those that begin with train.). Raises DesignError."""
    design, data = [], {"train": {}}
    for item in items or []:
        if not item.startswith("train."):
            design.append(item)
            continue
        from postformer.design.base import DesignError
        from postformer.design.loading import override

        at, path = data, item.partition("=")[0].split(".")
        for depth, part in enumerate(path[:-1]):
            at = at.get(part, {})
            if not isinstance(at, dict):
                raise DesignError(f"an earlier override made this {at!r}, which has no fields; give one of the two",
                                  path=".".join(path[: depth + 1]))
        override(data, item)
    return design, data["train"]


def plain(value: Any) -> Any:
    """What JSON can say: a number that is not finite becomes null, what is no JSON becomes text."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def finish(result: dict[str, Any], as_json: bool) -> None:
    """The machine's line, last on standard output."""
    if as_json:
        print(json.dumps(plain(result), allow_nan=False), flush=True)


def fail(message: str, code: int) -> NoReturn:
    """One clear line on standard error, the same in JSON if that was asked for, then out."""
    text = " ".join(str(message).split())
    with contextlib.suppress(BrokenPipeError):
        print(f"postformer: {text}", file=sys.stderr, flush=True)
    with contextlib.suppress(BrokenPipeError):
        failed(text, code)
    settle()
    raise SystemExit(code)


def settle() -> None:
    """Write what is buffered; if its reader has gone (`| head`), let it go, since Python would complain at the end."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def failed(text: str, code: int) -> None:
    """The machine's line of a failure. The options may not have been read when it happens, so the words themselves are
    looked at."""
    finish({"error": text, "exit_code": code}, "--json" in sys.argv[1:])


def number(value: float) -> str:
    """1234567 -> 1.23 M"""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def size(value: float) -> str:
    """Bytes, binary units."""
    for limit, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.0f} B"
