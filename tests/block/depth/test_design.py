"""Depth in the grammar: ids, what is refused, what it costs, how it is shown, trained and generated with."""

import pytest
import torch
import torch.nn.functional as F

from postformer.block.depth import as_declared
from postformer.contract.state import size
from postformer.design import DesignError, load
from postformer.model import build
from postformer.sampling import Policy, generate
from postformer.verify import verify

ATTENTION = {"kind": "attention", "heads": {"query": 2, "dim": 8}}
CONV = {"kind": "vector", "parameterisation": "rglru", "local": "conv4"}
FILTER = {"kind": "filter", "heads": {"value": 2}}


def recipe(layer, shared=None, **mixers):
    mixers = {"a": ATTENTION, "ff": {"kind": "swiglu"}, **mixers}
    used = {s["use"] for s in [*layer, *(shared or [])]}
    model = {"width": 16, "vocab": 40, "mixers": {k: v for k, v in mixers.items() if k in used}, "layers": {"l": layer},
             "stack": ["l"]}
    if shared:
        model["shared"] = {"block": {"layer": shared}}
    return {"name": "d", "model": model}


def test_fixed_is_what_there_was():
    without, fixed = recipe([{"use": "a"}, {"use": "ff"}]), recipe([{"use": "a", "depth": "fixed"}, {"use": "ff"}])
    assert load(without).id == load(fixed).id
    assert "depth" not in str(load(without).model.canonical())
    ids = {load(recipe([{"use": "a", "depth": d}])).id for d in (
        "fixed", "mod", {"kind": "mod", "capacity": 0.25}, "loop", {"kind": "loop", "most": 3}, "ode")}
    assert len(ids) == 6
    assert load(recipe([{"use": "a", "depth": "mod"}])).id == load(recipe([{"use": "a", "depth": {"kind": "mod"}}])).id
    model = build(load(fixed).model)
    assert not any("depth" in name for name in model.state_dict())


@pytest.mark.parametrize(("layer", "text"), [
    ([{"use": "a", "depth": "mdo"}], "layers.l.0.depth.*unknown kind 'mdo' of depth. Did you mean 'mod'"),
    ([{"use": "a", "depth": {"kind": "mod", "capasity": 1}}], "unknown field 'capasity'.*Did you mean 'capacity'"),
    ([{"use": "a", "depth": {"kind": "mod", "choose": "top", "rate": 1}}], "leave rate out, or set choose: threshold"),
    ([{"use": "a", "depth": {"kind": "mod", "capacity": 0}}], "depth.capacity"),
    ([{"use": "a", "depth": {"kind": "loop", "prior_weight": 1}}], "give prior a rate in"),
    ([{"use": "a", "depth": {"kind": "mod", "score": "doubt"}}], "depth.score: score 'doubt' is read before any"),
    ([{"use": "a", "depth": {"kind": "mod", "score": "embedding"}}], "depth.score: score 'embedding'"),
    ([{"use": "c", "depth": {"kind": "mod", "skip": "clock"}}], "set local: none in it, or skip: freeze"),
    ([{"use": "c", "depth": "loop"}], "set local: none in it, or use depth: ode"),
    ([{"use": "c", "depth": {"kind": "ode", "state": "first"}}], "set local: none in it"),
    ([{"use": "f", "publish": {"doubt": "variance"}, "depth": "mod"}], "'variance' has no value at a token"),
    ([{"use": "f", "publish": {"doubt": "variance"}, "depth": "loop"}], "publish it from a sublayer of fixed depth"),
    ([{"use": "a", "input": ["embedding"], "depth": "loop"}], "have x among the `input`"),
    ([{"use": "a", "residual": "next"}, {"use": "ff", "depth": "mod"}], "give that one residual: add"),
    ([{"use": "a", "publish": {"n": "dept"}, "depth": "loop"}], "'dept' is nothing.*Did you mean 'depth'"),
    ([{"use": "a", "publish": {"n": "depth"}}], "'depth' is nothing that this sublayer's mixer publishes"),
])
def test_what_cannot_be_is_refused_with_a_remedy(layer, text):
    with pytest.raises(DesignError, match=text):
        load(recipe(layer, c=CONV, f=FILTER))


