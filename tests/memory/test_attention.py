"""The state of attention: a list that grows, a ring that does not, given away or kept."""

import math

import pytest
import torch

from postformer.contract import state as states
from postformer.contract.context import DOCUMENT, Context
from postformer.contract.state import Growing
from postformer.design import DesignError, load
from postformer.memory.lists import Ring, append, rotate
from postformer.model import build
from postformer.verify import verify


def entries(*values):
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1, 1)


def listed(memory):
    return [memory.data[i, :n, 0, 0, 0].tolist() for i, n in enumerate(memory.length.tolist())]


def empty():
    return Growing(torch.zeros(1, 0, 1, 1, 1, dtype=torch.float64), torch.tensor([0]))


def test_a_list_grows_by_doubling_and_keeps_its_entries():
    memory, capacities = empty(), []
    for i in range(1, 10):
        memory = append(memory, entries(i), None, None, False)
        capacities.append(memory.data.shape[1])
    assert listed(memory) == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert capacities == [1, 2, 4, 4, 8, 8, 8, 8, 16]


def test_a_list_given_away_is_written_in_place_and_one_kept_is_not():
    memory = append(append(empty(), entries(1, 2, 3), None, None, False), entries(4), None, None, False)
    before = memory.data.clone()
    kept = append(memory, entries(5), None, None, False)
    assert torch.equal(memory.data, before)
    assert kept.data.data_ptr() != memory.data.data_ptr()
    given = append(memory, entries(6), None, None, True)
    assert given.data.data_ptr() == memory.data.data_ptr()
    assert (listed(kept), listed(given)) == ([[1, 2, 3, 4, 5]], [[1, 2, 3, 4, 6]])


def test_only_kept_tokens_of_the_last_document_enter():
    memory = append(empty(), entries(1, 2), None, None, False)
    keep, segments = torch.tensor([[True, False, True, True]]), torch.tensor([[0, 0, 1, 1]])
    assert listed(append(memory, entries(3, 4, 5, 6), None, keep, False)) == [[1, 2, 3, 5, 6]]
    assert listed(append(memory, entries(3, 4, 5, 6), segments, keep, False)) == [[5, 6]]
    assert listed(append(memory, entries(3, 4, 5, 6), segments * 0, keep, False)) == [[1, 2, 3, 5, 6]]
    nothing = torch.zeros(1, 4, dtype=torch.bool)
    assert listed(append(memory, entries(3, 4, 5, 6), None, nothing, False)) == [[1, 2]]


def ring(width=3):
    return Ring(torch.zeros(1, width, 1, 1, 1, dtype=torch.float64), torch.full((1, width), -1), torch.tensor([0]))


def test_a_ring_holds_the_last_entries_in_place_of_the_oldest():
    memory = ring()
    for t in range(5):
        memory = rotate(memory, entries(t + 1), torch.tensor([[t]]), None, None, False)
    assert memory.data.flatten().tolist() == [4, 5, 3]
    assert memory.position.tolist() == [[3, 4, 2]]
    whole = rotate(ring(), entries(1, 2, 3, 4, 5), torch.arange(5)[None], None, None, False)
    assert torch.equal(whole.data, memory.data)
    assert torch.equal(whole.position, memory.position)
    assert whole.count.tolist() == [5]
    segments = torch.tensor([[0, 0, 0, 0, 1]])
    cut = rotate(whole, entries(6, 7, 8, 9, 10), torch.tensor([[5, 6, 7, 8, 0]]), segments, None, False)
    assert cut.position.tolist() == [[0, -1, -1]]
    assert cut.data.flatten().tolist() == [10, 0, 0]


def test_a_ring_given_away_is_written_in_place():
    memory = rotate(ring(), entries(1, 2), torch.tensor([[0, 1]]), None, None, False)
    before = memory.data.clone()
    rotate(memory, entries(3), torch.tensor([[2]]), None, None, False)
    assert torch.equal(memory.data, before)
    given = rotate(memory, entries(3), torch.tensor([[2]]), None, None, True)
    assert given.data.data_ptr() == memory.data.data_ptr()
    assert given.data.flatten().tolist() == [1, 2, 3]


