"""Copying, needles, arithmetic, brackets, hops and aggregation: each solved from its tokens alone, guessed, and
answered by the shortcut that its task names."""

import math
import random
from collections import Counter

import pytest
import torch

from postformer import task
from postformer.task import Aggregate, Copy, Documents, Dyck, Hops, ModularArithmetic, Needle, PhoneBook, TaskError

NAMES = ["aggregate-count", "aggregate-mode", "aggregate-user", "composition", "copy", "dyck", "lost-in-the-middle"]
NAMES += ["modular-arithmetic", "modular-arithmetic-brackets", "needle", "passkey", "phone-book", "pointer-chasing"]
NAMES += ["documents", "reverse"]


def copied(made, row):
    """Every solver: a row's tokens -> {position: answer}."""
    half = row.index(made.letters)
    string = row[:half]
    return dict(enumerate(reversed(string) if made.name == "reverse" else string, half))


def spread_out(made, row, digits):
    """A number at the last positions."""
    return dict(zip(range(len(row) - made.digits, len(row)), digits, strict=True))


def needles(made, row):
    """{key: digits} and the key asked."""
    at, ask = [i for i, token in enumerate(row) if token == made.vocab - 2], row.index(made.vocab - 1)
    return {row[i + 1]: row[i + 2 : i + 2 + made.digits] for i in at}, row[ask + 1]


def found(made, row):
    known, key = needles(made, row)
    return spread_out(made, row, known[key])


def lines_of(made, row):
    """[(first name, last name), digits] and the name asked."""
    ask, size = row.index(made.vocab - 1), made.digits + 2
    return [(tuple(row[i : i + 2]), row[i + 2 : i + size]) for i in range(0, ask, size)], tuple(row[ask + 1 : ask + 3])


def looked_up(made, row):
    lines, name = lines_of(made, row)
    return spread_out(made, row, dict(lines)[name])


def value(row, without=""):
    text = "".join("01234+-*=()"[token] for token in row[:-1])
    return eval("".join(sign for sign in text if sign not in without)) % 5


def computed(made, row):
    return {len(row) - 1: value(row)}


def closed(made, row):
    answers, stack = {}, []
    for t, token in enumerate(row):
        if token < made.kinds:
            stack.append(token)
        else:
            assert stack.pop() == token - made.kinds
        answers[t] = made.kinds + stack[-1] if stack else 0
    return answers


def followed(made, row):
    say = len(row) - made.questions - 1
    pointer = {row[i]: row[i + 1] for i in range(0, say, 2)}
    hops = row[say] - (made.vocab - made.hops) + 1
    answers = {}
    for t in range(say + 1, len(row)):
        symbol = pointer[row[t]]
        for _ in range(hops - 1):
            symbol = pointer[symbol if made.functions else symbol + made.symbols]
        answers[t] = symbol
    return answers


def judged(made, row):
    """[(user, class)] and {position: what is asked there}."""
    users, ask = range(made.classes, made.classes + made.users), row.index(made.vocab - 1)
    lines = [(row[i], row[i + 1]) for i in range(ask) if row[i] in users]
    return lines, {t: row[t] for t in range(ask if made.question == "mode" else ask + 1, len(row))}


def about(made, lines, asked):
    return [kind for user, kind in lines if made.question != "user" or user == asked]


def aggregated(made, row):
    lines, questions = judged(made, row)
    if made.question == "count":
        counts = Counter(kind for _, kind in lines)
        zero = made.vocab - 1 - (made.most + 1)
        return {t: zero + min(counts[asked], made.most) for t, asked in questions.items()}
    answers = {}
    for t, asked in questions.items():
        counts = Counter(about(made, lines, asked))
        answers[t] = min(counts, key=lambda kind: (-counts[kind], kind))
    return answers


