"""What every verb shares: how results and errors are printed, overrides, and the exit codes.

Exit codes: 0 done; 1 an error of our own; 2 wrong input (recipe, data, options, a directory in use); 3 the loss is not
finite; 4 out of memory; 5 the disk is full; 6 a checkpoint cannot be read; 7 a check of `verify` failed; 130
interrupted, after saving.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

WRONG_INPUT, FULL, FAILED_CHECK, INTERRUPTED = 2, 5, 7, 130

Width = Annotated[int | None, typer.Option("--width", help="Scale the design to this many channels.")]
Layers = Annotated[int | None, typer.Option("--layers", help="Scale the design to this many layers.")]
Set = Annotated[list[str] | None, typer.Option(
    "-s", "--set", metavar="PATH=VALUE", help="Override one field, e.g. -s model.mixers.memory.loss=l2. Repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="End with one line of JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results only.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]


def finish(result: dict[str, Any], as_json: bool) -> None:
    """The machine's line, last on standard output."""
    if as_json:
        sys.stdout.flush()
        print(json.dumps(result, default=str), flush=True)


def split_overrides(items: Sequence[str] | None) -> tuple[list[str], dict[str, Any]]:
    """(overrides of the design, nested mapping of those that begin with train.)."""
    design, train = [], {}
    for item in items or []:
        if not item.startswith("train."):
            design.append(item)
            continue
        import yaml

        path, _, text = item.removeprefix("train.").partition("=")
        at = train
        *parents, last = path.split(".")
        for part in parents:
            at = at.setdefault(part, {})
        at[last] = yaml.safe_load(text)
    return design, train


def fail(message: str, code: int) -> None:
    """One clear line on standard error, then out."""
    text = " ".join(str(message).split())
    print(f"postformer: {text}", file=sys.stderr, flush=True)
    raise SystemExit(code)


@contextmanager
def guarded() -> Iterator[None]:
    """Errors a user can meet become one line with the remedy and a documented exit code; ours keep their trace."""
    try:
        yield
    except (SystemExit, typer.Exit):
        raise
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except OSError as e:
        if e.errno == errno.ENOSPC:
            fail(f"the disk is full ({e.filename or 'while writing'}). Free some space and run the same command again; "
                 "what was saved before is intact.", FULL)
        if isinstance(e, (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)):
            fail(f"{e.filename}: {e.strerror}. Check the path.", WRONG_INPUT)
        raise
    except Exception as e:
        code = getattr(e, "exit_code", None)
        if code is None and isinstance(e, ValueError) and _is_ours(e):
            code = WRONG_INPUT
        if code is None:
            print("postformer: this is an error of postformer's own; please report it with the trace below.",
                  file=sys.stderr)
            raise
        fail(_plain(e), code)


def _is_ours(error: ValueError) -> bool:
    """Raised by postformer on purpose (its text is a remedy), or by pydantic about a configuration."""
    if hasattr(error, "errors"):
        return True
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return bool(trace) and "postformer" in trace.tb_frame.f_code.co_filename


def _plain(error: Exception) -> str:
    if hasattr(error, "errors") and not hasattr(error, "message"):
        first = error.errors()[0]  # type: ignore[attr-defined]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']} (got {first.get('input')!r})"
    return str(error)


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
