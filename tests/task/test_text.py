import math

import pytest
import torch

from postformer import task
from postformer.data import load_corpus
from postformer.task import Bytes, RecallPerplexity, TaskBatch, TaskError


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A file of known bytes, and where it is."""
    monkeypatch.setenv("POSTFORMER_CACHE", str(tmp_path / "cache"))
    lines = [f"{i:04d} {'ab' * (i % 5)} end\n" for i in range(400)]
    path = tmp_path / "text.txt"
    path.write_text("".join(lines))
    return str(path)


def oracle(batch):
    """All mass on the byte that comes."""
    return 100.0 * torch.nn.functional.one_hot(batch.targets[batch.scored], 256).float()


def uniform(batch):
    return torch.zeros(int(batch.scored.sum()), 256)


def windowed(*rows):
    window = torch.tensor([list(row) for row in rows])
    return TaskBatch(window[:, :-1], window[:, 1:])


def literal_hits(rows, order, counts=len, rare=None):
    """By the definition, one position at a time."""
    found = []
    for row in rows:
        hits = []
        for end in range(1, len(row)):
            ending = row[end - order : end + 1] if end >= order else None
            seen = ending is not None and any(row[i : i + order + 1] == ending for i in range(end - order))
            hits.append(seen and (rare is None or counts(ending) <= rare))
        found.append(hits)
    return found


@pytest.mark.parametrize("name", ["bytes", "recall-perplexity"])
def test_the_oracle_has_no_bits_and_no_idea_has_eight(name):
    loaded = task.load(name)
    batch = loaded.on("test").batch(128, 8, task.seeded(0))
    known, blank = loaded.measure(oracle(batch), batch), loaded.measure(uniform(batch), batch)
    for figure in {"bits_per_byte", loaded.metric}:
        assert known[figure] == 0
        assert blank[figure] == pytest.approx(loaded.chance(128), abs=1e-6)
    assert loaded.chance(128) == 8
    assert known["token_accuracy"] == 1
    if name == "recall-perplexity":
        assert (known["hit_perplexity"], known["rest_perplexity"]) == (1, 1)
        assert (blank["hit_perplexity"], blank["rest_perplexity"]) == pytest.approx((256, 256), rel=1e-6)


def test_windows_are_the_corpus_one_byte_on(small):
    loaded = Bytes(small, train=16)
    for split in ("train", "validation", "test"):
        text = bytes(load_corpus(small).split(split))
        batch = loaded.on(split).batch(16, 20, task.seeded(1))
        for tokens, targets in zip(batch.tokens, batch.targets, strict=True):
            assert tokens[1:].tolist() == targets[:-1].tolist()
            assert bytes([*tokens.tolist(), int(targets[-1])]) in text
    assert loaded.split == "train"  # `on` leaves the task itself alone


def test_splits_share_no_problem(small):
    # Every line has a number of its own, so no window of a line's length stands in two splits.
    loaded = Bytes(small, train=32)
    train = bytes(load_corpus(small).train)
    for split in ("validation", "test"):
        batch = loaded.on(split).batch(32, 50, task.seeded(0))
        assert not any(bytes(row.tolist()) in train for row in batch.tokens)


def test_every_window_can_be_drawn(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTFORMER_CACHE", str(tmp_path))
    path = tmp_path / "short.txt"
    path.write_bytes(b"".join(b"%c\n" % (64 + i) for i in range(40)))
    loaded = Bytes(str(path), train=4)
    drawn = loaded.batch(4, 4000, task.seeded(0)).tokens
    assert len({tuple(row) for row in drawn.tolist()}) == len(load_corpus(str(path)).train) - 4


def test_the_shortcut_is_the_entropy_of_single_bytes(small):
    text = bytes(load_corpus(small).train)
    p = [text.count(b) / len(text) for b in set(text)]
    entropy = -sum(x * math.log2(x) for x in p)
    loaded = Bytes(small, train=16)
    assert loaded.shortcut(16) == pytest.approx(entropy, abs=1e-9)
    # Whoever answers so, has as many bits: the training split scored whole.
    window = windowed(text)
    measured = loaded.measure(loaded.unigram.clamp_min(1e-30).log().expand(window.targets.numel(), -1), window)
    assert measured["bits_per_byte"] == pytest.approx(entropy, abs=0.01)
    assert 4 < Bytes().shortcut(128) < 5.5


@pytest.mark.parametrize("order", [1, 2, 4, 6])
def test_hits_are_what_the_window_has_shown(order):
    loaded = RecallPerplexity(order=order)
    batch = loaded.on("validation").batch(64, 6, task.seeded(3))
    rows = torch.cat([batch.tokens[:, :1], batch.targets], 1).tolist()
    assert loaded.hits(batch).tolist() == literal_hits(rows, order)
    assert not loaded.hits(windowed(b"abc"))[:, : max(0, order - 1)].any()


def test_hits_by_hand():
    batch = windowed(b"abcabcd", b"aaaaaaa")
    assert RecallPerplexity(order=1).hits(batch).int().tolist() == [[0, 0, 0, 1, 1, 0], [0, 1, 1, 1, 1, 1]]
    assert RecallPerplexity(order=2).hits(batch).int().tolist() == [[0, 0, 0, 0, 1, 0], [0, 0, 1, 1, 1, 1]]
    assert not RecallPerplexity(order=6).hits(batch).any()


def test_rare_counts_the_training_split(small):
    text = bytes(load_corpus(small).train)

    def counts(sequence):
        ending = bytes(sequence)
        return sum(text.startswith(ending, i) for i in range(len(text)))

    everything = RecallPerplexity(small, train=64, order=2)
    for rare in (1, 20, 200):
        loaded = RecallPerplexity(small, train=64, order=2, rare=rare)
        batch = loaded.on("test").batch(64, 4, task.seeded(0))
        rows = torch.cat([batch.tokens[:, :1], batch.targets], 1).tolist()
        assert loaded.hits(batch).tolist() == literal_hits(rows, 2, counts, rare)
        assert not (loaded.hits(batch) & ~everything.hits(batch)).any()
    assert loaded.hits(batch).sum() < everything.hits(batch).sum()


def test_a_sequence_that_training_never_showed_is_rare():
    loaded = RecallPerplexity(order=4, rare=1)
    assert loaded.hits(windowed(bytes([251, 252, 253, 254, 255] * 2))).int().tolist() == [[0] * 8 + [1]]
    assert loaded.hits(windowed(b"    " * 4)).sum() == 0  # four blanks and one more are everywhere


def test_both_halves_make_up_the_whole():
    loaded = RecallPerplexity()
    batch = loaded.on("validation").batch(128, 32, task.seeded(0))
    logits = torch.randn(batch.targets.numel(), 256, generator=torch.Generator().manual_seed(0))
    found = loaded.measure(logits, batch)
    share = found["hit_share"]
    assert share * found["hit_bits"] + (1 - share) * found["rest_bits"] == pytest.approx(found["bits_per_byte"])
    assert found["hit_perplexity"] == pytest.approx(2 ** found["hit_bits"])
    hit = loaded.hits(batch)
    pointed = logits.clone()
    pointed[hit.flatten()] += oracle(batch)[hit.flatten()]
    recalled = loaded.measure(pointed, batch)  # a model that recalls, and knows nothing else
    assert recalled["hit_bits"] < 1e-6
    assert recalled["rest_bits"] == pytest.approx(found["rest_bits"])


def test_hits_are_a_minority_in_every_setting():
    loaded = RecallPerplexity()
    for setting in loaded.difficulties.evaluate:
        share = loaded.hits(loaded.on("validation").batch(setting, 64, task.seeded(0))).double().mean().item()
        assert 0.1 < share < 0.5


def test_what_makes_no_sense_is_refused(small):
    with pytest.raises(TaskError, match="there is no corpus named 'stdlibb'"):
        Bytes("stdlibb").batch(8, 1, task.seeded(0))
    with pytest.raises(TaskError, match=r"no split 'dev'; there are train, validation and test"):
        Bytes(small).on("dev")
    with pytest.raises(TaskError, match=r"the test split of .* needs one more than that; use at most \d+"):
        Bytes(small).on("test").batch(100_000, 1, task.seeded(0))
    with pytest.raises(TaskError, match="a length of at least 1"):
        Bytes(small, train=(16, 0))
    with pytest.raises(TaskError, match="no training setting"):
        Bytes(small, train=())
    with pytest.raises(TaskError, match=r"order is 7; give 1 to 6"):
        RecallPerplexity(order=7)
    with pytest.raises(TaskError, match="rare is 0"):
        RecallPerplexity(rare=0)
    loaded, batch = RecallPerplexity(order=4), windowed(b"abcdefgh")
    with pytest.raises(TaskError, match=r"no position of this batch is a hit.*a smaller order \(now 4\)"):
        loaded.measure(uniform(batch), batch)
