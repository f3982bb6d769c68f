"""model.linear: which map stands for each role."""

import pytest

from postformer.design import DesignError, load
from postformer.design.linear import Linears, Lora, Ternary
from postformer.design.schema import recipe_schema
from postformer.model import build

ALL = "model.linear={projection: %s, gate: %s, expert: %s}"


def test_dense_is_the_default_and_part_of_no_id():
    plain = load("transformer")
    assert load("transformer", [ALL % (("dense",) * 3)]).id == plain.id
    assert "linear" not in plain.model.canonical()
    ids = {load("transformer", [f"model.linear.projection={text}"]).id for text in (
        "dense", "ternary", "{kind: ternary}", "{kind: ternary, activations: 8}", "{kind: ternary, activations: 4}",
        "{kind: ternary, norm: none}", "lora", "{kind: lora, rank: 4}", "{kind: lora, train_base: true}")}
    assert len(ids) == 7
    assert load("transformer", ["model.linear.gate=ternary"]).id not in ids


def test_short_and_long_forms_are_one_design():
    short, long = (load("transformer", [f"model.linear.projection={t}"]) for t in ("ternary", "{kind: ternary}"))
    assert short.id == long.id
    assert load(short.dump()).id == short.id
    assert load(short).model == short.model


@pytest.mark.parametrize("name", ["transformer", "gated-deltanet", "griffin", "rwkv7", "mamba", "mlstm"])
@pytest.mark.parametrize("kind", ["ternary", "{kind: lora, rank: 3}"])
def test_costs_are_those_of_the_built_model(name, kind):
    recipe = load(name, [ALL % (kind, kind, kind)], width=64, layers=3)
    assert sum(p.numel() for p in build(recipe.model).parameters()) == recipe.cost().params
    dense = load(name, width=64, layers=3).cost()
    assert (recipe.cost().params == dense.params) == (kind == "ternary")
    assert recipe.cost().state_bytes(100) == dense.state_bytes(100)


def test_low_rank_adds_its_two_maps():
    dense, lora = Ternary().cost(20, 30, True), Lora(rank=4).cost(20, 30, True)
    assert dense.params == 20 * 30 + 30
    assert lora.params == dense.params + 4 * (20 + 30)
    assert lora.flops_per_token == dense.flops_per_token + 2 * 4 * (20 + 30)
    assert Lora(rank=40).cost(20, 30, False).params == 20 * 30 + 20 * (20 + 30)


def test_a_rank_scales_with_the_width():
    def rank(recipe):
        return recipe.model.linear.projection.rank

    wide = load("transformer", ["model.linear.projection={kind: lora, rank: 16}"])
    assert [rank(load(wide, width=width)) for width in (256, 64, 8)] == [16, 4, 1]
    assert rank(load("transformer", ["model.linear.projection=lora"], width=64)) == 8


@pytest.mark.parametrize(("text", "path", "says"), [
    ("projection=ternry", "model.linear.projection", ["'ternry'", "Did you mean 'ternary'?", "dense, lora"]),
    ("projection={kind: [1]}", "model.linear.projection", ["unknown kind", "Allowed: dense"]),
    ("projection={rank: 4}", "model.linear.projection", ["a mapping with a 'kind', e.g. {kind: lora"]),
    ("projection={kind: lora, rnak: 4}", "model.linear.projection.rnak", ["'rnak'", "'rank'?", "train_base"]),
    ("projection={kind: lora, rank: 300}", "model", ["rank is 300", "width of 256", "Give a smaller rank"]),
    ("gate={kind: lora, rank: 0}", "model.linear.gate.rank", ["(got 0)"]),
    ("gate={kind: ternary, rank: 4}", "model.linear.gate.rank", ["'rank'", "Allowed: activations, eps, kind, norm"]),
    ("gate={kind: ternary, activations: 9}", "model.linear.gate.activations", ["9 is not possible", "Allowed: 2"]),
    ("gate={kind: ternary, norm: layer}", "model.linear.gate.norm", ["'layer'", "Allowed: none, rms"]),
    ("gates=ternary", "model.linear.gates", ["'gates'", "Did you mean 'gate'?"]),
])
def test_what_cannot_be_is_refused_with_a_remedy(text, path, says):
    with pytest.raises(DesignError) as caught:
        load("transformer", [f"model.linear.{text}"])
    assert caught.value.path == path
    for word in says:
        assert word in str(caught.value)


@pytest.mark.parametrize("value", ["ternary", "{kind: ternary}"])
def test_one_kind_for_all_roles_is_asked_which(value):
    with pytest.raises(DesignError, match="say which maps are meant, by role"):
        load("transformer", [f"model.linear={value}"])


def test_a_role_that_does_not_exist():
    with pytest.raises(ValueError, match="no linear map has the role 'gates'"):
        load("transformer").model.linear.of("gates")


def test_editors_know_the_short_forms():
    role = recipe_schema(["attention"])["$defs"]["Linears"]["properties"]["projection"]
    assert {"enum": ["dense", "lora", "ternary"]} in role["anyOf"]


def test_maps_that_are_not_dense_are_told_in_words():
    assert Linears().in_words == ""
    made = Linears.model_validate({"projection": "ternary", "gate": {"kind": "lora", "rank": 4}})
    assert made.in_words == "projection ternary; gate lora (rank 4)"
