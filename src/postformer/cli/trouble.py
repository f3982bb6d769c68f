"""What a verb raises: who is to blame, what is printed, and the exit code.

Exit codes: 0 done; 1 an unexpected error, with its trace; 2 wrong input (recipe, data, options, a directory in use);
3 the loss is not finite; 4 out of memory; 5 the disk is full; 6 a checkpoint cannot be read; 7 a check of `verify`
failed; 130 interrupted, after saving.
"""

from __future__ import annotations

import errno
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import typer

import postformer
from postformer.cli.console import FULL, INTERRUPTED, UNEXPECTED, WRONG_INPUT, fail, failed, settle

# Of click's, which recent typer carries a copy of: found through what typer itself offers.
USAGE: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
PATHS = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)


def run(app: typer.Typer) -> NoReturn:
    """The application on the arguments of the process, then out of it."""
    with guarded():
        code = app(prog_name="postformer", standalone_mode=False)
        if code == INTERRUPTED:  # what click makes of Ctrl-C
            fail("interrupted", INTERRUPTED)
        settle()
        sys.exit(code if isinstance(code, int) else 0)
    raise AssertionError("unreachable")


@contextmanager
def guarded() -> Iterator[None]:
    """Errors a user can meet become one line with the remedy and a documented exit code; others keep their trace."""
    try:
        yield
    except SystemExit as e:
        if _closed_pipe(e.__context__):  # click's own answer to a closed pipe is exit 1
            _reader_has_gone()
        raise
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted", INTERRUPTED)
    except USAGE as e:
        _usage(e)
    except OSError as e:
        if _closed_pipe(e):
            _reader_has_gone()
        if e.errno == errno.ENOSPC:
            fail(f"the disk is full ({e.filename or 'while writing'}). Free some space and run the same command again; "
                 "what was saved before is intact.", FULL)
        if isinstance(e, PATHS) and e.filename is not None:
            fail(f"{e.filename}: {e.strerror}. Check the path.", WRONG_INPUT)
        _unexpected(e)
        raise
    except Exception as e:
        code = getattr(e, "exit_code", None)
        if code is None and isinstance(e, (ValueError, TypeError)) and _on_purpose(e):
            code = WRONG_INPUT
        if code is None:
            _unexpected(e)
            raise
        fail(_plain(e), code)


def _closed_pipe(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno == errno.EPIPE


def _reader_has_gone() -> NoReturn:
    """`postformer ... | head`: nobody reads the rest, which is no failure; what is still buffered goes nowhere."""
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # click has put something around them
    settle()
    raise SystemExit(0) from None


def _usage(error: BaseException) -> NoReturn:
    """Wrong options, as typer words them."""
    try:
        from typer.rich_utils import rich_format_error

        rich_format_error(error)  # type: ignore[arg-type]
    except ImportError:
        error.show()  # type: ignore[attr-defined]
    if type(error).__name__ != "NoArgsIsHelpError":  # that one has shown the help
        failed(error.format_message(), error.exit_code)  # type: ignore[attr-defined]
    raise SystemExit(error.exit_code)  # type: ignore[attr-defined]


def _unexpected(error: Exception) -> None:
    """Says whose error it seems to be; the trace follows."""
    frames = traceback.extract_tb(error.__traceback__)
    what = f"{type(error).__name__}: {' '.join(str(error).split())}"
    place = _theirs(frames)
    if place is None:
        text = "this is an error of postformer's own; please report it with the trace below."
    else:
        text = f"{place.filename}:{place.lineno} raised {what}. It is not part of postformer; the trace is below."
    print(f"postformer: {text}", file=sys.stderr, flush=True)
    failed(what if place is None else text, UNEXPECTED)


def _theirs(frames: traceback.StackSummary) -> traceback.FrameSummary | None:
    """The frame to blame where the innermost one is not ours: of the user's code if it is on the way, rather than of
    an installed library that it called."""
    if not frames or _ours(frames[-1].filename):
        return None
    installed = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]
    users = [f for f in frames if not _ours(f.filename) and Path(f.filename).is_file()
             and not any(Path(f.filename).resolve().is_relative_to(at.resolve()) for at in installed)]
    return users[-1] if users else frames[-1]


def _ours(filename: str) -> bool:
    """Of a file of this package; a checkout or an environment may well lie in a directory called postformer."""
    return Path(filename).resolve().is_relative_to(Path(postformer.__file__).resolve().parent)


def _on_purpose(error: ValueError | TypeError) -> bool:
    """Raised by postformer (its text is a remedy), of a class of postformer's, or by pydantic about a configuration. A
    TypeError comes from a mistake of ours just as well as from a check of what a user's class returns: only what a
    `raise` of ours raises is on purpose."""
    if type(error).__module__.partition(".")[0] in ("postformer", "pydantic_core"):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not _ours(frames[-1].filename):
        return False
    return isinstance(error, ValueError) or (frames[-1].line or "").lstrip().startswith("raise ")


def _plain(error: Exception) -> str:
    if hasattr(error, "errors") and not hasattr(error, "message"):
        first = error.errors()[0]  # type: ignore[attr-defined]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']} (got {first.get('input')!r})"
    return str(error)
