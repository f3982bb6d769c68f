import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from postformer import task
from postformer.task import IGNORE, METRICS, MQAR, TaskError


def answer(tokens, pairs):
    """Looks every token up among the row's pairs: what the task asks for, from the tokens alone."""
    rows = []
    for row in tokens.tolist():
        bound = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        rows.append([bound.get(token, 0) for token in row])
    return torch.tensor(rows)


@st.composite
def settings_and_vocabularies(draw):
    pairs = draw(st.integers(1, 12))
    length = 4 * pairs + 2 * draw(st.integers(0, 20))
    vocab = draw(st.integers(2 * pairs + 2, 100))
    return (length, pairs), vocab, draw(st.booleans()), draw(st.sampled_from([0.01, 0.5, 1.0]))


@settings(max_examples=60, deadline=None)
@given(settings_and_vocabularies(), st.integers(0, 1000))
def test_the_form_of_every_row(drawn, seed):
    (length, pairs), vocab, random_fill, power = drawn
    mqar = MQAR(vocab, power, random_fill, train=(length, pairs), evaluate=((length, pairs),))
    batch = mqar.batch((length, pairs), 6, task.seeded(seed))
    keys, values = batch.tokens[:, 0 : 2 * pairs : 2], batch.tokens[:, 1 : 2 * pairs : 2]
    assert ((keys >= 1) & (keys < vocab // 2)).all()
    assert ((values >= vocab // 2) & (values < vocab)).all()
    for row in range(6):
        assert keys[row].unique().numel() == values[row].unique().numel() == pairs
        asked = batch.scored[row].nonzero().flatten()
        assert asked.numel() == pairs
        assert (asked >= 2 * pairs).all()
        assert (asked % 2 == 0).all()
        assert batch.tokens[row, asked].sort().values.tolist() == keys[row].sort().values.tolist()
        bound = dict(zip(keys[row].tolist(), values[row].tolist(), strict=True))
        assert [bound[key] for key in batch.tokens[row, asked].tolist()] == batch.targets[row, asked].tolist()
        if not random_fill:
            blank = ~batch.scored[row]
            blank[: 2 * pairs] = False
            assert (batch.tokens[row, blank] == 0).all()
    assert mqar.score(answer(batch.tokens, pairs), batch) == dict.fromkeys(METRICS, 1.0)


def test_all_slots_are_used_when_there_are_only_as_many_as_keys():
    batch = MQAR(vocab=64).batch((32, 8), 20, task.seeded(0))
    assert batch.scored[:, 16::2].all()


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_the_first_pair_is_asked_by_the_published_weights(power):
    mqar, rows, pairs = MQAR(power=power), 20_000, 4
    batch = mqar.batch((64, pairs), rows, task.seeded(0))
    g = torch.arange(1, 29, dtype=torch.float64)
    p = power * g ** (power - 1)
    p /= p.sum()
    assert torch.allclose(mqar.slot_weights((64, pairs)), p)
    # The first key's slot is drawn first, so its distribution is p itself.
    asked = (batch.tokens == batch.tokens[:, :1]) & batch.scored
    slot = (asked.int().argmax(1) - 2 * pairs) // 2
    counts = torch.bincount(slot, minlength=28).double()
    chi2 = ((counts - rows * p) ** 2 / (rows * p)).sum().item()
    assert chi2 < 55.5  # 27 degrees of freedom, p = 0.001


def test_two_slots_are_drawn_one_after_the_other():
    # Without replacement: P(i then j) = p_i p_j / (1 - p_i), over every ordered pair of the four slots.
    mqar, rows = MQAR(), 30_000
    batch = mqar.batch((12, 2), rows, task.seeded(0))
    p = mqar.slot_weights((12, 2))
    first, second = (
        (((batch.tokens == batch.tokens[:, i : i + 1]) & batch.scored).int().argmax(1) - 4) // 2 for i in (0, 2)
    )
    counts = torch.zeros(4, 4, dtype=torch.float64).index_put_((first, second), torch.tensor(1.0).double(), True)
    expected = rows * p[:, None] * p / (1 - p[:, None])
    off = ~torch.eye(4, dtype=torch.bool)
    assert (counts.diagonal() == 0).all()
    chi2 = ((counts - expected) ** 2 / expected)[off].sum().item()
    assert chi2 < 31.3  # 11 degrees of freedom, p = 0.001


def published(length, pairs, vocab, rows, seed, power=0.01):
    """Zoology's algorithm, row by row with numpy -> keys, values [rows, pairs], and the slots where keys are asked."""
    rng = np.random.default_rng(seed)
    space = (length - 2 * pairs) // 2
    p = power * np.arange(1, space + 1) ** (power - 1)
    p /= p.sum()
    drawn = [
        (
            rng.choice(np.arange(1, vocab // 2), size=pairs, replace=False),
            rng.choice(np.arange(vocab // 2, vocab), size=pairs, replace=False),
            rng.choice(space, size=pairs, replace=False, p=p),
        )
        for _ in range(rows)
    ]
    return tuple(torch.tensor(np.stack(kind)) for kind in zip(*drawn, strict=True))


def alike(a, b, size):
    """Whether two samples of 0..size-1 come from one distribution: chi-squared of two histograms, p = 0.001."""
    counts = torch.stack([x.flatten().bincount(minlength=size).double() for x in (a, b)])
    counts = counts[:, counts.sum(0) > 0]
    expected = counts.sum(1, keepdim=True) * counts.sum(0) / counts.sum()
    freedom = counts.shape[1] - 1
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    return chi2 < freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson and Hilferty


def test_the_statistics_are_those_of_the_published_algorithm():
    length, pairs, vocab, rows = 40, 5, 24, 8000
    batch = MQAR(vocab=vocab).batch((length, pairs), rows, task.seeded(0))
    keys, values = batch.tokens[:, 0 : 2 * pairs : 2], batch.tokens[:, 1 : 2 * pairs : 2]
    asked = (batch.tokens[:, None] == keys[..., None]) & batch.scored[:, None]  # [rows, pairs, length]
    assert (asked.sum(2) == 1).all()
    slots = (asked.int().argmax(2) - 2 * pairs) // 2
    wanted_keys, wanted_values, wanted_slots = published(length, pairs, vocab, rows, 1)
    for i in (0, 2, pairs - 1):
        assert alike(keys[:, i], wanted_keys[:, i], vocab)
        assert alike(values[:, i], wanted_values[:, i], vocab)
        assert alike(slots[:, i], wanted_slots[:, i], 15)
    # Two at once: without replacement, a later slot is not drawn by p.
    assert alike(15 * slots[:, 0] + slots[:, 1], 15 * wanted_slots[:, 0] + wanted_slots[:, 1], 225)
    assert alike(15 * slots[:, 3] + slots[:, 4], 15 * wanted_slots[:, 3] + wanted_slots[:, 4], 225)
    assert not alike(slots[:, 0], wanted_slots[:, 4], 15)
    assert not alike(slots[:, 0], published(length, pairs, vocab, rows, 2, power=0.2)[2][:, 0], 15)


def test_keys_values_and_fillers_are_uniform():
    mqar, rows = MQAR(vocab=32), 8000
    batch = mqar.batch((32, 3), rows, task.seeded(0))
    for drawn, low, high in ((batch.tokens[:, 0], 1, 16), (batch.tokens[:, 5], 16, 32)):
        counts = torch.bincount(drawn, minlength=32)[low:high].double()
        assert counts.sum() == rows
        expected = rows / (high - low)
        assert ((counts - expected) ** 2 / expected).sum() < 39.3  # at most 16 degrees of freedom, p = 0.001
    counts = torch.bincount(batch.tokens[:, 7], minlength=32).double()  # an odd position is never asked
    assert ((counts - rows / 32) ** 2 / (rows / 32)).sum() < 61.1  # 31 degrees of freedom, p = 0.001


def test_random_answers_score_chance_and_the_shortcut():
    mqar, rows, pairs = MQAR(vocab=64), 4000, 8
    batch = mqar.batch((64, pairs), rows, task.seeded(0))
    value = torch.randint(32, 64, batch.tokens.shape, generator=task.seeded(1))
    seen = batch.tokens.gather(1, 1 + 2 * torch.randint(pairs, batch.tokens.shape, generator=task.seeded(2)))
    for guess, expected in ((value, mqar.chance((64, pairs))), (seen, mqar.shortcut((64, pairs)))):
        score = mqar.score(guess, batch)
        bound = 4 * math.sqrt(expected * (1 - expected))
        assert abs(score["token_accuracy"] - expected) < bound / math.sqrt(rows * pairs)
        assert abs(score["last_accuracy"] - expected) < bound / math.sqrt(rows)
    assert mqar.chance((64, 8)) == 1 / 32
    assert mqar.shortcut((64, 8)) == 1 / 8


def test_the_published_size_is_made_quickly_and_right():
    mqar = task.load("mqar", vocab=8192, train=(256, 64))
    batch = mqar.batch((1024, 256), 8, task.seeded(0))
    assert mqar.score(answer(batch.tokens, 256), batch)["token_accuracy"] == 1.0
    assert mqar.difficulties.evaluate == ((256, 64), (512, 128), (1024, 256))


def test_settings_beyond_training_are_outside():
    difficulties = MQAR().difficulties
    assert difficulties.train == difficulties.inside == ((64, 4), (64, 8))
    assert difficulties.outside == ((64, 16), (128, 32))
    assert MQAR(vocab=64).difficulties.outside == ((64, 16),)
    difficulties = MQAR(train=(32, 8), evaluate=((16, 4), (32, 8), (64, 8), (64, 16))).difficulties
    assert difficulties.train == ((32, 8),)
    assert difficulties.inside == ((16, 4), (32, 8))
    assert difficulties.outside == ((64, 8), (64, 16))


def test_a_setting_may_be_a_list():
    assert MQAR().batch([16, 4], 2, task.seeded(0)).tokens.shape == (2, 16)
    assert MQAR(train=[[16, 4], [32, 4]], evaluate=[[16, 4]]).difficulties.train == ((16, 4), (32, 4))


def latest(tokens, context):
    """Reads the context's pairs in order, so that a later value replaces an earlier one."""
    rows = []
    for row in tokens.tolist():
        bound = dict(zip(row[0:context:2], row[1:context:2], strict=True))
        rows.append([bound.get(token, 0) for token in row])
    return torch.tensor(rows)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 10), st.integers(0, 9), st.sampled_from([0.3, 0.5, 0.75]), st.integers(0, 1000))
def test_rewritten_keys_are_asked_for_their_latest_value(pairs, spare, rewrite, seed):
    rewritten = round(rewrite * pairs)
    context = 2 * (pairs + rewritten)
    setting = (context + 2 * (pairs + spare), pairs)
    if not 0 < rewritten < pairs:
        with pytest.raises(TaskError, match=f"of {pairs} keys, rewrite={rewrite} changes {rewritten}"):
            MQAR(64, rewrite=rewrite, train=setting)
        return
    mqar = MQAR(64, rewrite=rewrite, train=setting, evaluate=setting)
    batch = mqar.batch(setting, 8, task.seeded(seed))
    assert mqar.score(latest(batch.tokens, context), batch) == dict.fromkeys(METRICS, 1.0)
    keys, values = batch.tokens[:, 0:context:2], batch.tokens[:, 1:context:2]
    assert ((values >= 32) & (values < 64)).all()
    for row in range(8):
        assert keys[row, :pairs].unique().numel() == pairs
        assert values[row, :pairs].unique().numel() == pairs
        assert keys[row, pairs:].unique().numel() == rewritten
        first = dict(zip(keys[row, :pairs].tolist(), values[row, :pairs].tolist(), strict=True))
        assert all(first[k] != v for k, v in zip(keys[row, pairs:].tolist(), values[row, pairs:].tolist(), strict=True))
        assert batch.scored[row].nonzero().min() >= context
        asked = batch.tokens[row, batch.scored[row]]
        assert asked.sort().values.tolist() == keys[row, :pairs].sort().values.tolist()


def test_who_forgets_nothing_scores_the_shortcut_of_forgetting():
    mqar, setting, rows = task.load("forgetting-mqar"), (40, 7), 1000
    assert mqar.name == "forgetting-mqar"
    batch = mqar.batch(setting, rows, task.seeded(0))
    score = mqar.score(answer(batch.tokens, 7), batch)["token_accuracy"]
    assert score == pytest.approx(mqar.shortcut(setting)) == pytest.approx(3 / 7)  # round(3.5) = 4 are rewritten
    guess = mqar.guess(batch, task.seeded(1))
    chance = mqar.chance(setting)
    score = mqar.score(guess, batch)["token_accuracy"]
    assert abs(score - chance) < 4 * math.sqrt(chance * (1 - chance) / (7 * rows))
    other = mqar.batch(setting, rows, task.seeded(1))
    assert not torch.equal(batch.tokens, other.tokens)


def test_which_keys_are_rewritten_in_which_order_and_to_what():
    mqar, rows = MQAR(vocab=16, rewrite=0.5, train=(24, 4), evaluate=(24, 4)), 20_000
    batch = mqar.batch((24, 4), rows, task.seeded(0))
    keys, values = batch.tokens[:, 0:12:2], batch.tokens[:, 1:12:2]
    which = (keys[:, 4:, None] == keys[:, None, :4]).int().argmax(2)
    counts = (4 * which[:, 0] + which[:, 1]).bincount(minlength=16).double()
    assert (counts[::5] == 0).all()
    expected = rows / 12
    assert ((counts[counts > 0] - expected) ** 2 / expected).sum() < 31.3  # 11 degrees of freedom, p = 0.001
    change = (values[:, 4] - values.gather(1, which[:, :1])[:, 0]) % 8
    counts = change.bincount(minlength=8).double()
    assert counts[0] == 0
    assert ((counts[1:] - rows / 7) ** 2 / (rows / 7)).sum() < 22.5  # 6 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ((16, 5), "at least 4 \\* pairs = 20"),
        ((17, 4), "must be even"),
        ((256, 64), "has 63; use vocab=130 or more"),
        (16, "a setting is \\(length, pairs\\)"),
        ((16, 0), "a setting is \\(length, pairs\\)"),
        ((16, 4, 1), "a setting is \\(length, pairs\\)"),
    ],
)
def test_settings_that_make_no_sense(setting, message):
    with pytest.raises(TaskError, match=message):
        MQAR().batch(setting, 2, task.seeded(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab": 3}, "at least 4 ids"),
        ({"power": 0.0}, "positive"),
        ({"power": float("nan")}, "positive"),
        ({"train": ()}, "no training setting"),
        ({"rewrite": 1.0}, "from 0 to below 1"),
        ({"rewrite": 0.5, "train": (16, 4)}, "2 \\* rewritten = 20"),
        ({"vocab": 16}, "use vocab=18 or more"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(TaskError, match=message):
        MQAR(**options)


def test_unscored_positions_are_ignored_by_the_loss():
    batch = MQAR().batch((64, 8), 4, task.seeded(0))
    loss = torch.nn.functional.cross_entropy(torch.zeros(4 * 64, 128), batch.targets.flatten(), ignore_index=IGNORE)
    assert abs(loss.item() - math.log(128)) < 1e-5
