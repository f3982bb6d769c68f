"""Operations on states: every leaf keeps its row, growing lists of different capacity join."""

import pytest
import torch
from safetensors.torch import load, save
from torch.testing import assert_close

from postformer.contract import state as states
from postformer.contract.state import Growing


def tree(batch, capacity, used, seed=0):
    g = torch.Generator().manual_seed(seed)
    data = torch.randn(batch, capacity, 2, 3, generator=g)
    return {"a": (torch.randn(batch, 4, generator=g), None),
            "list": Growing(data, torch.tensor(used)), "n": [torch.arange(batch) + 10 * seed]}


def test_map_keeps_containers_and_passes_corresponding_leaves():
    one, two = tree(2, 3, [1, 3]), tree(2, 3, [1, 3], seed=1)
    total = states.map_state(torch.add, one, two)
    assert type(total["list"]) is Growing
    assert type(total["a"]) is tuple
    assert total["a"][1] is None
    assert torch.equal(total["a"][0], one["a"][0] + two["a"][0])
    assert torch.equal(total["n"][0], torch.tensor([10, 12]))
    assert states.map_state(torch.neg, None) is None
    assert [tuple(leaf.shape) for leaf in states.leaves(one)] == [(2, 4), (2, 3, 2, 3), (2,), (2,)]
    with pytest.raises(TypeError, match="a state is made of tensors in tuples, lists and dicts, not int"):
        states.map_state(torch.neg, (torch.zeros(1), 3))


def test_select_forks_reorders_and_copies():
    whole = tree(3, 2, [0, 1, 2])
    picked = states.select(whole, [2, 0, 2])
    assert torch.equal(picked["n"][0], torch.tensor([2, 0, 2]))
    assert torch.equal(picked["list"].length, torch.tensor([2, 0, 2]))
    assert torch.equal(picked["a"][0][0], picked["a"][0][2])
    picked["a"][0].zero_()
    assert whole["a"][0].abs().min() > 0
    assert torch.equal(states.select(whole, torch.tensor([1]))["list"].data, whole["list"].data[1:2])


def test_concat_pads_lists_to_the_largest_capacity_and_inverts_select():
    one, two = tree(2, 5, [5, 2]), tree(1, 3, [3], seed=1)
    joined = states.concat([one, two])
    assert joined["list"].data.shape == (3, 5, 2, 3)
    assert torch.equal(joined["list"].length, torch.tensor([5, 2, 3]))
    assert torch.equal(joined["list"].data[2, :3], two["list"].data[0])
    assert not joined["list"].data[2, 3:].any()
    assert torch.equal(joined["n"][0], torch.tensor([0, 1, 10]))
    empty = {**tree(1, 1, [0]), "list": Growing(torch.zeros(1, 0, 2, 3), torch.tensor([0]))}
    assert states.concat([empty, two])["list"].data.shape == (2, 3, 2, 3)
    again = states.concat([states.select(one, [0]), states.select(one, [1])])
    for a, b in zip(states.leaves(again), states.leaves(one), strict=True):
        assert torch.equal(a, b)
    assert states.concat([None, None]) is None


def test_leaves_that_share_memory_are_saved_apart():
    one = torch.arange(6.0).view(2, 3)
    back = states.unflatten(load(save(states.flatten((one, one, one[:1])))), (one, one, one[:1]))
    assert torch.equal(back[0], one)
    assert torch.equal(back[1], one)
    assert torch.equal(back[2], one[:1])


def test_where_takes_rows():
    new, old = tree(3, 2, [1, 1, 1]), tree(3, 2, [2, 2, 2], seed=1)
    mixed = states.where(torch.tensor([True, False, True]), new, old)
    assert torch.equal(mixed["n"][0], torch.tensor([0, 11, 2]))
    assert torch.equal(mixed["list"].length, torch.tensor([1, 2, 1]))
    assert torch.equal(mixed["a"][0][1], old["a"][0][1])
    assert torch.equal(mixed["list"].data[2], new["list"].data[2])


def test_size_counts_bytes_and_of_lists_what_the_longest_row_uses():
    assert states.size(None) == 0
    assert states.size((torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), None)) == 24 + 16
    grown = Growing(torch.zeros(2, 8, 3), torch.tensor([1, 5]))
    assert states.size(grown) == 2 * 5 * 3 * 4 + 2 * 8
    assert states.size({"x": Growing(torch.zeros(2, 8, 3, dtype=torch.float64), torch.tensor([0, 0]))}) == 16
    assert states.size([Growing(torch.zeros(0, 8, 3), torch.zeros(0, dtype=torch.long))]) == 0


def test_detach_cuts_history_and_keeps_values():
    leaf = torch.ones(2, 3, requires_grad=True)
    state = (leaf * 2, Growing(leaf[:, :, None] * 3, torch.tensor([3, 3])))
    cut = states.detach(state)
    assert not any(x.requires_grad for x in states.leaves(cut))
    assert torch.equal(cut[1].data, state[1].data)
    assert state[0].requires_grad


def test_flatten_and_unflatten_pass_through_bytes():
    whole = tree(2, 4, [4, 1])
    saved = states.flatten(whole, "s")
    assert list(saved) == ["s.0", "s.1", "s.2", "s.3"]
    like = tree(5, 1, [0] * 5, seed=3)
    back = states.unflatten(load(save(saved)), like, "s")
    assert type(back["list"]) is Growing
    for a, b in zip(states.leaves(back), states.leaves(whole), strict=True):
        assert_close(a, b, rtol=0, atol=0)
    with pytest.raises(KeyError):
        states.unflatten({"s.0": torch.zeros(1)}, like, "s")
