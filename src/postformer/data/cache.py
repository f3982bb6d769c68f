"""Where corpora are kept as flat files of bytes, and how they get there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from postformer.data.errors import CorpusError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REMEDY = "choose another place by setting POSTFORMER_CACHE to a directory, or pass cache="


def cache_dir(cache: str | os.PathLike[str] | None = None) -> Path:
    """The cache directory: the argument, else the environment's POSTFORMER_CACHE, else the platform's place for it."""
    chosen = cache or os.environ.get("POSTFORMER_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        return Path(os.environ["LOCALAPPDATA"]) / "postformer" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "postformer"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "postformer"


@contextlib.contextmanager
def writing(path: Path, need: int) -> Iterator[Callable[[bytes], None]]:
    """A function that appends bytes to what becomes `path` when the block ends well, and vanishes when it does not.

    `need` is how many bytes will be written, for the message. Raises CorpusError when the disk is full or the
    directory cannot be written. Another process may write the same path meanwhile: the last one wins, both are whole.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise _failure(path, need, error) from error

    def write(piece: bytes) -> None:
        view = memoryview(piece)
        try:
            while view:
                view = view[os.write(descriptor, view) :]
        except OSError as error:
            raise _failure(path, need, error) from error

    try:
        try:
            yield write
            try:
                os.fsync(descriptor)  # the name must not outlive a power cut that its bytes did not
            except OSError as error:
                raise _failure(path, need, error) from error
        finally:
            os.close(descriptor)
        try:
            os.replace(name, path)
        except OSError as error:
            raise _failure(path, need, error) from error
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _failure(path: Path, need: int, error: OSError) -> CorpusError:
    if error.errno in FULL:
        return CorpusError(
            f"no space left in {path.parent} to store {need:,} bytes of corpus ({error.strerror}); "
            f"free some, or {REMEDY}"
        )
    return CorpusError(f"cannot write the corpus cache in {path.parent} ({error.strerror}); {REMEDY}")
