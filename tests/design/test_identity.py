"""The id: equal for two spellings of one architecture, different for two architectures, and never changed by us."""

import copy
from pathlib import Path

import pytest
import yaml

from postformer.design import DesignError, load, loading, names

GOLDEN = Path(__file__).parent / "golden-v1.yaml"
GOLDEN_ID = "25896167dc05e21e3aa342435c9a058517de79b20b9619f56882743cfd906659"
# A change of one of these is a change of what old recipes mean: bump the version and write a migration.
IDS = {
    "deltanet": "d886baa0ba045c3fae3eaca6475bef09ab68f6b00a26b58cd06f780c5e0c2870",
    "gated-deltanet": "3a03bc96e1e553aaa7a4d81e0568d9206b9c7f45a78cfe401479346fc6592b78",
    "griffin": "fccba7725c4712b7a7a5744deafa096828eab62902aef4139119c925de07e988",
    "hgrn2": "4549c97e22e75282f187696d0b60897a4a7f111baa44a6481b1aedfc3e811250",
    "mamba": "af5140e5c804476ccda893db5b2410413a25a081485bb5a7a9ba5da842e6fbba",
    "rwkv7": "eb9def2dace87f8b21f3259f2facc36325cf7ae69cf99154d866eab7a0b63959",
    "transformer": "32628364d392eb37ff7aa8d187f691e3c39567848926932adffa271aba65da68",
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
    assert recipe.cost().state_bytes(100) == 125_272


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


def test_a_field_that_a_later_grammar_adds_changes_no_id(monkeypatch):
    from typing import Literal

    from postformer.contract.mixer import Mixer
    from postformer.design import Design, register, registry

    class BeforeDesign(Design):
        kind: Literal["grown"] = "grown"
        rate: float = 0.5

    class AfterDesign(BeforeDesign):
        added: int = 0

    ids = []
    grown = [(AfterDesign, given) for given in ({}, {"added": 0}, {"added": 1})]
    for design, given in [(BeforeDesign, {}), *grown]:
        mixer = register(design)(type("Grown", (Mixer,), {}))
        monkeypatch.setitem(registry._classes, "grown", mixer)
        data = {"name": "x", "model": {"width": 32, "memory": {"kind": "grown", **given}, "num_layers": 1}}
        try:
            ids.append(load(data).id)
        finally:
            registry._classes.pop("grown")
    assert ids[0] == ids[1] == ids[2] != ids[3]