@pytest.mark.parametrize("name", ["transformer", "sliding-window"])
def test_decoding_with_a_state_given_away_allocates_a_new_list_only_when_it_is_full(name):
    model = build(load(name, width=32, layers=2).model)
    ids = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        truth, state = model(ids).logits, model(ids[:, :20]).state
        buffers, logits = set(), []
        for t in range(20, 40):
            out = model(ids[:, t : t + 1], state, Context(consume=True))
            state = out.state
            buffers.add(state.stack[0][0].memory.data.data_ptr())
            logits.append(out.logits)
    assert len(buffers) == 1
    assert (torch.cat(logits, 1) - truth[:, 20:]).abs().max() < 1e-4


def test_a_mixer_alone_counts_its_positions():
    mixer = build(load("transformer", width=32, layers=2).model).stack.layers[0].sublayers[0].mixer
    boundary = torch.zeros(1, 4, dtype=torch.int8)
    boundary[0, 2] = DOCUMENT
    x = torch.randn(1, 4, 32)
    with torch.no_grad():
        packed = mixer(x, None, Context(boundary=boundary))
        assert (packed.y[:, 2:] - mixer(x[:, 2:]).y).abs().max() < 1e-6
    assert packed.state.next.tolist() == [2]
    out = mixer(torch.ones(1, 4, 32))
    assert out.state.next.tolist() == [4]
    assert states.size(out.state) == 4 * 2 * mixer.kv_heads * mixer.dim * 4 + 16


@pytest.mark.parametrize("more", [{}, {"window": 6}, {"persistent": 3, "position": "none"}],
                         ids=["full", "window", "persistent"])
def test_scalable_softmax_keeps_the_contract(more):
    mixer = {"kind": "attention", "softmax": "scalable", **more}
    found = verify({"name": "s", "model": {"width": 32, "mixers": {"a": mixer}, "stack": ["a", "a"]}})
    assert [(r.name, r.note) for r in found.results if r.passed is False] == []


