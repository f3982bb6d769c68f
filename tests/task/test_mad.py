"""The tasks of MAD: what they ask can be answered from the tokens, and what guesses and shortcuts score."""

import itertools
import math

import pytest
import torch

from postformer import task
from postformer.task import IGNORE, METRICS, TaskError, seeded
from postformer.task.draw import distinct, expected_mode

RECALL = {
    "in-context-recall": {"vocab": 24},
    "noisy-recall": {"vocab": 24, "noise": 6, "fraction": 0.4},
    "fuzzy-recall": {"vocab": 16},
}
NAMES = [*RECALL, "selective-copying", "memorization", "compression"]


def setting_of(name):
    return {"selective-copying": (40, 5), "memorization": (40, 60), "compression": 13}.get(name, (60, 5))


def known(name):
    return task.load(name, **RECALL.get(name, {}))


def pairs_of(made, row):
    """The keys and values of a row, in order, as tuples."""
    low, high = made.answers
    runs = [tuple(run) for _, run in itertools.groupby(row, lambda token: low <= token < high)]
    both = [(before, run) for before, run in itertools.pairwise(runs) if low <= run[0] < high]
    return [(tuple(token for token in before if token < low), run) for before, run in both]


def recalled(made, tokens):
    """Reads a row as keys followed by values, and repeats the value of a key that has had one before."""
    low, high = made.answers
    rows = []
    for row in tokens.tolist():
        bound, key, value, answers = {}, (), (), []
        for token in row:
            if low <= token < high:
                value = (*value, token)
            else:
                bound |= {key: value} if value else {}
                key, value = (*(() if value else key), *([token] if token < low else [])), ()
            rest = bound.get(key, ())[len(value) :] if token < high else ()
            answers.append(rest[0] if rest else 0)
        rows.append(answers)
    return torch.tensor(rows)


def copied(made, tokens):
    rows = []
    for row in tokens.tolist():
        kept = [token for token in row if token < made.vocab - 2]
        rows.append([0] * (len(row) - len(kept)) + kept)
    return torch.tensor(rows)


def memorized(made, tokens):
    """Has seen training batches with their answers, and knows nothing else."""
    bound = {}
    for step in range(20):
        seen = made.on("train").batch((40, 127), 16, seeded(5, "train", step))
        keys, values = seen.tokens[:, 0::2].flatten(), seen.targets[:, 1::2].flatten()
        bound |= dict(zip(keys.tolist(), values.tolist(), strict=True))
    return torch.tensor([[0, *(bound.get(token, 0) for token in row[:-1])] for row in tokens.tolist()])


def oracle(name, made, tokens):
    if name in RECALL:
        return recalled(made, tokens)
    return {"selective-copying": copied, "memorization": memorized, "compression": lambda _, x: x}[name](made, tokens)


def expect(made, guess, batch, expected):
    """Token accuracy within 4 standard errors, estimated from the rows, which are independent."""
    right = ((guess == batch.targets) & batch.scored).sum(1).double()
    number = batch.scored.sum(1).double()
    error = (right - expected * number).std() / number.mean() / math.sqrt(len(number))
    score = made.score(guess, batch)["token_accuracy"]
    assert abs(score - expected) < 4 * max(error.item(), 1e-9), (score, expected, error)


@pytest.mark.parametrize("name", NAMES)
def test_the_tokens_say_the_answer(name):
    made = known(name)
    for setting in (setting_of(name), *made.difficulties.evaluate):
        batch = made.on("test").batch(setting, 40, seeded(0, "test"))
        assert made.metric == "token_accuracy"
        assert made.score(oracle(name, made, batch.tokens), batch) == dict.fromkeys(METRICS, 1.0)


@pytest.mark.parametrize("name", NAMES)
def test_a_guess_scores_chance(name):
    made, setting = known(name), setting_of(name)
    batch = made.batch(setting, 3000, seeded(0))
    guess = made.guess(batch, seeded(1))
    low, high = made.answers
    assert guess.unique().tolist() == list(range(low, high))
    assert batch.targets[batch.scored].unique().tolist() == (
        list(range(low, high)) if name != "memorization" else sorted(made.values[:60].tolist())
    )
    expect(made, guess, batch, made.chance(setting))


@pytest.mark.parametrize("name", NAMES)
def test_streams_and_seeds(name):
    made, setting = known(name), setting_of(name)
    streams = ((0, "train"), (0, "train"), (0, "test"), (1, "train"))
    a, b, c, d = (made.batch(setting, 6, seeded(*keys)) for keys in streams)
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.targets, b.targets)
    assert not torch.equal(a.tokens, c.tokens)
    assert not torch.equal(a.tokens, d.tokens)


@pytest.mark.parametrize("name", ["selective-copying", "compression"])
def test_the_most_frequent_token_scores_the_shortcut(name):
    made, setting = known(name), setting_of(name)
    batch = made.batch(setting, 5000, seeded(2))
    counts = torch.stack([(batch.tokens == token).sum(1) for token in range(*made.answers)], 1)
    expect(made, counts.argmax(1, keepdim=True).expand_as(batch.tokens), batch, made.shortcut(setting))
    assert made.shortcut(setting) > 1.5 * made.chance(setting)