def kept(made, row):
    """What is known when each document ends; the last one asks for the first one's."""
    starts = [t for t, token in enumerate(row) if token in (made.keep, made.local, made.ask)]
    assert (row[starts[0]], row[starts[-1]]) == (made.keep, made.ask)
    answers, known = {}, {}
    for start, stop in zip(starts, [*starts[1:], len(row)]):
        document = row[start:stop]
        if document[0] == made.ask:
            first = dict(zip(row[1 : starts[1] : 2], row[2 : starts[1] : 2]))
            answers |= {start + 1 + i: first[key] for i, key in enumerate(document[1:])}
        else:
            known = dict(zip(document[1 : 2 * made.pairs : 2], document[2 : 2 * made.pairs + 1 : 2]))
        if document[0] == made.local:
            assert document[-2] == made.query
            answers[stop - 1] = known[document[-1]]
    return answers


SOLVERS = {
    Aggregate: aggregated, Copy: copied, Documents: kept, Dyck: closed, Hops: followed, ModularArithmetic: computed,
    Needle: found, PhoneBook: looked_up,
}  # fmt: skip


def last_opened(made, row, _):
    opened = 0
    return {t: made.kinds + (opened := token if token < made.kinds else opened) for t, token in enumerate(row)}


def some_symbol(made, row, rng):
    say = len(row) - made.questions - 1
    there = sorted({token for token in row[:say] if token < made.symbols})
    return {
        t: rng.choice([symbol for symbol in there if made.functions or symbol + made.symbols != row[t]])
        for t in range(say + 1, len(row))
    }


def some_line(made, row, rng):
    lines, questions = judged(made, row)
    return {t: rng.choice(about(made, lines, asked)) for t, asked in questions.items()}


def right_last_name(made, row, rng):
    lines, (_, last) = lines_of(made, row)
    return spread_out(made, row, rng.choice([digits for name, digits in lines if name[1] == last]))


def some_kept(made, row, rng):
    values = [token for token in row[2 : 2 * made.pairs + 1 : 2]]
    return {t: rng.choice(values) for t in range(len(row) - made.pairs, len(row))}


SHORTCUTS = {
    "documents": some_kept,
    "aggregate-mode": some_line,
    "aggregate-user": some_line,
    "composition": some_symbol,
    "dyck": last_opened,
    "lost-in-the-middle": lambda made, row, rng: spread_out(made, row, rng.choice([*needles(made, row)[0].values()])),
    "modular-arithmetic": lambda made, row, rng: {len(row) - 1: 0},
    "modular-arithmetic-brackets": lambda made, row, rng: {len(row) - 1: value(row, without="()")},
    "needle": lambda made, row, rng: spread_out(made, row, rng.choice([*needles(made, row)[0].values()])),
    "phone-book": right_last_name,
    "pointer-chasing": some_symbol,
}


def predict(answer, batch):
    prediction = torch.zeros_like(batch.tokens)
    for i, row in enumerate(batch.tokens.tolist()):
        for t, token in answer(row).items():
            prediction[i, t] = token
    return prediction


def agrees(made, setting, answer, expected, rows=50, batches=24):
    """Whether the mean score over batches is as expected, within four standard errors."""
    scores = []
    for i in range(batches):
        batch = made.batch(setting, rows, task.seeded("batch", i))
        scores.append(made.score(answer(batch, i), batch)[made.metric])
    scores = torch.tensor(scores, dtype=torch.float64)
    binomial = math.sqrt(expected * (1 - expected) / (rows * batches))  # where no guess was right, scores do not vary
    return abs(float(scores.mean()) - expected) <= 4 * max(float(scores.std()) / math.sqrt(batches), binomial)


def hardest(made):
    """The evaluation settings, but of many that differ in depth or little more only a few."""
    return made.difficulties.evaluate[:1] + made.difficulties.evaluate[-3:]


