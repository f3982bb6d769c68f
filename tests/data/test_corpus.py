import errno
import os
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from postformer.data import CorpusError, CorpusWarning, cache_dir, load_corpus, sources
from postformer.data import cache as caching

SPLITS = ("train", "validation", "test")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def tree(tmp_path):
    """A hundred documents of 100 to 300 bytes, each line naming its document."""
    root = tmp_path / "tree"
    for i in range(100):
        path = root / f"part{i % 3}" / f"{i:03}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"document {i:03} says\n" * (5 + i % 10))
    return root


def whole(corpus):
    return b"".join(getattr(corpus, split).tobytes() for split in SPLITS)


def documents(corpus, split):
    starts = [*corpus.documents[split].tolist(), len(corpus.split(split))]
    return [corpus.split(split)[a:b].tobytes() for a, b in pairwise(starts)]


def test_a_directory_is_split_by_whole_documents(tree, cache):
    corpus = load_corpus(tree, cache)
    expected = sorted(path.read_bytes() for path in tree.rglob("*.txt"))
    assert sorted(text for split in SPLITS for text in documents(corpus, split)) == expected
    total = sum(map(len, expected))
    for split, fraction in zip(SPLITS, (0.9, 0.05, 0.05), strict=True):
        assert abs(len(corpus.split(split)) / total - fraction) < 0.02
    assert corpus.notes == ()


def test_the_order_is_not_alphabetical_and_the_same_wherever_the_files_lie(tree, cache, tmp_path):
    first = load_corpus(tree, cache)
    tree.rename(tmp_path / "elsewhere")
    second = load_corpus(tmp_path / "elsewhere", cache)
    assert whole(first) == whole(second)
    assert first.digest == second.digest
    order = documents(first, "train")
    assert order != sorted(order)


def test_splits_are_read_only_maps_of_one_cache_file(tree, cache):
    corpus = load_corpus(tree, cache)
    assert corpus.path.read_bytes() == whole(corpus)
    assert corpus.path.parent.parent == cache
    for split in SPLITS:
        array = corpus.split(split)
        assert isinstance(array, np.memmap)
        assert array.dtype == np.uint8
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_the_cache_file_is_used_again(tree, cache, monkeypatch):
    first = load_corpus(tree, cache)
    monkeypatch.setattr(caching.os, "write", lambda *_: pytest.fail("the cache was written again"))
    second = load_corpus(tree, cache)
    assert second.path == first.path
    assert whole(second) == whole(first)


def test_changed_content_never_comes_from_a_stale_cache(tree, cache):
    first = load_corpus(tree, cache)
    path = next(iter(sorted(tree.rglob("*.txt"))))
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b"says", b"SAYS"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same time
    second = load_corpus(tree, cache)
    assert second.path != first.path
    assert b"SAYS" in whole(second)
    assert b"SAYS" not in whole(first)


def test_a_truncated_cache_file_is_written_again(tree, cache):
    first = load_corpus(tree, cache)
    content = whole(first)
    path = first.path
    del first
    path.write_bytes(content[:10])
    assert whole(load_corpus(tree, cache)) == content


def test_a_single_file_is_cut_at_line_ends(tmp_path, cache):
    path = tmp_path / "text"
    lines = [f"line {i} {'x' * (i % 30)}\n" for i in range(1000)]
    path.write_text("".join(lines))
    corpus = load_corpus(path, cache)
    assert whole(corpus) == path.read_bytes()
    assert corpus.train.tobytes().endswith(b"\n")
    assert corpus.validation.tobytes().endswith(b"\n")
    total = path.stat().st_size
    assert abs(len(corpus.train) - 0.90 * total) < 40
    assert abs(len(corpus.validation) - 0.05 * total) < 80
    assert [corpus.documents[split].tolist() for split in SPLITS] == [[0], [0], [0]]


