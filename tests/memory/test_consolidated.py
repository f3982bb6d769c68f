"""What is kept of a memory from one document to the next, against a loop over documents."""

import pytest
import torch

from postformer.contract import state as states
from postformer.contract.context import DOCUMENT, SEGMENT, STREAM, Context
from postformer.design import DesignError, load
from postformer.model import build
from postformer.verify import verify
from postformer.verify.compare import state_error

DELTA = {"kind": "matrix", "loss": "l2", "features": ["silu", "l2norm"], "heads": {"value": 2},
         "retention": {"per": "head", "gate": "mamba"}}
FILTER = {"kind": "filter", "heads": {"value": 2, "dim_key": 8}, "retention": {"per": "head", "gate": "mamba"}}
MAMBA = {"kind": "vector", "dim_inner": 16, "dim_state": 4}
DEEP = {"kind": "deep", "heads": {"value": 1}, "net": {"kind": "mlp", "expand": 1}, "retention": "decay",
        "update": {"kind": "momentum", "chunk": 4, "clip": 1.0}, "features": "l2norm"}


RGLRU = {"kind": "vector", "parameterisation": "rglru", "dim_inner": 16}


def recipe(mixer):
    return {"name": "composite", "model": {"width": 16, "mixers": {"m": mixer}, "stack": ["m"]}}


def consolidated(of=DELTA, **more):
    return {"kind": "consolidated", "of": of, **more}


def mixer_of(design, seed=0):
    return build(load(recipe(design)).model, seed).double().stack.layers[0].sublayers[0].mixer


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bounded(length, **levels):
    """The context of one row with boundaries at these tokens: t5=DOCUMENT."""
    boundary = torch.zeros(1, length, dtype=torch.int8)
    for at, level in levels.items():
        boundary[0, int(at[1:])] = level
    return Context(boundary=boundary)


@pytest.mark.parametrize("design", [
    consolidated(), consolidated(FILTER), consolidated(MAMBA, share=0.3), consolidated(DEEP, share=0.7),
    consolidated({**DELTA, "forget_at": "segment"}, at="segment"), consolidated({**DELTA, "local": "conv3"}),
    {"kind": "timescales", "levels": [{"of": consolidated(FILTER)}, {"of": MAMBA, "every": 3}], "doubt": True},
])
def test_it_keeps_the_contract(design):
    found = verify(recipe(design))
    assert [(r.name, r.value, r.note) for r in found.results if r.passed is False] == []


@pytest.mark.parametrize("of", [DELTA, FILTER, MAMBA, DEEP])
def test_a_document_starts_from_what_was_kept_of_those_before(of):
    made, x = mixer_of(consolidated(of, share=0.3)), random(1, 20, 16)
    kept, ys = made.of.initial(1), []
    for a, b in ((0, 6), (6, 13), (13, 20)):
        out = made.of(x[:, a:b], kept)
        ys.append(out.y)
        kept = states.map_state(lambda new, old: 0.7 * old + 0.3 * new if new.is_floating_point() else new,
                                out.state, kept)
    found = made(x, None, bounded(20, t6=DOCUMENT, t13=DOCUMENT))
    assert (found.y - torch.cat(ys, 1)).abs().max() < 1e-12
    assert state_error(found.state.running, out.state) < 1e-12


@pytest.mark.parametrize("of", [DELTA, RGLRU, DEEP, FILTER])
def test_nothing_kept_is_the_memory_by_itself_and_everything_is_one_that_never_forgets(of):
    x, ctx = random(1, 20, 16), bounded(20, t6=DOCUMENT, t13=DOCUMENT)
    for share, forget_at in ((0.0, "document"), (1.0, "stream")):
        made = mixer_of(consolidated(of, share=share))
        plain = mixer_of({**of, "forget_at": forget_at})
        plain.load_state_dict(made.of.state_dict())
        assert (made(x, None, ctx).y - plain(x, None, ctx).y).abs().max() < 1e-12


