"""The id: equal for two spellings of one architecture, different for two architectures, and never changed by us."""

import copy
from pathlib import Path

import pytest
import yaml

from postformer.design import DesignError, load, loading, names

GOLDEN = Path(__file__).parent / "golden-v1.yaml"
GOLDEN_ID = "f13a17bf23b473e36222e8e23c326817967b4f448d3948755dced3a63d65e686"
# A change of one of these is a change of what old recipes mean: bump the version and write a migration.
IDS = {
    "deltanet": "8bc52bd1ae34878ae406dc199aee5d0b8582bb73f9bd0ddc4b056c7dc405bcaf",
    "gated-deltanet": "48129c5baa3144eccc13ea21bf38538c42e1d9d813fdb736dd259eba5b84d506",
    "griffin": "3d9cc193005d024eeb5391742cd28174fc28360fb6d07157cc5208ad983b96f3",
    "hgrn2": "d56e85b130d08145fc3983df6db812b726ad5e1214538a8b5877570d6195fa37",
    "mamba": "eff2f24c9b210a160c97c159121156789f41815314c9983d02ff76de2c157ed1",
    "rwkv7": "5501061382252df8435d22859ab7f60e668fde17b5221910be0f40b6952b3ed1",
    "transformer": "1bcd617c38c0f33f1126fbcbeeddc13cb30072363e9a00d322e88c493e1e1a37",
}

LONG = {"version": 1, "name": "a", "model": {
    "width": 64,
    "mixers": {"memory": {"kind": "matrix", "loss": "l2", "features": ["l2norm"], "local": {"kind": "conv", "size": 4},
                          "retention": {"per": "none"}, "read": {"gate": "silu"}},
               "attention": {"kind": "attention", "heads": {"query": 2}}, "feedforward": {"kind": "swiglu"}},
    "layers": {"m": [{"use": "memory"}, {"use": "feedforward"}], "a": [{"use": "attention"}, {"use": "feedforward"}]},
    "stack": ["m", "a", "m", "a"]}}


def _ident(**changes):
    data = copy.deepcopy(LONG)
    for path, value in changes.items():
        at, keys = data["model"], path.split("__")
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = value
    return load(data).id


@pytest.mark.parametrize("name", IDS)
def test_ids_of_shipped_recipes_stay(name):
    assert load(name).id == IDS[name]


def test_a_recipe_of_version_1_keeps_its_id():
    recipe = load(GOLDEN)
    assert recipe.id == GOLDEN_ID
    assert recipe.version == 1
    assert recipe.cost().params == 457_568
    assert recipe.cost().state_bytes(100) == 125_256


def test_old_versions_are_migrated_step_by_step(monkeypatch):
    def first(raw):
        raw = copy.deepcopy(raw)
        raw["model"]["width"] = raw["model"].pop("channels")
        return raw

    def second(raw):
        return {**raw, "name": raw["name"].lower()}

    monkeypatch.setattr(loading, "VERSION", 3)
    monkeypatch.setattr(loading, "MIGRATIONS", {1: first, 2: second})
    old = {"version": 1, "name": "OLD", "model": {"channels": 64, "mixers": {}}}
    kept = copy.deepcopy(old)
    new = loading.migrate(old)
    assert new == {"version": 3, "name": "old", "model": {"width": 64, "mixers": {}}}
    assert loading.migrate({"version": 2, "name": "OLD", "model": {}})["name"] == "old"
    assert old == kept
    with pytest.raises(DesignError, match="version 4 is not known here; this postformer reads 1 to 3"):
        loading.migrate({**old, "version": 4})


@pytest.mark.parametrize("name", names())
def test_a_resolved_recipe_loads_to_the_same_id(name):
    recipe = load(name)
    assert load(recipe.dump()).id == recipe.id
    assert load(yaml.safe_load(yaml.safe_dump(recipe.dump()))).id == recipe.id
    assert load(recipe).id == recipe.id
    assert load(recipe).model == recipe.model