def test_a_shared_block_is_refused_for_what_stands_in_it():
    looped = [{"use": "block", "residual": "none", "depth": "loop"}]
    load(recipe(looped, [{"use": "a"}, {"use": "ff"}]))
    with pytest.raises(DesignError, match=r"model\.layers\.l\.0\.depth: a token that has halted"):
        load(recipe(looped, [{"use": "a"}, {"use": "c"}], c=CONV))


def test_convolutions_may_freeze_and_may_take_steps():
    for depth in ("mod", {"kind": "mod", "skip": "write"}, "ode", {"kind": "loop", "most": 1}):
        load(recipe([{"use": "c", "depth": depth}], c=CONV))


def test_costs():
    def cost(depth, use="a"):
        return load(recipe([{"use": use, "depth": depth}], f=FILTER)).cost()

    whole, gate = cost("fixed"), 2 * 16
    head = 2 * 16 * 40
    half = cost({"kind": "mod", "capacity": 0.5})
    assert half.params == whole.params + 16
    assert half.flops_per_token == (whole.flops_per_token - head) / 2 + head + gate
    (key,), (half_key,) = whole.flops_per_key, half.flops_per_key
    assert half_key[0] == key[0] / 4
    kept = whole.state_bytes(101) - whole.state_bytes(100)
    assert half.state_bytes(101) == whole.state_bytes(0) + 16 + 50 * kept
    clock, write = cost({"kind": "mod", "skip": "clock"}), cost({"kind": "mod", "skip": "write"})
    assert clock.flops_per_token == write.flops_per_token == whole.flops_per_token + gate
    assert clock.state_bytes(100) == whole.state_bytes(50)
    assert write.state_bytes(100) == whole.state_bytes(100)
    looped, once = cost({"kind": "loop", "most": 3}), cost({"kind": "loop", "most": 3, "state": "first"})
    assert looped.params == once.params == whole.params + 17
    assert cost({"kind": "loop", "most": 1, "least": 0}).params == whole.params + 17
    assert looped.flops_per_token == 3 * (whole.flops_per_token - head) + head + 2 * gate
    assert looped.state_bytes(10) == 3 * (whole.state_bytes(10) - 8) + 8 + 24
    assert once.state_bytes(10) == whole.state_bytes(10) + 8
    assert cost({"kind": "mod", "choose": "top"}, "ff").params == cost("fixed", "ff").params + 16 + 17


def test_as_declared_spreads_the_capacity_and_ends():
    model = build(load(recipe([{"use": "a", "depth": {"kind": "mod", "capacity": 0.3}}])).model)
    sub, tokens = model.stack.layers[0].sublayers[0], torch.zeros(1, 40, dtype=torch.long)
    with torch.no_grad(), as_declared(model):
        out = model(tokens)
    assert out.measured["0.0.steps"] == 12
    assert not sub.depth.declared
    assert size(out.state.stack) == load(recipe([{"use": "a", "depth": {"kind": "mod", "capacity": 0.3}}])).cost(
        ).state_bytes(40) - 8


