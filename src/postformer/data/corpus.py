"""Corpora by name, as memory-mapped bytes in a training, a validation and a test split.

    stdlib          the running Python's standard library sources (always there; about 13 MB)
    enwik8          downloaded and checked; or enwik8:/path/to/enwik8 where there is no network
    a path          one file, or all regular text files under a directory

The splits are kept in one cache file whose name holds a hash of the content, so that a changed source is never read
from a stale copy. Files under a directory go to one split each as a whole (90/5/5 by bytes); a single file, and a
directory of too few files for that, is cut by bytes at line ends. Nothing is inserted between documents.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np

from postformer.data import cache as caching
from postformer.data import enwik8, sources
from postformer.data.errors import CorpusError, CorpusWarning

SPLITS = ("train", "validation", "test")
FRACTIONS = (0.90, 0.95)
"""Where validation and test begin, as fractions of the bytes."""
LINE_WINDOW = 0.024
"""How far from its place a cut may move to a line's end, as a fraction of the bytes (and 1 MiB at most)."""
EXPECTED = {"hidden", "empty", "copies of another document"}
"""Reasons for leaving a file out that are worth a note but no warning."""
FORMAT = 1
"""Of the cache files; part of their hash."""


@dataclass(frozen=True)
class Corpus:
    """Bytes to learn from.

    `train`, `validation` and `test` are read-only uint8 arrays mapped from the cache file `path`. `documents` holds,
    for each split's name, the int64 offsets in it at which documents begin; the first is 0. `digest` is the sha256 of
    content and order, `notes` says in sentences what was left out.
    """

    name: str
    source: str
    licence: str
    train: np.ndarray = field(repr=False)
    validation: np.ndarray = field(repr=False)
    test: np.ndarray = field(repr=False)
    documents: Mapping[str, np.ndarray] = field(repr=False)
    digest: str
    path: Path
    notes: tuple[str, ...] = ()

    def split(self, name: str) -> np.ndarray:
        """The split of that name: train, validation or test."""
        if name not in SPLITS:
            raise CorpusError(f"there is no split {name!r}; there are {', '.join(SPLITS)}")
        return getattr(self, name)