@pytest.mark.parametrize("name", RECALL)
def test_a_value_of_another_key_scores_the_shortcut(name):
    made, setting, rows = known(name), (60, 5), 1500
    batch = made.batch(setting, rows, seeded(3))
    low, high = made.answers
    guess = torch.randint(low, high, batch.tokens.shape, generator=seeded(4))
    pick = torch.randint(5, batch.tokens.shape, generator=seeded(5)).tolist()
    for row, tokens in enumerate(batch.tokens.tolist()):
        values = list(dict(pairs_of(made, tokens)).values())  # fewer than 5 where a key was never shown
        at = 0
        for position, token in enumerate(tokens):
            at = at + 1 if low <= token < high else 0
            choice = pick[row][position]
            if choice < len(values) and at < len(values[choice]):
                guess[row, position] = values[choice][at]
    expect(made, guess, batch, made.shortcut(setting))


@pytest.mark.parametrize("name", RECALL)
def test_how_a_row_of_pairs_is_made(name):
    made, rows = known(name), 400
    batch = made.batch((60, 5), rows, seeded(6))
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        bound = {}
        expected = []
        for key, value in pairs_of(made, tokens):
            assert 1 <= len(set(key)) == len(key) <= made.motif
            assert 1 <= len(set(value)) == len(value) <= made.motif
            expected += value if key in bound else ()
            assert bound.setdefault(key, value) == value
        assert [target for target in targets if target != IGNORE] == expected
        assert len(bound) <= 5
        assert targets[-2] == tokens[-1]  # the row ends with a question
        if made.motif > 1:  # padded by less than the longest pair that did not fit, and the reserve of the last
            blank = tokens.count(made.vocab - 1)
            assert tokens[:blank] == [made.vocab - 1] * blank
            assert blank < 4 * made.motif
    if made.noise:
        share = ((batch.tokens >= made.answers[1])[:, :-2].double().mean()).item()
        # One of 29 places is never noise.
        assert abs(share - 0.4 * 28 / 29) < 4 * math.sqrt(0.24 / (rows * 29))


def test_all_keys_are_alike_and_so_are_the_sizes_of_motifs():
    made = task.load("fuzzy-recall", vocab=9)  # 4 keys, 4 values
    text, key_size, size = made._pairs(1, 12_000, seeded(0))
    for sizes in (key_size, size - key_size):
        counts = sizes.flatten().bincount(minlength=4)[1:].double()
        assert ((counts - 4000) ** 2 / 4000).sum() < 13.8  # 2 degrees of freedom, p = 0.001
    pair = text[:, 0][(key_size == 2).flatten()][:, :2]
    counts = (4 * pair[:, 0] + pair[:, 1]).bincount(minlength=16).double()
    expected = counts.sum() / 12
    assert (counts[::5] == 0).all()
    assert ((counts[counts > 0] - expected) ** 2 / expected).sum() < 31.3  # 11 degrees of freedom
    keys = task.load("in-context-recall", vocab=12, train=(8, 3)).batch((400, 3), 2000, seeded(1)).tokens[:, 0::2]
    present = torch.stack([(keys == key).any(1) for key in range(6)], 1)
    assert (present.sum(1) == 3).all()
    assert ((present.sum(0) - 1000) ** 2 / 1000).sum() < 20.5


def test_noise_everywhere_leaves_a_pair_to_ask():
    made = task.load("noisy-recall", fraction=0.999, noise=3, vocab=9, train=(8, 2))
    batch = made.batch((8, 2), 500, seeded(0))
    assert ((batch.tokens < 3).sum(1) >= 2).all()
    assert made.score(recalled(made, batch.tokens), batch)["exact_match"] == 1.0


def test_fuzzy_rows_with_noise():
    made = task.load("fuzzy-recall", vocab=20, noise=4, fraction=0.4)
    batch = made.batch((80, 6), 500, seeded(0))
    assert made.score(recalled(made, batch.tokens), batch)["exact_match"] == 1.0
    noise = (batch.tokens >= 15) & (batch.tokens < 19)
    assert 0.3 < noise.double().mean() / (batch.tokens < 19).double().mean() < 0.4  # all but two pairs can be noise


def test_the_shortest_fuzzy_rows():
    made = task.load("fuzzy-recall", train=(12, 2), evaluate=(12, 2))
    batch = made.batch((12, 2), 500, seeded(0))
    assert batch.scored.any(1).all()
    assert made.score(recalled(made, batch.tokens), batch)["exact_match"] == 1.0


