"""The language model: positions, roles, seeds, checkpointing, copies, saved weights."""

import copy
import re
from pathlib import Path

import pytest
import torch

from postformer import model as model_package
from postformer.contract.context import Context, positions
from postformer.design import kinds, load
from postformer.model import LMState, build

NAMES = ["gated-deltanet", "hgrn2", "griffin", "rwkv7", "mamba", "transformer"]
SHARED = {"version": 1, "name": "shared", "model": {
    "width": 16, "mixers": {"a": {"kind": "attention", "heads": {"query": 2}},
                            "m": {"kind": "matrix", "parameterisation": "hgrn2", "heads": {"value": 2}}},
    "shared": {"block": {"copies": 2, "layer": [{"use": "a", "input": ["x", "embedding"], "residual": "none"}]}},
    "stack": ["block", "m", "block", "m", "block"]}}


def tokens(batch, length, seed=0, vocab=256):
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def counted(start, valid, reset):
    """Positions by walking over the tokens."""
    rows, after = [], []
    for row, now in enumerate(start.tolist()):
        places = []
        for t in range(valid.shape[1]):
            now = 0 if reset[row, t] else now
            places.append(now)
            now += int(valid[row, t])
        rows.append(places)
        after.append(now)
    return rows, after


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("level", [1, 2, 3])
def test_positions_count_what_exists_in_each_document(seed, level):
    g = torch.Generator().manual_seed(seed)
    start, valid = torch.tensor([0, 5, 17]), torch.rand(3, 19, generator=g) > 0.3
    boundary = level * (torch.rand(3, 19, generator=g) > 0.85).to(torch.int8)
    reset = boundary >= 2
    every, never = torch.ones_like(valid), torch.zeros_like(reset)
    for ctx, v, r in ((Context(), every, never), (Context(valid=valid), valid, never),
                      (Context(boundary=boundary), every, reset),
                      (Context(valid=valid, boundary=boundary), valid, reset)):
        position, after = positions(start, 19, ctx)
        rows, ends = counted(start, v, r)
        assert position.tolist() == rows
        assert after.tolist() == ends


def test_state_counts_positions_and_given_positions_win():
    model = build(load("linear-attention", width=32, layers=2).model)
    out = model(tokens(2, 7), None, Context(valid=torch.tensor([[True] * 7, [True] * 3 + [False] * 4])))
    assert out.state.next.tolist() == [7, 3]
    x = torch.zeros(2, 3, 32)
    _, state = model.run(x, out.state, Context(position=torch.tensor([[40, 41, 42], [9, 10, 11]])))
    assert state.next.tolist() == [43, 12]


@pytest.mark.parametrize("name", ["transformer", "retnet", "gated-deltanet"])
def test_select_gives_the_same_logits_and_the_head_is_capped(small, name):
    model = small(name)
    ids = tokens(2, 9)
    full = model(ids).logits
    chosen = torch.rand(2, 9, generator=torch.Generator().manual_seed(1)) > 0.5
    assert (model(ids, select=chosen).logits - full[chosen]).abs().max() < 1e-12
    assert full.shape == (2, 9, 256)
    griffin = small("griffin")
    assert griffin(ids).logits.abs().max() < 30
    assert torch.isfinite(griffin(ids).logits).all()


def test_embedding_scale_and_tied_head():
    recipe = load("griffin", width=64, layers=2)
    model = build(recipe.model)
    assert model.scale == 8.0
    assert model.head is None
    ids = tokens(1, 4)
    assert torch.equal(model.embed(ids), model.embedding(ids) * 8)
    untied = build(load("mlstm", width=64, layers=2).model)
    assert untied.head.weight.shape == (256, 64)
    assert untied.scale == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_a_role(small, name):
    model = small(name)
    roles = model.roles()
    assert list(roles) == [n for n, _ in model.named_parameters()]
    params = dict(model.named_parameters())
    assert roles["embedding.weight"].kind == "embedding"
    for path, role in roles.items():
        if role.kind == "matrix":
            assert role.decay
            assert params[path].ndim == 2
        if role.kind in ("norm", "bias", "embedding"):
            assert not role.decay
        if path.endswith(("A_log", "dt_bias", "norm.weight")) or "lower_bounds" in path:
            assert not role.decay, path
    assert sum(r.kind == "matrix" for r in roles.values()) >= 4


def test_seeds_give_the_same_weights_and_leave_the_generator_alone():
    design = load("rwkv7", width=32, layers=2).model
    torch.manual_seed(9)
    before = torch.get_rng_state()
    one, two, other = build(design, 3), build(design, 3), build(design, 4)
    assert torch.equal(torch.get_rng_state(), before)
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(one.embedding.weight, other.embedding.weight)


@pytest.mark.parametrize("name", [*NAMES, "shared"])
def test_gradient_checkpointing_gives_equal_gradients(small, name):
    model = small(name) if name != "shared" else build(load(SHARED).model).double()
    ids = tokens(2, 11)

    def gradients():
        out = model(ids)
        loss = out.logits.square().mean()
        return loss, torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)

    loss, plain = gradients()
    model.gradient_checkpointing = True
    assert model.gradient_checkpointing
    again, checked = gradients()
    assert torch.equal(loss, again)
    for a, b in zip(plain, checked, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).abs().max() <= 1e-12 * a.abs().max().clamp_min(1e-9)


@pytest.mark.parametrize("name", ["hgrn2", "shared"])
def test_a_copy_is_equal_and_independent(name):
    model = build(load(SHARED).model if name == "shared" else load(name, width=32, layers=2).model)
    other, ids = copy.deepcopy(model), tokens(1, 6)
    assert torch.equal(model(ids).logits, other(ids).logits)
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in other.parameters()}
    truth = model(ids).logits
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(model(ids).logits, truth)
    assert (other(ids).logits - truth).abs().max() > 1e-3
    # every parameter of the copy is the one its forward uses
    loss = other(ids).logits.square().mean()
    grads = torch.autograd.grad(loss, [*other.parameters()], allow_unused=True)
    assert all(g is not None for g in grads)


@pytest.mark.parametrize("name", [*NAMES, "shared"])
def test_saved_weights_hold_no_tensor_twice(name):
    model = build(load(SHARED).model if name == "shared" else load(name, width=32, layers=3).model)
    saved = model.state_dict()
    assert len({t.data_ptr() for t in saved.values() if t.numel()}) == len(saved)
    assert list(saved) == [n for n, _ in model.named_parameters()]
    other = build(model.design, seed=5)
    other.load_state_dict(saved)
    assert torch.equal(other(tokens(1, 5)).logits, model(tokens(1, 5)).logits)


def test_initial_state_is_none_given():
    model = build(load("griffin", width=32, layers=2).model)
    ids = tokens(2, 5)
    state = model.initial(2)
    assert isinstance(state, LMState)
    assert torch.equal(model(ids, state).logits, model(ids).logits)
    assert state.next.tolist() == [0, 0]


def test_the_model_holds_no_kinds_name():
    words = set(kinds()) | {"qkv", "mamba2", "rwkv7", "hgrn2", "mlstm", "mamba1", "rglru", "hgrn", "mingru", "s4d"}
    files = sorted(Path(model_package.__file__).parent.glob("*.py"))
    assert len(files) >= 4
    for file in files:
        literals = re.findall(r"""(["'])((?:(?!\1).)*)\1""", file.read_text(encoding="utf-8"))
        # a role of parameters may be called matrix: it is what the matrix of a linear map is called
        named = {text for _, text in literals} & words
        assert named <= {"matrix"}, (file.name, named)