@pytest.mark.parametrize("name", NAMES)
def test_every_task_can_be_solved_from_its_tokens(name):
    made = task.load(name)
    solve = SOLVERS[type(made)]
    for setting in made.difficulties.train + made.difficulties.evaluate:
        batch = made.batch(setting, 20, task.seeded(3))
        prediction = predict(lambda row: solve(made, row), batch)
        assert made.score(prediction, batch)[made.metric] == 1.0
        torch.manual_seed(0)
        wrong = torch.where(torch.rand(prediction.shape) < 0.5, (prediction + 1) % made.vocab, prediction)
        assert made.score(wrong, batch)[made.metric] < 1.0


@pytest.mark.parametrize("name", NAMES)
def test_guessing_scores_chance(name):
    made = task.load(name)
    for setting in hardest(made):
        assert agrees(made, setting, lambda batch, i: made.guess(batch, task.seeded("guess", i)), made.chance(setting))


@pytest.mark.parametrize("name", NAMES)
def test_answers_lie_where_they_are_said_to(name):
    made = task.load(name)
    low, high = made.answers
    seen = torch.cat([b.targets[b.scored] for b in (made.train_batch(200, task.seeded(i)) for i in range(20))])
    assert low <= seen.min() <= seen.max() < high
    # Large counts are rare, and large counts of a class in few lines more so.
    assert set(seen.tolist()) == set(range(low, high)) or name == "aggregate-count"


@pytest.mark.parametrize("name", NAMES)
def test_the_shortcut_scores_what_is_said(name):
    made = task.load(name)
    rng = random.Random(0)
    for setting in hardest(made):
        if name == "aggregate-count":
            earlier = made.batch(setting, 2000, task.seeded("earlier"))
            likeliest = int(earlier.targets[earlier.scored].mode().values)
            answer = lambda batch, _, number=likeliest: torch.full_like(batch.tokens, number)  # noqa: E731
        elif name in SHORTCUTS:
            answer = lambda batch, _: predict(lambda row: SHORTCUTS[name](made, row, rng), batch)  # noqa: E731
        else:
            assert made.shortcut(setting) == made.chance(setting)
            continue
        assert agrees(made, setting, answer, made.shortcut(setting))


@pytest.mark.parametrize("name", NAMES)
def test_streams_do_not_repeat_each_other(name):
    made = task.load(name)
    setting = made.difficulties.inside[-1]
    first, again, other = (made.batch(setting, 8, task.seeded(0, s, 1)) for s in ("train", "train", "validation"))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.tokens, other.tokens)


def test_letters_are_uniform():
    tokens = Copy().batch(40, 1000, task.seeded(0)).tokens[:, :20]
    counts = torch.bincount(tokens.flatten(), minlength=26).double()
    assert ((counts - 20_000 / 26) ** 2 / (20_000 / 26)).sum() < 52.6  # 25 degrees of freedom, p = 0.001


def test_bracketed_digits_and_signs_are_independent():
    # Though they are drawn from the value down: every three digits, two signs and two shapes are equally likely.
    rows = 8000
    batch = ModularArithmetic(brackets=True).batch(10, rows, task.seeded(0))
    kinds = Counter(map(tuple, batch.tokens.tolist()))
    assert len(kinds) == 5**3 * 2**2 * 2
    chi2 = sum((n - rows / 1000) ** 2 / (rows / 1000) for n in kinds.values())
    assert chi2 < 1142.8  # 999 degrees of freedom, p = 0.001


def test_flat_digits_and_operations_are_independent():
    rows = 6000
    kinds = Counter(map(tuple, ModularArithmetic().batch(4, rows, task.seeded(0)).tokens.tolist()))
    assert len(kinds) == 5 * 3 * 5
    chi2 = sum((n - rows / 75) ** 2 / (rows / 75) for n in kinds.values())
    assert chi2 < 115.0  # 74 degrees of freedom, p = 0.001


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_brackets_open_half_the_time_and_stay_within_the_depth(depth):
    made = Dyck()
    batch = made.batch((60, depth), 400, task.seeded(0))
    free = opened = 0
    for row, scored in zip(batch.tokens.tolist(), batch.scored.tolist(), strict=True):
        height = 0
        for t, token in enumerate(row):
            opens = token < made.kinds
            assert opens or height > 0
            if t:
                assert scored[t - 1] == (not opens)
            if 0 < height < depth:
                free, opened = free + 1, opened + opens
            height += 1 if opens else -1
            assert height <= depth
    assert abs(opened - free / 2) <= 2 * math.sqrt(free)  # four standard errors


