"""enwik8: the first 100,000,000 bytes of an English Wikipedia dump of 2006, the usual byte-level benchmark.

Bits per byte on it are comparable only for these bytes and this split: 90, 5 and 5 million bytes in order. The file is
therefore checked by its published sha1 before it is used.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import io
import urllib.request
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

from postformer.data import cache, sources
from postformer.data.errors import CorpusError

URL = "http://mattmahoney.net/dc/enwik8.zip"
SIZE = 100_000_000
SHA1 = "57b8363b814821dc9d47aa4d41f58733519076b2"
LICENCE = "CC BY-SA and GFDL (Wikipedia)"
TIMEOUT = 30
OFFLINE = "where there is no network, bring the file and name it: enwik8:/path/to/enwik8 (plain, .zip or .gz)"


def split_points() -> tuple[int, int]:
    """Where validation and test begin."""
    return SIZE * 90 // 100, SIZE * 95 // 100


def obtain(given: Path | None, folder: Path) -> Path:
    """The verified plain file in the cache folder, from the given file or, if None, from the standard address.

    Raises CorpusError when the file is missing, is not enwik8, cannot be downloaded or cannot be stored.
    """
    path = folder / f"enwik8-{SHA1[:16]}.bin"
    cached = path.is_file() and sources.fingerprint(path, "sha1") == (SIZE, SHA1)
    if given is None:
        if not cached:
            _store(_verified(_download(), URL), path)
        return path
    try:
        with given.open("rb") as file:
            pieces = _verified(file, str(given))
            if cached:
                deque(pieces, maxlen=0)  # read to the end: a file that was named is never ignored
            else:
                _store(pieces, path)
    except OSError as error:
        raise CorpusError(f"cannot read {given} ({error.strerror}); {OFFLINE}") from error
    return path


def _store(pieces: Iterator[bytes], path: Path) -> None:
    with cache.writing(path, SIZE) as write:
        for piece in pieces:
            write(piece)


def _verified(file: BinaryIO, label: str) -> Iterator[bytes]:
    """The plain bytes; ends in a CorpusError if they were not enwik8's."""
    digest, size = hashlib.sha1(usedforsecurity=False), 0
    try:
        for piece in _plain(file):
            digest.update(piece)
            size += len(piece)
            if size > SIZE:
                break
            yield piece
    except (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise CorpusError(f"{label} is a damaged archive ({error}); fetch it again from {URL}") from error
    if (size, digest.hexdigest()) != (SIZE, SHA1):
        amount = f"more than {SIZE:,} bytes" if size > SIZE else f"{size:,} bytes and sha1 {digest.hexdigest()}"
        raise CorpusError(
            f"{label} is not enwik8: it has {amount}, not {SIZE:,} and {SHA1}; fetch it again from {URL}, "
            "or name the file without 'enwik8:' to use it as a corpus of its own"
        )


def _plain(file: BinaryIO) -> Iterator[bytes]:
    magic = file.read(4)
    file.seek(0)
    with contextlib.ExitStack() as stack:
        stream: IO[bytes] | gzip.GzipFile = file
        if magic[:2] == b"\x1f\x8b":
            stream = stack.enter_context(gzip.open(file))
        elif magic == b"PK\x03\x04":
            archive = stack.enter_context(zipfile.ZipFile(file))
            if not archive.namelist():
                raise zipfile.BadZipFile("nothing in it")
            stream = stack.enter_context(archive.open(archive.namelist()[0]))
        while piece := stream.read(sources.CHUNK):
            yield piece


def _download() -> BinaryIO:
    try:
        with urllib.request.urlopen(URL, timeout=TIMEOUT) as response:
            return io.BytesIO(response.read(SIZE))
    except (OSError, http.client.HTTPException) as error:
        raise CorpusError(f"cannot download {URL} ({error}); {OFFLINE}") from error
