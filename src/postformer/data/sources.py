"""Which documents a corpus is made of: files under a directory, one file, or Python's standard library.

Two rules make corpora comparable: the order of documents is fixed by a hash of their relative path (so that splits are
not alphabetical, and adding a file moves few others), and a document that appears twice is taken once (so that no test
document is in the training split). Large documents come first, and so into the training split: one of them could be
most of a held-out split.
"""

from __future__ import annotations

import hashlib
import os
import platform
import stat
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from postformer.data.errors import CorpusError

CHUNK = 1 << 20
SNIFF = 8192
ORDER_SEED = 0
LARGE = 0.0125
"""A document of more than this fraction of all bytes, a quarter of a held-out split, is large."""
# What a text may hold below 0x20: tab, line feed, vertical tab, form feed, carriage return, backspace, bell, escape.
TEXT_CONTROLS = bytes({7, 8, 9, 10, 11, 12, 13, 27})
CONTROLS = bytes(range(32))

# Tests, bundled wheels and what is not the library's own; tests are a third of the bytes and mostly tables.
STDLIB_EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}


@dataclass(frozen=True)
class Document:
    """One file: its name relative to the corpus, its place, size in bytes and the sha256 of its content."""

    name: str
    path: Path
    size: int
    sha256: str


@dataclass
class Collection:
    """The documents of a corpus in corpus order, and why files were left out."""

    source: str
    licence: str
    documents: list[Document] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def skip(self, reason: str, name: str) -> None:
        self.skipped.setdefault(reason, []).append(name)

    def notes(self) -> tuple[str, ...]:
        """One sentence for each reason."""
        return tuple(f"{len(names)} skipped, {reason}: {_some(names)}" for reason, names in self.skipped.items())


def _some(names: list[str], most: int = 3) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def chunks(path: Path) -> Iterator[bytes]:
    """The file's bytes in pieces."""
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            yield piece


def fingerprint(path: Path, algorithm: str = "sha256") -> tuple[int, str]:
    """(size, hash) of a file's content."""
    digest, size = hashlib.new(algorithm, usedforsecurity=False), 0
    for piece in chunks(path):
        digest.update(piece)
        size += len(piece)
    return size, digest.hexdigest()


def is_binary(head: bytes) -> bool:
    """Whether the first bytes of a file are not text: a zero byte, or more control characters than text ever has."""
    if b"\0" in head:
        return True
    controls = len(head) - len(head.translate(None, CONTROLS)) - sum(head.count(c) for c in TEXT_CONTROLS)
    return controls * 50 > len(head)


def one_file(path: Path) -> Collection:
    """A corpus of one file, taken as it is, whatever it holds."""
    try:
        size, digest = fingerprint(path)
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror}; check its permissions") from error
    collection = Collection(str(path), "as the file's owner states")
    if size:
        collection.documents.append(Document(path.name, path, size, digest))
    return collection


def directory(root: Path, without: Path | None = None) -> Collection:
    """All regular text files under a directory. Hidden ones, binary ones and linked directories are left out.

    `without` is a directory inside it that is no part of the corpus (the cache, if it lies there).
    """
    collection = Collection(str(root), "as the files' owners state")
    return _collect(root, collection, without=without)


def standard_library(root: Path | None = None) -> Collection:
    """The .py sources of the running Python's standard library, without its tests and bundled packages."""
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    if not root.is_dir():
        raise CorpusError(
            f"this Python has no standard library sources at {root}; name a file or a directory of text instead"
        )
    collection = Collection(f"Python {platform.python_version()} standard library", "PSF-2.0")
    return _collect(root, collection, excluded=frozenset(STDLIB_EXCLUDED), suffix=".py")


def _collect(
    root: Path,
    collection: Collection,
    excluded: frozenset[str] = frozenset(),
    suffix: str = "",
    without: Path | None = None,
) -> Collection:
    found: list[Document] = []
    for path in _walk(root, collection, excluded, without):
        name = path.relative_to(root).as_posix()
        if not name.endswith(suffix):
            continue
        try:
            # A pipe or a device would block or never end when read.
            if not stat.S_ISREG(path.stat().st_mode):
                collection.skip("not regular files", name)
                continue
            with path.open("rb") as file:
                binary = is_binary(file.read(SNIFF))
            size, digest = (0, "") if binary else fingerprint(path)
        except OSError:
            collection.skip("unreadable", name)
            continue
        if binary:
            collection.skip("binary", name)
        elif not size:
            collection.skip("empty", name)
        else:
            found.append(Document(name, path, size, digest))
    large = LARGE * sum(document.size for document in found)
    found.sort(key=lambda document: (document.size <= large, _order(document.name)))
    seen: set[str] = set()
    for document in found:
        if document.sha256 in seen:
            collection.skip("copies of another document", document.name)
        else:
            seen.add(document.sha256)
            collection.documents.append(document)
    return collection


def _order(name: str) -> bytes:
    return hashlib.sha256(f"{ORDER_SEED}:{name}".encode("utf-8", "surrogateescape")).digest()


def _walk(root: Path, collection: Collection, excluded: frozenset[str], without: Path | None) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        collection.skip("unreadable", Path(error.filename).relative_to(root).as_posix() + "/")

    for folder, folders, files in os.walk(root, onerror=unreadable):
        here = Path(folder)
        kept = []
        for name in sorted(folders):
            label = (here / name).relative_to(root).as_posix() + "/"
            if name in excluded or (without is not None and (here / name).resolve() == without.resolve()):
                continue
            if name.startswith("."):
                collection.skip("hidden", label)
            elif (here / name).is_symlink():
                collection.skip("linked directories", label)
            else:
                kept.append(name)
        folders[:] = kept
        for name in sorted(files):
            if name.startswith("."):
                collection.skip("hidden", (here / name).relative_to(root).as_posix())
            else:
                yield here / name