@pytest.mark.parametrize("depth", range(9))
def test_the_asked_needle_lies_at_its_depth_and_the_filler_runs_on(depth):
    made = task.load("lost-in-the-middle")
    text = "The grass is green . The sky is blue . The sun is yellow . Here we go . There and back again ."
    words = text.split()
    ids = {word: 10 + made.keys + i for i, word in enumerate(dict.fromkeys(words))}
    for row in made.batch((99, depth), 20, task.seeded(depth)).tokens.tolist():
        (_, asked), text = needles(made, row), row[: row.index(made.vocab - 1)]
        at = next(i for i, token in enumerate(text) if token == made.vocab - 2 and text[i + 1] == asked)
        filler = [token for token in text if token in ids.values()]
        before = sum(token in ids.values() for token in text[:at])
        assert before == len(filler) * depth // 8
        start = [i for i in range(24) if all(ids[words[(i + j) % 24]] == token for j, token in enumerate(filler))]
        assert len(start) == 1


def test_needles_lie_anywhere():
    made = task.load("needle")
    batch = made.batch(40, 4000, task.seeded(0))
    room = 40 - made.needles * (2 + made.digits) - 1 - made.digits
    before = Counter()
    for row in batch.tokens.tolist():
        known, asked = needles(made, row)
        before[[key for key in known].index(asked), 0] += 1
        at = next(i for i, token in enumerate(row) if token == made.vocab - 2 and row[i + 1] == asked)
        before[sum(10 + made.keys <= token < made.vocab - 2 for token in row[:at]), 1] += 1
    for axis, size in ((0, made.needles), (1, room + 1)):
        counts = [before[i, axis] for i in range(size)]
        assert sum(counts) == 4000
        chi2 = sum((n - 4000 / size) ** 2 / (4000 / size) for n in counts)
        assert chi2 < {4: 16.3, 22: 46.8}[size]  # p = 0.001


def test_pointers_are_one_cycle():
    made = Hops()
    for row in made.batch((21, 3), 30, task.seeded(0)).tokens.tolist():
        pointer = {row[i] - made.symbols: row[i + 1] for i in range(0, 16, 2)}
        symbol, seen = row[1], set()
        while symbol not in seen:
            seen.add(symbol)
            symbol = pointer[symbol]
        assert len(seen) == len(pointer) == 8


