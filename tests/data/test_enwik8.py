import gzip
import hashlib
import io
import urllib.error
import zipfile

import pytest

from postformer.data import CorpusError, enwik8, load_corpus

CONTENT = bytes(i * i % 251 for i in range(2000))


@pytest.fixture
def small(monkeypatch):
    """The real code with a file of 2,000 bytes in place of the real one."""
    monkeypatch.setattr(enwik8, "SIZE", len(CONTENT))
    monkeypatch.setattr(enwik8, "SHA1", hashlib.sha1(CONTENT, usedforsecurity=False).hexdigest())


@pytest.fixture
def network(monkeypatch):
    """A network that serves what is put into it, and fails while it is empty."""
    served = {}

    def urlopen(url, timeout):
        if url not in served:
            raise urllib.error.URLError("no route to host")
        return io.BytesIO(served[url])

    monkeypatch.setattr(enwik8.urllib.request, "urlopen", urlopen)
    return served


def zipped(content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("enwik8", content)
    return buffer.getvalue()


def test_the_published_numbers():
    assert enwik8.SIZE == 100_000_000
    assert enwik8.split_points() == (90_000_000, 95_000_000)
    assert enwik8.SHA1 == "57b8363b814821dc9d47aa4d41f58733519076b2"


@pytest.mark.parametrize("wrap", [lambda content: content, gzip.compress, zipped], ids=["plain", "gz", "zip"])
def test_a_given_file_is_verified_and_split_exactly(small, tmp_path, wrap):
    path = tmp_path / "given"
    path.write_bytes(wrap(CONTENT))
    corpus = load_corpus(f"enwik8:{path}", tmp_path / "cache")
    assert corpus.train.tobytes() == CONTENT[:1800]
    assert corpus.validation.tobytes() == CONTENT[1800:1900]
    assert corpus.test.tobytes() == CONTENT[1900:]
    assert corpus.name == "enwik8"
    assert "Wikipedia" in corpus.licence


def test_a_fake_file_is_rejected_and_leaves_nothing(tmp_path):
    path = tmp_path / "fake"
    path.write_bytes(b"not Wikipedia\n" * 10)
    with pytest.raises(CorpusError, match=r"is not enwik8: it has 140 bytes .*sha1"):
        load_corpus(f"enwik8:{path}", tmp_path / "cache")
    assert list((tmp_path / "cache" / "corpora").iterdir()) == []


def test_the_right_size_with_one_bit_wrong_is_rejected_even_beside_a_good_cache(small, tmp_path, network):
    network[enwik8.URL] = zipped(CONTENT)
    load_corpus("enwik8", tmp_path / "cache")
    path = tmp_path / "fake"
    path.write_bytes(bytes([CONTENT[0] ^ 1]) + CONTENT[1:])
    with pytest.raises(CorpusError, match="is not enwik8: it has 2,000 bytes"):
        load_corpus(f"enwik8:{path}", tmp_path / "cache")


def test_a_longer_file_is_rejected(small, tmp_path):
    path = tmp_path / "long"
    path.write_bytes(CONTENT + b"!")
    with pytest.raises(CorpusError, match="more than 2,000 bytes"):
        load_corpus(f"enwik8:{path}", tmp_path / "cache")


def test_a_damaged_archive_and_a_missing_file(small, tmp_path):
    path = tmp_path / "enwik8.zip"
    path.write_bytes(zipped(CONTENT)[:-30])
    with pytest.raises(CorpusError, match="damaged archive"):
        load_corpus(f"enwik8:{path}", tmp_path / "cache")
    path.write_bytes(gzip.compress(CONTENT)[:-20])
    with pytest.raises(CorpusError, match="damaged archive"):
        load_corpus(f"enwik8:{path}", tmp_path / "cache")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("enwik8", b"")
    with pytest.raises(CorpusError, match="it has 0 bytes"):
        load_corpus(f"enwik8:{path}", tmp_path / "cache")
    with pytest.raises(CorpusError, match=r"cannot read .*/nowhere .*bring the file"):
        load_corpus(f"enwik8:{tmp_path}/nowhere", tmp_path / "cache")


def test_download_then_cache(small, tmp_path, network):
    network[enwik8.URL] = zipped(CONTENT)
    first = load_corpus("enwik8", tmp_path / "cache")
    network.clear()
    second = load_corpus("enwik8", tmp_path / "cache")
    assert first.path == second.path
    assert second.test.tobytes() == CONTENT[1900:]


def test_a_damaged_cache_is_not_trusted(small, tmp_path, network):
    network[enwik8.URL] = zipped(CONTENT)
    path = load_corpus("enwik8", tmp_path / "cache").path
    path.write_bytes(CONTENT[::-1])
    assert load_corpus("enwik8", tmp_path / "cache").test.tobytes() == CONTENT[1900:]


def test_offline_says_what_to_do(tmp_path, network):
    with pytest.raises(CorpusError, match=r"cannot download .*no route to host.*enwik8:/path/to/enwik8"):
        load_corpus("enwik8", tmp_path / "cache")