def test_the_learned_share_is_of_the_mean_of_the_document():
    made, x = mixer_of(consolidated()), random(1, 20, 16)
    with torch.no_grad():
        made.share.weight.copy_(3 * random(1, 16, seed=4))
    found = made(x, None, bounded(20, t6=DOCUMENT, t13=DOCUMENT)).state.kept
    kept = made.of.initial(1)
    for a, b in ((0, 6), (6, 13)):
        c = torch.sigmoid(made.share(x[0, a:b].mean(0)))
        after = made.of(x[:, a:b], kept).state
        kept = kept._replace(memory=kept.memory + c * (after.memory - kept.memory))
    assert state_error(found, kept) < 1e-12


def test_a_stream_ends_it_all_and_a_segment_nothing():
    made, x = mixer_of(consolidated()), random(1, 20, 16)
    ended = made(x, None, bounded(20, t6=DOCUMENT, t9=STREAM))
    alone = made(x[:, 9:])
    assert (ended.y[:, 9:] - alone.y).abs().max() < 1e-13
    assert state_error(ended.state, alone.state) < 1e-13
    assert torch.equal(made(x, None, bounded(20, t6=SEGMENT)).y, made(x).y)


def test_what_a_convolution_saw_of_a_document_is_not_kept():
    made, x = mixer_of(consolidated({**DELTA, "local": "conv3"}, share=0.5)), random(1, 20, 16)
    y = made(x, None, bounded(20, t6=DOCUMENT)).y
    first = made.of(x[:, :6])
    start = made.of.initial(1)._replace(memory=0.5 * first.state.memory)
    assert (y[:, 6:] - made.of(x[:, 6:], start).y).abs().max() < 1e-12


def test_an_empty_document_leaves_what_was_kept():
    made, x = mixer_of(consolidated(share=0.5)), random(1, 20, 16)
    valid = torch.ones(1, 20, dtype=torch.bool)
    valid[0, 6:9] = False
    twice = bounded(20, t6=DOCUMENT, t9=DOCUMENT).replace(valid=valid)
    once = made(torch.cat([x[:, :6], x[:, 9:]], 1), None, bounded(17, t6=DOCUMENT))
    assert (made(x, None, twice).y[:, 9:] - once.y[:, 6:]).abs().max() < 1e-13


@pytest.mark.parametrize(("design", "words"), [
    (consolidated({**MAMBA, "local": "conv3"}), "set local: none"),
    (consolidated({"kind": "matrix", "parameterisation": "mlstm", "heads": {"value": 2}}), "another memory"),
    (consolidated({"kind": "attention", "window": 4, "heads": {"query": 2}}), "no half"),
    (consolidated({"kind": "swiglu"}), "keeps nothing"),
    (consolidated({**DELTA, "forget_at": "stream"}), "set forget_at: document"),
    (consolidated(share=1.5), r"lies in \[0, 1\]"),
])
def test_what_cannot_be_is_refused_with_a_remedy(design, words):
    with pytest.raises((DesignError, ValueError), match=words):
        build(load(recipe(design)).model)


def test_a_segment_inside_a_document_reaches_the_memory():
    inner = {"kind": "slow", "of": DELTA, "every": "segment"}
    made, x = mixer_of(consolidated(inner)), random(1, 20, 16)
    ctx = bounded(20, t4=SEGMENT, t9=SEGMENT, t13=DOCUMENT)
    found, alone = made(x, None, ctx).y, made.of(x, None, ctx).y
    assert (found[:, :13] - alone[:, :13]).abs().max() < 1e-13
    assert found[:, 5:13].abs().max() > 1e-3


def test_half_a_token_counts_as_half_of_itself():
    made, x = mixer_of(consolidated()), random(1, 9, 16)
    write = torch.ones(1, 9, dtype=torch.float64)
    write[0, :6] = 0.1
    state = made(x, None, bounded(9, t6=DOCUMENT).replace(write=write, tick=write)).state
    c = torch.sigmoid(made.share(x[0, :6].mean(0)))
    after = made.of(x[:, :6], None, Context(write=write[:, :6], tick=write[:, :6])).state
    assert (state.kept.memory - c * after.memory).abs().max() < 1e-13