def test_scaling_a_recipe_object_is_scaling_its_file():
    data = copy.deepcopy(LONG)
    del data["model"]["mixers"]["attention"]["heads"]  # a default does not scale, what is said does
    assert load(load(data), width=128).id == load(data, width=128).id
    assert load(data, width=128).model.mixers["attention"].heads.query == 4


def test_spelling_does_not_count():
    same = load(LONG).id
    named = copy.deepcopy(LONG)
    named["name"], named["summary"], named["paper"] = "b", "other words", "0000.00000"
    assert load(named).id == same
    turned = {"model": dict(reversed(LONG["model"].items())), "name": "a"}
    assert load(turned).id == same
    assert _ident(stack=[{"repeat": 2, "of": ["m", "a"]}]) == same
    assert _ident(stack=[{"tile": ["m", "a"], "layers": 4}]) == same
    assert _ident(layers={}, stack=[{"repeat": 2, "of": ["memory/feedforward", "attention/feedforward"]}]) == same
    assert _ident(mixers__memory__features="l2norm", mixers__memory__local="conv4", mixers__memory__retention="none",
                  mixers__memory__read="gated-norm", norm="rms", vocab=256) == same
    short = {"name": "s", "model": {"width": 64, "memory": LONG["model"]["mixers"]["memory"], "feedforward": {
        "kind": "swiglu"}, "mixers": {"attention": LONG["model"]["mixers"]["attention"]}, "num_layers": 4,
        "pattern": ["memory", "attention"]}}
    assert load(short).id == same


def test_names_of_mixers_layers_and_shared_blocks_do_not_count():
    mixers = LONG["model"]["mixers"]
    renamed = {"p": mixers["memory"], "q": mixers["attention"], "r": mixers["feedforward"]}
    layers = {"z": [{"use": "p"}, {"use": "r"}], "y": [{"use": "q"}, {"use": "r"}]}
    assert _ident(mixers=renamed, layers=layers, stack=["z", "y", "z", "y"]) == load(LONG).id
    inline = {"m": [{"use": mixers["memory"]}, {"use": "feedforward"}], "a": LONG["model"]["layers"]["a"]}
    assert _ident(mixers={k: v for k, v in mixers.items() if k != "memory"}, layers=inline) == load(LONG).id

    def shared(name):
        return load({"name": "s", "model": {
            "width": 64, "mixers": {"a": {"kind": "attention"}}, "shared": {name: {"layer": [{"use": "a"}]}},
            "stack": [name, name]}}).id
    assert shared("block") == shared("other")


def test_equal_mixers_of_two_names_are_one_mixer_used_twice():
    def design(stack):
        memory = {"kind": "matrix", "parameterisation": "hgrn2", "heads": {"value": 2}}
        used = {name: memory for name in dict.fromkeys(stack)}
        return load({"name": "t", "model": {"width": 32, "mixers": used, "stack": stack}})
    assert design(["a", "b"]).id == design(["a", "a"]).id
    assert design(["a", "b"]).cost() == design(["a", "a"]).cost()


CHANGES = {
    "width": 72, "vocab": 257, "norm": "layer", "stack": ["m", "a", "a", "m"], "stack_norm": "none",
    "embedding": {"tie": False}, "head": {"softcap": 30}, "mixers__memory__loss": "dot",
    "mixers__memory__update": {"rate": "double-sigmoid"}, "mixers__memory__local": "conv3",
    "mixers__memory__retention": {"per": "head", "gate": "gla"}, "mixers__memory__forget_at": "stream",
    "mixers__memory__heads": {"value": 2}, "mixers__memory__features": ["silu", "l2norm"],
    "mixers__attention__window": 16, "mixers__attention__position": "none", "mixers__feedforward__kind": "geglu",
    "layers__a": [{"use": "attention", "scale": 0.5}, {"use": "feedforward"}],
    "layers__m": [{"use": "memory", "post_norm": "rms"}, {"use": "feedforward"}],
}


def test_every_change_of_the_architecture_changes_the_id():
    ids = {change: _ident(**{change: value}) for change, value in CHANGES.items()}
    assert len({load(LONG).id, *ids.values()}) == len(ids) + 1


def test_ids_of_all_recipes_differ():
    assert len({load(name).id for name in names()}) == len(names())