def test_blanks_stand_before_every_token_alike():
    made, rows = task.load("selective-copying"), 4000
    batch = made.batch((30, 4), rows, seeded(0))
    assert (batch.tokens[:, 25] == 15).all()
    assert (batch.tokens[:, 26:] == 14).all()
    assert (batch.tokens[:, 24] < 14).all()
    assert batch.scored.sum(0).tolist() == [0] * 26 + [rows] * 4
    kept = (batch.tokens[:, :25] < 14).nonzero()[:, 1].view(rows, 4)
    gaps = torch.diff(kept, dim=1, prepend=torch.full((rows, 1), -1)) - 1
    assert (gaps.sum(1) == 21).all()
    # Binomial(21, 1/4) blanks before each token: mean 5.25, variance 3.94.
    assert ((gaps.double().mean(0) - 5.25).abs() < 4 * math.sqrt(3.94 / rows)).all()
    assert ((gaps.double().var(0) - 3.94).abs() < 0.4).all()


def test_the_map_is_fixed_one_to_one_and_for_all_splits():
    made = task.load("memorization")
    assert made.values.unique().numel() == made.keys == 127
    assert torch.equal(made.values, task.load("memorization", train=(8, 3)).values)
    assert not torch.equal(made.values, task.load("memorization", map_seed=1).values)
    for split in ("train", "validation", "test"):
        batch = made.on(split).batch((32, 127), 50, seeded(split))
        assert torch.equal(batch.targets[:, 1::2], made.values[batch.tokens[:, 0::2]])
    assert made.batch((32, 4), 50, seeded(0)).tokens[:, 0::2].unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("draws", "choices"), [(1, 7), (2, 2), (3, 2), (4, 3)])
def test_the_expected_mode_by_counting(draws, choices):
    every = list(itertools.product(range(choices), repeat=draws))
    mean = sum(max(row.count(value) for value in row) for row in every) / len(every) / draws
    assert abs(expected_mode(draws, choices) - mean) < 1e-12


def test_draws_without_replacement_follow_their_weights():
    drawn = distinct(torch.tensor([1.0, 2.0, 5.0]), 20_000, 3, seeded(0))
    assert (drawn.sort(1).values == torch.arange(3)).all()
    counts = (3 * drawn[:, 0] + drawn[:, 1]).bincount(minlength=9).double()
    p = [0.125, 0.25, 0.625]
    expected = {(a, b): p[a] * p[b] / (1 - p[a]) * 20_000 for a, b in itertools.permutations(range(3), 2)}
    chi2 = sum((counts[3 * a + b].item() - value) ** 2 / value for (a, b), value in expected.items())
    assert chi2 < 20.5  # 5 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("in-context-recall", (7, 2), "even and at least 4"),
        ("in-context-recall", (2, 2), "even and at least 4"),
        ("in-context-recall", (64, 9), "9 keys are more than the 8"),
        ("in-context-recall", 64, "\\(length, keys\\), two integers"),
        ("fuzzy-recall", (11, 2), "must be at least 12"),
        ("fuzzy-recall", (64, 260), "more than the 259"),
        ("selective-copying", (16, 8), "at least 2 \\* n \\+ 1 = 17"),
        ("selective-copying", (16, 0), "two integers of at least 1"),
        ("memorization", (31, 4), "31 is odd; use 32"),
        ("memorization", (32, 128), "use vocab=257 or more"),
        ("memorization", (32,), "\\(length, keys\\), two integers"),
        ("compression", 1, "at least 2"),
        ("compression", (16, 2), "at least 2"),
    ],
)
def test_settings_that_make_no_sense(name, setting, message):
    with pytest.raises(TaskError, match=message):
        task.load(name).batch(setting, 2, seeded(0))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("in-context-recall", {"vocab": 1}, "at least 2 are needed"),
        ("in-context-recall", {"fraction": 0.2}, "for instance 16 and 0.2"),
        ("noisy-recall", {"noise": 0}, "for instance 16 and 0.2"),
        ("noisy-recall", {"fraction": 1.0}, "for instance 16 and 0.2"),
        ("noisy-recall", {"vocab": 17}, "at least 18 are needed"),
        ("fuzzy-recall", {"motif": 0}, "3 as published"),
        ("fuzzy-recall", {"vocab": 144}, "a smaller vocabulary or shorter motifs"),
        ("selective-copying", {"vocab": 3}, "at least 4 ids"),
        ("memorization", {"vocab": 4}, "at least 5 ids"),
        ("compression", {"vocab": 2}, "at least 3 ids"),
        ("compression", {"train": ()}, "no training setting; give one, for instance train=16"),
    ],
)
def test_options_that_make_no_sense(name, options, message):
    with pytest.raises(TaskError, match=message):
        task.load(name, **options)


def test_what_lies_beyond_training():
    difficulties = task.load("compression", train=(4, 8), evaluate=(4, 16)).difficulties
    assert (difficulties.train, difficulties.inside, difficulties.outside) == ((4, 8), (4,), (16,))
    assert task.load("selective-copying").difficulties.outside == ((128, 16),)
    assert task.load("fuzzy-recall").difficulties.outside == ((128, 4),)
    assert task.load("memorization").difficulties.outside == ((64, 127),)
