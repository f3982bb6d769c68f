import itertools
import math

import pytest
import torch

from postformer import task
from postformer.task import Group, GroupWord, TaskError

SIZES = {"S3": 6, "S4": 24, "S5": 120, "A5": 60, "Z60": 60, "Z2": 2, "A4xZ5": 60, "D4": 8, "D1": 2, "S1": 1}


def permutations(name):
    """The elements in the documented order, by another route than the library's: cycle parity, not inversions."""
    every = list(itertools.permutations(range(int(name[1:]))))

    def even(p):
        seen, cycles = set(), 0
        for start in range(len(p)):
            cycles += start not in seen
            while start not in seen:
                seen.add(start)
                start = p[start]
        return (len(p) - cycles) % 2 == 0

    return every if name[0] == "S" else [p for p in every if even(p)]


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_the_group_axioms(name, size):
    group = Group(name)
    table = group.table
    assert len(group) == size
    assert table.shape == (size, size)
    assert torch.equal(table[0], torch.arange(size))
    assert torch.equal(table[:, 0], torch.arange(size))
    assert torch.equal(table.sort(0).values, torch.arange(size)[:, None].expand(size, size))
    assert torch.equal(table.sort(1).values, torch.arange(size).expand(size, size))
    a, b, c = torch.randint(size, (3, 2000), generator=torch.Generator().manual_seed(0))
    assert torch.equal(table[table[a, b], c], table[a, table[b, c]])


@pytest.mark.parametrize(("name", "commutes"), [("Z60", True), ("Z2", True), ("S3", False), ("A5", False)])
def test_which_commute(name, commutes):
    table = Group(name).table
    assert torch.equal(table, table.T) == commutes


@pytest.mark.parametrize("name", ["S3", "S4", "S5", "A5"])
def test_prefix_products_against_composing_permutations(name):
    elements = permutations(name)
    batch = task.load(f"group-{name.lower()}").batch(37, 8, task.seeded(0))
    for row, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        product = tuple(range(len(elements[0])))
        for token, target in zip(row, targets, strict=True):
            x = elements[token]
            product = tuple(product[x[i]] for i in range(len(x)))  # (product * x)(i) = product(x(i))
            assert elements[target] == product


@pytest.mark.parametrize(("name", "modulus"), [("group-z60", 60), ("parity", 2)])
def test_cyclic_groups_are_running_sums(name, modulus):
    batch = task.load(name).batch(50, 16, task.seeded(0))
    assert torch.equal(batch.targets, batch.tokens.cumsum(1) % modulus)


def test_a_direct_product_works_on_its_parts():
    batch = task.load("group-a4xz5").batch(20, 8, task.seeded(0))
    left, right = batch.tokens // 5, batch.tokens % 5
    assert torch.equal(batch.targets // 5, Group("A4").prefix_products(left))
    assert torch.equal(batch.targets % 5, right.cumsum(1) % 5)


def test_dihedral_elements_act_on_the_polygon():
    table = Group("D5").table

    def act(element, i):
        return (element % 5 + (i if element < 5 else -i)) % 5

    for a, b in itertools.product(range(10), repeat=2):
        assert [act(table[a, b].item(), i) for i in range(5)] == [act(a, act(b, i)) for i in range(5)]


@pytest.mark.parametrize("length", [1, 2, 3, 16, 17])
def test_any_length_has_its_products(length):
    tokens = torch.randint(6, (4, length), generator=task.seeded(length))
    table, product = Group("S3").table, tokens[:, 0]
    expected = [product]
    for t in range(1, length):
        product = table[product, tokens[:, t]]
        expected.append(product)
    assert torch.equal(Group("S3").prefix_products(tokens), torch.stack(expected, 1))


@pytest.mark.parametrize("name", ["group-s3", "group-a5", "parity"])
def test_a_random_answer_scores_chance(name):
    loaded = task.load(name)
    batch = loaded.batch(32, 500, task.seeded(0))
    guess = loaded.guess(batch, task.seeded(1))
    chance, score = loaded.chance(32), loaded.score(guess, batch)
    for metric, trials in (("token_accuracy", 32 * 500), ("last_accuracy", 500)):
        assert abs(score[metric] - chance) < 4 * math.sqrt(chance * (1 - chance) / trials)
    repeat = loaded.score(batch.tokens, batch)[loaded.metric]
    trials = 500 if loaded.metric == "last_accuracy" else 32 * 500
    assert abs(repeat - loaded.shortcut(32)) < 4 * math.sqrt(chance * (1 - chance) / trials)


def test_tokens_are_uniform():
    tokens = task.load("group-s4").batch(100, 240, task.seeded(0)).tokens
    counts = torch.bincount(tokens.flatten(), minlength=24).double()
    assert ((counts - 1000) ** 2 / 1000).sum() < 49.7  # 23 degrees of freedom, p = 0.001


def test_lengths_and_what_lies_beyond_training():
    assert GroupWord().difficulties == task.load("group", group="S3").difficulties
    difficulties = GroupWord("S3").difficulties
    assert (difficulties.train, difficulties.inside, difficulties.outside) == ((16,), (16,), (32, 64))
    assert GroupWord("S3", train=(8, 100)).difficulties.evaluate == (100, 200, 400)
    difficulties = GroupWord("A5", train=(3, 40), evaluate=[20, 40, 41]).difficulties
    assert (difficulties.train, difficulties.inside, difficulties.outside) == ((3, 40), (20, 40), (41,))


@pytest.mark.parametrize("name", ["S7", "Z1001", "D501", "S5xZ60", "S5xS4"])
def test_groups_too_large_are_refused(name):
    with pytest.raises(TaskError, match="more than 1000 elements"):
        Group(name)


@pytest.mark.parametrize("name", ["Q8", "S", "", "Z0", "S3x", "s3", "S3 x Z2"])
def test_unknown_groups_are_refused(name):
    with pytest.raises(TaskError, match="for instance S3"):
        GroupWord(name)


@pytest.mark.parametrize("setting", [0, -1, 2.5, (16, 2), "16", True, None])
def test_settings_that_make_no_sense(setting):
    with pytest.raises(TaskError, match="a length of at least 1"):
        task.load("group-s3").batch(setting, 2, task.seeded(0))
    with pytest.raises(TaskError, match="no training length"):
        GroupWord(train=())