def load_corpus(name: str | os.PathLike[str], cache: str | os.PathLike[str] | None = None) -> Corpus:
    """The corpus of that name, or of the file or directory of that path.

    Args:
        name: "stdlib", "enwik8", "enwik8:PATH", or a path. A named corpus wins over a file of the same name: write
            "./stdlib" for the file.
        cache: the directory for prepared files; else the environment's POSTFORMER_CACHE, else the platform's.

    Warns (CorpusWarning) where files under a directory are left out because they are binary or cannot be read.
    Raises CorpusError for a path that does not exist, a corpus with nothing in it, a failed download or checksum, a
    cache directory that is full or cannot be written.
    """
    folder = caching.cache_dir(cache) / "corpora"
    label = os.fspath(name)
    if label in NAMED:
        return NAMED[label](folder)
    if label.startswith("enwik8:"):
        return _enwik8(folder, Path(label.removeprefix("enwik8:")).expanduser())
    path = Path(label).expanduser()
    if path.is_dir():
        collection = sources.directory(path, without=folder)
        missed = {reason: files for reason, files in collection.skipped.items() if reason not in EXPECTED}
        if missed:
            said = "; ".join(sources.Collection("", "", skipped=missed).notes())
            warnings.warn(f"corpus {label}: {said}", CorpusWarning, stacklevel=2)
        return _prepare(label, collection, folder)
    if path.is_file():
        return _prepare(label, sources.one_file(path), folder)
    close = difflib.get_close_matches(label, NAMED, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise CorpusError(
        f"there is no corpus named {label!r}{hint} and no file or directory of that path; "
        f"give a path that exists, or one of {', '.join(NAMED)}"
    )


def _stdlib(folder: Path) -> Corpus:
    return _prepare("stdlib", sources.standard_library(), folder)


def _enwik8(folder: Path, given: Path | None = None) -> Corpus:
    path = enwik8.obtain(given, folder)
    return _corpus("enwik8", enwik8.URL, enwik8.LICENCE, path, enwik8.split_points(), [0], enwik8.SHA1, ())


NAMED: dict[str, Callable[[Path], Corpus]] = {"stdlib": _stdlib, "enwik8": _enwik8}


def _prepare(name: str, collection: sources.Collection, folder: Path) -> Corpus:
    """Write the documents into the cache unless they are there, and cut them into splits."""
    documents, notes = collection.documents, collection.notes()
    total = sum(document.size for document in documents)
    if total < len(SPLITS):
        left_out = f" ({'; '.join(notes)})" if notes else ""
        raise CorpusError(
            f"corpus {name} is empty: it has {total} bytes of text{left_out}; "
            "name a file, or a directory that holds text files"
        )
    listing = "".join(f"{document.sha256} {document.size}\n" for document in documents)
    digest = hashlib.sha256(f"{FORMAT}\n{listing}".encode()).hexdigest()
    stem = re.sub(r"[^A-Za-z0-9]+", "-", Path(name).name).strip("-")[:40] or "corpus"
    path = folder / f"{stem}-{digest[:16]}.bin"
    if not (path.is_file() and path.stat().st_size == total):
        with caching.writing(path, total) as write:
            for document in documents:
                _copy(document, write)
    starts = np.cumsum([0] + [document.size for document in documents])
    points = _by_document(starts)
    if points is None:
        points = _by_line(np.memmap(path, dtype=np.uint8, mode="r"))
        if len(documents) > 1:
            notes += (f"{len(documents)} documents are too few to split whole: cut by bytes, at line ends",)
    return _corpus(name, collection.source, collection.licence, path, points, starts[:-1], digest, notes)


def _copy(document: sources.Document, write: Callable[[bytes], None]) -> None:
    digest = hashlib.sha256()
    try:
        for piece in sources.chunks(document.path):
            digest.update(piece)
            write(piece)
    except OSError as error:
        raise CorpusError(f"cannot read {document.path} ({error.strerror}); check its permissions") from error
    if digest.hexdigest() != document.sha256:
        raise CorpusError(f"{document.path} changed while it was read; run again when nothing writes to it")


def _corpus(
    name: str,
    source: str,
    licence: str,
    path: Path,
    points: tuple[int, int],
    starts: np.ndarray | list[int],
    digest: str,
    notes: tuple[str, ...],
) -> Corpus:
    data = np.memmap(path, dtype=np.uint8, mode="r")
    edges = (0, *points, len(data))
    splits, documents = {}, {}
    starts = np.asarray(starts, dtype=np.int64)
    for split, low, high in zip(SPLITS, edges[:-1], edges[1:], strict=True):
        splits[split] = data[low:high]
        inside = starts[(starts > low) & (starts < high)]
        documents[split] = np.concatenate([[0], inside - low])  # a document cut in two begins again
    return Corpus(
        name, source, licence, **splits, documents=MappingProxyType(documents), digest=digest, path=path, notes=notes
    )


def _by_document(starts: np.ndarray) -> tuple[int, int] | None:
    """The cuts, each document going where its middle lies; None if a split would be empty."""
    middle = (starts[:-1] + starts[1:]) / 2
    first, second = (int(np.searchsorted(middle, fraction * starts[-1])) for fraction in FRACTIONS)
    if not 0 < first < second < len(middle):
        return None
    return int(starts[first]), int(starts[second])


def _by_line(data: np.ndarray) -> tuple[int, int]:
    """The cuts, each after the line end nearest to its place; at least one byte in each split."""
    first, second = (_line_end(data, int(fraction * len(data))) for fraction in FRACTIONS)
    first = min(max(first, 1), len(data) - 2)
    return first, min(max(second, first + 1), len(data) - 1)


def _line_end(data: np.ndarray, place: int) -> int:
    reach = min(int(LINE_WINDOW * len(data)), 1 << 20)
    low = max(place - reach, 0)
    ends = np.flatnonzero(data[low : place + reach] == ord("\n")) + low + 1
    if len(ends):
        return int(ends[np.abs(ends - place).argmin()])
    for ahead in range(4):  # no line ends here: at least no character in two pieces (UTF-8 has at most 4 bytes)
        if place + ahead < len(data) and data[place + ahead] & 0xC0 != 0x80:
            return place + ahead
    return place
