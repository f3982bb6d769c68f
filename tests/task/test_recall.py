import math

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