def test_without_line_ends_no_character_is_cut_in_two(tmp_path, cache):
    path = tmp_path / "text"
    path.write_text("漢" * 1111, encoding="utf-8")
    corpus = load_corpus(path, cache)
    for split in SPLITS:
        corpus.split(split).tobytes().decode("utf-8")
    assert whole(corpus) == path.read_bytes()


@pytest.mark.parametrize("size", [3, 4, 7, 20])
def test_every_split_of_a_tiny_file_has_something(tmp_path, cache, size):
    path = tmp_path / "text"
    path.write_bytes(b"\n" * size)
    corpus = load_corpus(path, cache)
    assert all(len(corpus.split(split)) >= 1 for split in SPLITS)
    assert len(whole(corpus)) == size


def test_a_few_large_documents_are_cut_by_bytes_and_that_is_said(tmp_path, cache):
    for i in range(3):
        (tmp_path / "few").mkdir(exist_ok=True)
        (tmp_path / "few" / f"{i}.txt").write_text(f"a line of document {i}\n" * 100)
    corpus = load_corpus(tmp_path / "few", cache)
    assert abs(len(corpus.train) / len(whole(corpus)) - 0.9) < 0.01
    assert "too few to split whole" in corpus.notes[-1]
    assert len(corpus.documents["train"]) == 3
    assert corpus.documents["validation"].tolist() == [0]


def test_a_large_document_does_not_fill_a_held_out_split(tree, cache):
    (tree / "large.txt").write_text("a long one\n" * 300)
    corpus = load_corpus(tree, cache)
    assert b"a long one" in corpus.train.tobytes()
    assert b"a long one" not in corpus.validation.tobytes() + corpus.test.tobytes()


def test_what_is_left_out_is_said(tree, cache):
    (tree / ".hidden").write_text("secret\n")
    (tree / ".git").mkdir()
    (tree / ".git" / "config").write_text("secret\n")
    (tree / "empty.txt").touch()
    (tree / "copy.txt").write_bytes((tree / "part0" / "000.txt").read_bytes())
    corpus = load_corpus(tree, cache)  # none of these is worth a warning
    assert b"secret" not in whole(corpus)
    assert whole(corpus).count(b"document 000 says\n") == 5
    assert any(note.startswith("2 skipped, hidden: .git/, .hidden") for note in corpus.notes)
    assert any("empty.txt" in note for note in corpus.notes)
    assert any("copies of another document" in note for note in corpus.notes)


def test_binary_files_are_left_out_with_a_warning(tree, cache):
    (tree / "image.bin").write_bytes(b"\x89PNG\0\0data")
    (tree / "noise").write_bytes(bytes(i * 7 % 255 + 1 for i in range(4000)))
    with pytest.warns(CorpusWarning, match=r"2 skipped, binary: image.bin, noise"):
        corpus = load_corpus(tree, cache)
    assert b"PNG" not in whole(corpus)


def test_text_in_other_encodings_is_text():
    assert not sources.is_binary("größer\t\r\n\x1b[0m".encode("latin-1"))
    assert not sources.is_binary("漢字".encode())
    assert not sources.is_binary(b"")