@pytest.mark.parametrize("causal", [True, False])
def test_scalable_softmax_multiplies_logits_by_the_logarithm_of_what_is_seen(causal):
    data = {"name": "s", "model": {"width": 32, "mixers": {"a": {
        "kind": "attention", "softmax": "scalable", "position": "none", "heads": {"query": 2}}}, "stack": ["a"]}}
    mixer = build(load(data).model).stack.layers[0].sublayers[0].mixer.double()
    with torch.no_grad():
        mixer.sharpness.copy_(torch.tensor([0.4, 1.3]))
        boundary = torch.zeros(1, 9, dtype=torch.int8)
        boundary[0, 4] = DOCUMENT
        x = torch.randn(1, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        found = mixer(x, None, Context(boundary=boundary, causal=causal)).y[0]
        q, k, v = (m(x[0]).view(9, 2, 16) for m in (mixer.q, mixer.k, mixer.v))
        rows = []
        for t in range(9):
            first, end = (0, 4) if t < 4 else (4, 9)
            keys = slice(first, t + 1 if causal else end)
            n = keys.stop - keys.start
            logits = torch.einsum("hd,shd->hs", q[t], k[keys]) / 4 * mixer.sharpness[:, None] * math.log(n)
            rows.append(torch.einsum("hs,shd->hd", logits.softmax(-1), v[keys]).flatten())
        assert (mixer.out(torch.stack(rows)) - found).abs().max() < 1e-12


@pytest.mark.parametrize("more", [{"window": 6}, {"heads": {"query": 4, "key_value": 2}, "qk_norm": "rms"}],
                         ids=["window", "full"])
def test_persistent_keys_keep_the_contract(more):
    """Seen from every document, window and row, whatever is padding; counted as parameters, not as state."""
    mixer = {"kind": "attention", "persistent": 5, **more}
    found = verify({"name": "p", "model": {"width": 32, "mixers": {"a": mixer}, "stack": ["a", "a"]}})
    assert [(r.name, r.note) for r in found.results if r.passed is False] == []


def test_persistent_keys_are_all_that_a_first_read_only_token_sees():
    data = {"name": "p", "model": {"width": 32, "mixers": {"a": {"kind": "attention", "persistent": 1}},
                                   "stack": ["a"]}}
    mixer = build(load(data).model).stack.layers[0].sublayers[0].mixer
    nothing = torch.zeros(2, 3)
    with torch.no_grad():
        out = mixer(torch.randn(2, 3, 32), None, Context(write=nothing, tick=nothing))
        expected = mixer.out(mixer.persistent[1, :, 0].flatten())
    assert (out.y - expected).abs().max() < 1e-6
    assert out.state.memory.length.tolist() == [0, 0]
    with pytest.raises(DesignError, match="persistent"):
        load({"name": "p", "model": {"width": 32, "mixers": {"a": {"kind": "attention", "persistent": -1}},
                                     "stack": ["a"]}})


def test_a_window_alone_counts_the_tokens_that_exist():
    data = {"name": "p", "model": {"width": 32, "mixers": {"a": {"kind": "attention", "window": 2}}, "stack": ["a"]}}
    mixer = build(load(data).model).stack.layers[0].sublayers[0].mixer
    x, valid = torch.randn(1, 5, 32), torch.tensor([[True, False, False, True, True]])
    with torch.no_grad():
        y = mixer(x, None, Context(valid=valid)).y
        assert (y[valid] - mixer(x[:, valid[0]]).y[0]).abs().max() < 1e-6


def test_positions_that_repeat_do_not_show_later_tokens():
    mixer = build(load("sliding-window", width=32, layers=2).model).stack.layers[0].sublayers[0].mixer
    x, position = torch.randn(1, 4, 32), torch.tensor([[3, 3, 2, 3]])
    with torch.no_grad():
        whole = mixer(x, None, Context(position=position)).y
        for t in range(1, 4):
            part = mixer(x[:, :t], None, Context(position=position[:, :t])).y
            assert (whole[:, :t] - part).abs().max() < 1e-6


@pytest.mark.parametrize("more", [{}, {"persistent": 3},
                                  {"heads": {"query": 4, "key_value": 2}, "softmax": "scalable"}],
                         ids=["plain", "persistent", "grouped"])
@pytest.mark.parametrize("gated", [False, True])
def test_a_ring_by_operations_that_can_be_recorded(more, gated, monkeypatch):
    """Token by token, rows of which some enter the list and some do not, until it has gone round twice."""
    mixer = build(load({"name": "r", "model": {"width": 32, "mixers": {"a": {
        "kind": "attention", "window": 5, **more}}, "stack": ["a"]}}).model).stack.layers[0].sublayers[0].mixer.double()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 17, 32, dtype=torch.float64, generator=generator)
    write = (torch.rand(3, 17, generator=generator) > 0.4).double() if gated else None
    with torch.no_grad():
        results = []
        for recorded in (False, True):
            monkeypatch.setattr("postformer.memory.attention.recording", lambda recorded=recorded: recorded)
            state, ys = mixer.initial(3), []
            for t in range(17):
                out = mixer(x[:, t : t + 1], state, Context(write=None if write is None else write[:, t : t + 1]))
                state, ys = out.state, [*ys, out.y]
            results.append((torch.cat(ys, 1), state))
    (y, state), (y_, state_) = results
    assert (y - y_).abs().max() < 1e-12
    assert torch.equal(state.memory.count, state_.memory.count)
    assert torch.equal(state.memory.position, state_.memory.position)
    assert (state.memory.data - state_.memory.data).abs().max() < 1e-12
