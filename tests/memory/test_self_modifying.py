"""The self-modifying memory: what it refuses, that it stays bounded, and what its chunks count."""

from __future__ import annotations

import pytest
import torch

from postformer.contract.context import Context
from postformer.design import DesignError, load
from postformer.model import build
from postformer.verify import verify
from postformer.verify.compare import error

MEMORY = "model.mixers.memory."


def memory(*more: str, width: int = 64):
    made = load("hope", [MEMORY + m for m in ("heads={value: 2}", *more)], width=width, layers=1)
    return build(made.model, seed=0).stack.layers[0].sublayers[0].mixer


@pytest.mark.parametrize(("override", "text", "remedy"), [
    ("heads.key=2", "each head makes its own keys", "leave heads.key out"),
    ("heads.dim_value=32", "go through the same memories", "leave both out"),
    ("local=shift", "not by shift", "set local: conv4 or none"),
    ("read={per: group}", "norms the heads of a shared key", "set per: head"),
    ("update.chunk=0", "greater than or equal to 1", "update.chunk"),
    ("update.rate=1.5", "less than or equal to 1", "update.rate"),
    ("update.kind=delta", "'delta' is not possible", "delta-gradient"),
    ("decay_to=begin", "'begin' is not possible", "start"),
    ("heads={value: 3}", "not a multiple of heads.value (3)", "set heads.dim_key"),
])
def test_what_makes_no_sense_is_refused_with_a_remedy(override, text, remedy):
    with pytest.raises(DesignError) as caught:
        load("hope", [MEMORY + override])
    assert text in str(caught.value)
    assert remedy in str(caught.value)


@pytest.mark.parametrize("decay_to", ["zero", "start"])
@pytest.mark.parametrize("tokens", ["random", "the same", "of period 7"])
def test_4096_tokens_stay_bounded_and_the_maps_change_themselves(tokens, decay_to):
    mixer = memory(f"decay_to={decay_to}")
    draw = torch.Generator().manual_seed(1)
    x = {"random": torch.randn(1, 4096, 64, generator=draw),
         "the same": torch.randn(1, 1, 64, generator=draw).expand(1, 4096, 64),
         "of period 7": torch.randn(1, 7, 64, generator=draw).repeat(1, 586, 1)[:, :4096]}[tokens]
    with torch.inference_mode():
        out, early = mixer(x), mixer(x[:, :300]).state
    start = mixer.initial(1).running.detach()
    for state in (early, out.state):
        assert torch.isfinite(state.running).all()
        assert state.running.norm() <= 1.05 * start.norm()
    assert error(out.y.std(), mixer(x[:, :100]).y.detach().std()) < 0.5
    d = mixer.dim
    for name, columns in (("k", slice(0, d)), ("v", slice(d, 2 * d)), ("rate", slice(2 * d, 2 * d + 1)),
                          ("decay", slice(2 * d + 1, 2 * d + 2)), ("memory", slice(2 * d + 2, None))):
        assert error(early.running[..., columns], start[..., columns]) > 1e-2, name


def test_a_memory_that_decays_to_its_start_keeps_its_maps_where_the_other_loses_them():
    x = torch.randn(1, 8192, 64, generator=torch.Generator().manual_seed(2))
    kept = {}
    for decay_to in ("zero", "start"):
        mixer = memory(f"decay_to={decay_to}")
        with torch.inference_mode():
            kept[decay_to] = float(mixer(x).state.running.norm() / mixer.initial(1).running.norm())
    assert kept["start"] > 0.3
    assert kept["zero"] < 0.5 * kept["start"]


def test_phases_count_existing_tokens_of_the_document():
    mixer = memory()
    x, valid = torch.randn(3, 21, 64), torch.ones(3, 21, dtype=torch.bool)
    boundary = torch.zeros(3, 21, dtype=torch.int8)
    valid[1, 4:10] = False
    boundary[2, 18] = 2
    with torch.no_grad():
        state = mixer(x, None, Context(valid=valid, boundary=boundary)).state
    assert state.phase.tolist() == [5, 15, 3]
    start = mixer.initial(3).running
    assert error(state.frozen[1:], start[1:]) == 0.0
    assert error(state.frozen[:1], start[:1]) > 1e-3
    assert all(error(state.running[i], start[i]) > 1e-3 for i in range(3))


def test_the_chunk_is_part_of_the_model():
    x = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        one, other = memory()(x).y, memory("update.chunk=8")(x).y
    assert error(one[:, :8], other[:, :8]) < 1e-5
    assert error(one[:, 9:], other[:, 9:]) > 1e-3
    ids = {load("hope", [f"{MEMORY}update.chunk={c}"]).id for c in (8, 16)}
    assert len(ids) == 2


def test_other_choices_keep_the_contract():
    other = [MEMORY + m for m in ("decay_to=start", "residual=false", "local=none", "update={chunk: 5, rate: 0.5}",
                                  "read={norm: layer, per: all, weight: full, bias: true, gate: silu, gate_rank: 4, "
                                  "out: false}", "heads={value: 2}")]
    found = verify(load("hope", other, layers=2), only=(
        "token by token, fp64", "packed", "garbage", "declared", "read-only", "pieces = whole", "different age"))
    assert [(r.name, r.note) for r in found.results if not r.passed] == []
    assert len(found.results) == 10