def test_links_and_pipes_do_no_harm(tree, cache, tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "outside.txt").write_text("outside\n")
    (tree / "loop").symlink_to(tree, target_is_directory=True)
    (tree / "linked.txt").symlink_to(tmp_path / "target" / "outside.txt")
    (tree / "broken.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tree / "pipe")
    with pytest.warns(CorpusWarning) as caught:
        corpus = load_corpus(tree, cache)
    said = str(caught[0].message)
    assert "linked directories: loop/" in said
    assert "unreadable: broken.txt" in said
    assert "not regular files: pipe" in said
    assert b"outside" in whole(corpus)


def test_the_cache_may_lie_inside_the_corpus(tree):
    first = load_corpus(tree, tree / "cache")
    second = load_corpus(tree, tree / "cache")
    assert first.digest == second.digest


def test_the_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("POSTFORMER_CACHE", str(tmp_path / "a"))
    assert cache_dir() == tmp_path / "a"
    assert cache_dir(tmp_path / "b") == tmp_path / "b"
    monkeypatch.delenv("POSTFORMER_CACHE")
    monkeypatch.setattr(caching.sys, "platform", "linux")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == Path.home() / ".cache" / "postformer"


def test_the_standard_library(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTFORMER_CACHE", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        corpus = load_corpus("stdlib")
    assert corpus.licence == "PSF-2.0"
    assert corpus.source.startswith("Python 3.")
    total = len(whole(corpus))
    assert total > 5_000_000
    assert 0.88 < len(corpus.train) / total < 0.92
    assert min(len(corpus.documents[split]) for split in SPLITS) >= 10
    assert whole(load_corpus("stdlib")) == whole(corpus)
    names = [document.name for document in sources.standard_library().documents]
    assert not [name for name in names if {"test", "tests", "site-packages", "idle_test"} & set(name.split("/"))]
    assert "json/decoder.py" in names
    assert all(name.endswith(".py") for name in names)


def test_a_python_without_sources_says_so(tmp_path):
    with pytest.raises(CorpusError, match="no standard library sources"):
        sources.standard_library(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stdlb", r"no corpus named 'stdlb' \(did you mean 'stdlib'\?\)"),
        ("no/such/path", "no file or directory of that path; give a path that exists, or one of stdlib, enwik8"),
    ],
)
def test_unknown_names_and_paths(name, message, cache):
    with pytest.raises(CorpusError, match=message):
        load_corpus(name, cache)


def test_empty_corpora_are_refused(tmp_path, cache):
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing").touch()
    for name in ("empty", "nothing"):
        with pytest.raises(CorpusError, match="is empty: it has 0 bytes"):
            load_corpus(tmp_path / name, cache)
    (tmp_path / "empty" / ".hidden").write_text("text")
    with pytest.raises(CorpusError, match=r"1 skipped, hidden: \.hidden"):
        load_corpus(tmp_path / "empty", cache)
    assert not cache.exists()


def test_an_unknown_split_is_refused(tree, cache):
    with pytest.raises(CorpusError, match="there are train, validation, test"):
        load_corpus(tree, cache).split("valid")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_message_and_leaves_nothing(tree, cache, monkeypatch, code):
    original, calls = os.write, []

    def write(descriptor, data):
        calls.append(len(data))
        if len(calls) > 3:
            raise OSError(code, os.strerror(code))
        return original(descriptor, data)

    monkeypatch.setattr(caching.os, "write", write)
    with pytest.raises(CorpusError, match=r"no space left in .*POSTFORMER_CACHE"):
        load_corpus(tree, cache)
    assert list((cache / "corpora").iterdir()) == []


def test_an_interrupted_write_leaves_nothing(tree, cache, monkeypatch):
    def write(descriptor, data):
        raise KeyboardInterrupt

    monkeypatch.setattr(caching.os, "write", write)
    with pytest.raises(KeyboardInterrupt):
        load_corpus(tree, cache)
    assert list((cache / "corpora").iterdir()) == []


def test_short_writes_are_continued(tree, cache, monkeypatch):
    original = os.write
    monkeypatch.setattr(caching.os, "write", lambda descriptor, data: original(descriptor, data[:7]))
    corpus = load_corpus(tree, cache)
    assert len(whole(corpus)) == sum(path.stat().st_size for path in tree.rglob("*.txt"))


def test_a_cache_that_is_no_directory(tree, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CorpusError, match="cannot write the corpus cache"):
        load_corpus(tree, tmp_path / "file")


def test_a_file_that_changes_while_it_is_read(tmp_path, cache, monkeypatch):
    path = tmp_path / "text"
    path.write_text("before\n" * 10)
    original = sources.one_file

    def one_file(path):
        collection = original(path)
        path.write_text("after!\n" * 10)
        return collection

    monkeypatch.setattr(sources, "one_file", one_file)
    with pytest.raises(CorpusError, match="changed while it was read"):
        load_corpus(path, cache)
    assert list((cache / "corpora").iterdir()) == []