def test_density_does_not_change_what_is_counted():
    for question in ("count", "mode", "user"):
        made = task.load(f"aggregate-{question}")
        short, long = (made.batch((length, 12), 50, task.seeded(0)) for length in (29, 200))
        for batch in (short, long):
            assert {len(judged(made, row)[0]) for row in batch.tokens.tolist()} == {12}
        assert made.shortcut((29, 12)) == made.shortcut((200, 12))


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("copy", 7, "an even length"),
        ("copy", 0, "an even length"),
        ("reverse", (8, 2), "an even length"),
        ("needle", 10, "use 19 or more"),
        ("needle", (64, 4), "a setting is a length"),
        ("needle", True, "a setting is a length"),
        ("lost-in-the-middle", 64, r"\(length, depth\)"),
        ("lost-in-the-middle", (64, 9), "from 0 to 8"),
        ("lost-in-the-middle", (10, 4), "use 19 or more"),
        ("phone-book", 45, r"\(length, entries\)"),
        ("phone-book", (44, 8), r"use \(45, 8\)"),
        ("phone-book", (330, 65), "fewer entries or more names"),
        ("modular-arithmetic", 5, "2 n for n >= 1"),
        ("modular-arithmetic", 0, "2 n for n >= 1"),
        ("modular-arithmetic-brackets", 2, "4 n - 2 for n >= 2"),
        ("modular-arithmetic-brackets", 12, "4 n - 2 for n >= 2"),
        ("dyck", 32, r"\(length, depth\)"),
        ("dyck", (32, 17), "use 34 or more"),
        ("pointer-chasing", 21, r"\(length, hops\)"),
        ("pointer-chasing", (21, 5), "use hops=5 or more"),
        ("pointer-chasing", (20, 1), "plus a multiple of 2"),
        ("pointer-chasing", (11, 3), "need at least 4 pairs"),
        ("pointer-chasing", (45, 1), "use symbols=20 or more"),
        ("composition", (22, 2), "plus a multiple of 4"),
        ("composition", (11, 1), "need at least 4 pairs"),
        ("aggregate-mode", 64, r"\(length, lines\)"),
        ("aggregate-mode", (24, 12), "use 25 or more"),
        ("aggregate-count", (28, 12), "use 29 or more"),
        ("aggregate-mode", (24, 2), "use 3 or more"),
        ("aggregate-user", (64, 11), "use 12 or more"),
    ],
)
def test_settings_that_make_no_sense(name, setting, message):
    with pytest.raises(TaskError, match=f"task {name}: .*{message}"):
        task.load(name).batch(setting, 2, task.seeded(0))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("copy", {"letters": 1}, "at least 2"),
        ("copy", {"train": ()}, "no training setting"),
        ("needle", {"needles": 17}, "use keys=17 or more"),
        ("needle", {"digits": 0}, "digits is 0; give at least 1"),
        ("phone-book", {"names": 0}, "names is 0; give at least 1"),
        ("modular-arithmetic", {"train": 3}, "2 n for n"),
        ("dyck", {"kinds": 1}, "fewer than 2"),
        ("composition", {"hops": 0}, "hops is 0; give at least 1"),
        ("aggregate-mode", {"question": "median"}, "ask one of count, mode, user"),
        ("aggregate-mode", {"classes": 1}, "classes is 1; give at least 2"),
        ("aggregate-count", {"most": 0}, "most is 0; give at least 1"),
    ],
)
def test_options_that_make_no_sense(name, options, message):
    with pytest.raises(TaskError, match=message):
        task.load(name, **options)


def test_the_defaults_cover_more_than_training():
    assert task.load("copy").difficulties.outside == (64, 128)
    assert task.load("phone-book").difficulties.outside == ((85, 16), (165, 32))
    assert task.load("lost-in-the-middle").difficulties.inside == tuple((64, depth) for depth in range(9))
    assert task.load("pointer-chasing").difficulties.outside == ((21, 4), (37, 4))
    assert task.load("needle", needles=1, train=[16, 32]).difficulties.evaluate == (16, 32, 64, 128)
    assert task.load("lost-in-the-middle", train=(64, 3)).difficulties.train == ((64, 3),)


def test_documents_say_where_they_begin():
    made = task.load("documents", pairs=3)
    batch = made.batch(made.between(4), 5, task.seeded(0))
    begins = torch.isin(batch.tokens, torch.tensor([made.local, made.ask]))
    assert torch.equal(batch.boundary, begins.to(torch.int8) * 2)
    assert torch.equal(batch.ctx.boundary, batch.boundary)
    assert begins.sum(1).tolist() == [5] * 5
    assert task.load("mqar").batch((64, 4), 2, task.seeded(0)).ctx is None


@pytest.mark.parametrize(("setting", "words"), [(40, r"\(length, documents\)"), ((58, 3), "have a length of 47")])
def test_documents_of_another_length_are_refused(setting, words):
    with pytest.raises(TaskError, match=words):
        task.load("documents").batch(setting, 2, task.seeded(0))