RECIPES = {
    "mod around a window": recipe([{"use": "w", "depth": "mod"}, {"use": "ff", "depth": "mod"}],
                                  w={**ATTENTION, "window": 6}),
    "mod around a convolution": recipe([{"use": "c", "depth": {"kind": "mod", "capacity": 0.3}},
                                        {"use": "ff"}], c=CONV),
    "clock": recipe([{"use": "a", "depth": {"kind": "mod", "skip": "clock"}}, {"use": "ff"}]),
    "top": recipe([{"use": "a", "depth": {"kind": "mod", "choose": "top"}}, {"use": "ff"}]),
    "a variance as the score": recipe([
        {"use": "f", "publish": {"doubt": "variance"}},
        {"use": "ff", "depth": {"kind": "mod", "score": "doubt"}}], f=FILTER),
    "loop, a state for each depth": recipe([{"use": "a", "depth": {"kind": "loop", "most": 3}},
                                            {"use": "ff", "depth": "loop"}]),
    "loop over a shared block": recipe(
        [{"use": "block", "norm": "none", "residual": "none", "depth": {"kind": "loop", "most": 3, "state": "first"},
          "publish": {"spent": "depth"}}], [{"use": "a"}, {"use": "ff", "depth": "mod"}]),
    "loop, or not at all": recipe(
        [{"use": "a", "depth": {"kind": "loop", "least": 0, "most": 2, "state": "first"}},
         {"use": "ff", "depth": {"kind": "loop", "least": 0, "most": 1, "prior": 0.3}}]),
    "expected": recipe([{"use": "a", "depth": {"kind": "loop", "most": 2, "halt": "expected", "prior": 0.3}},
                        {"use": "ff"}]),
    "ode": recipe([{"use": "c", "depth": {"kind": "ode", "most": 3}}, {"use": "ff", "depth": "ode"}], c=CONV),
}


@pytest.mark.parametrize("name", list(RECIPES))
def test_trains_measures_and_generates(name):
    torch.manual_seed(0)
    model = build(load(RECIPES[name]).model)
    tokens = torch.randint(0, 30, (4, 1)) + torch.arange(32) % 7
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    lost = []
    for _ in range(12):
        out = model(tokens)
        loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimiser.zero_grad(set_to_none=True)
        (loss + sum(out.losses.values())).backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        optimiser.step()
        model.after_step(out.measured)
        lost.append(loss.item())
    assert lost[-1] < 0.8 * lost[0]
    # Depths are measured where they stand, and thresholds have moved.
    places = [name.removesuffix(".steps") for name in out.measured if name.endswith(".steps")]
    assert places
    for place in places:
        assert 0 <= out.measured[f"{place}.steps"] <= 4 * out.measured[f"{place}.tokens"]
    moved = [value for key, value in model.state_dict().items() if key.endswith("threshold")]
    assert all(value.abs() > 0 for value in moved)

    model.eval()
    made = generate(model, tokens[:, :20], Policy(temperature=0), 6).tokens
    with torch.no_grad():
        expected = tokens[:, :20]
        for _ in range(6):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RECIPES))
def test_keeps_the_contract(name):
    found = verify(RECIPES[name])
    assert [(r.name, r.value, r.tolerance, r.note) for r in found.results if r.passed is False] == []
    left_out = {r.note for r in found.results if r.passed is None}
    assert left_out <= {"local mixing stands before a memory: read-only tokens would enter its taps",
                        "the design declares gradients that are no derivatives",
                        "the design declares that training chooses with the whole sequence in view"}
    assert ("the design declares that training chooses with the whole sequence in view" in left_out) == (name == "top")


@pytest.mark.parametrize("depth", ["mod", {"kind": "loop", "most": 2}])
def test_what_the_mixer_measures_comes_back_to_it(depth):
    """Experts inside count the tokens that reach them, and their biases move."""
    model = build(load(recipe([{"use": "e", "depth": depth}], e={"kind": "moe", "experts": 4})).model)
    out = model(torch.arange(30).view(2, 15))
    ran = out.measured["0.0.steps"] if depth == "mod" else 2 * out.measured["0.0.tokens"]
    assert out.measured["0.0.of.load"].sum() == 2 * ran
    experts = model.stack.layers[0].sublayers[0].mixer
    model.after_step(out.measured)
    load_of = out.measured["0.0.of.load"].double()
    assert torch.equal(torch.sign(experts.bias), torch.sign(load_of.mean() - load_of).float())
