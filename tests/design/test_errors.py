"""Every wrong recipe gets one line: file, line, path, value, what is allowed, the nearest spelling."""

import copy

import pytest
import yaml

from postformer.design import DesignError, load, names

# what is replaced, by what, line of the complaint, its path, texts it must hold
CASES = [
    # unknown fields, at every depth
    ("  width: 64", "  widht: 64", 4, "model.widht", ["'widht'", "64", "Did you mean 'width'?", "vocab"]),
    ("name: wrong", "name: wrong\nnotes: 1", 3, "notes", ["'notes'", "(value 1)", "Allowed:", "paper"]),
    ("      loss: l2", "      los: l2", 8, "model.mixers.memory.los", ["(value 'l2')", "'loss'?", "value_residual"]),
    ("        dim_key: 16", "        dim_keys: 16", 14, "model.mixers.memory.heads.dim_keys", ["'dim_key'?", "16"]),
    ("        residual: add", "        residuals: add", 23, "model.layers.l.0.residuals", ["'residual'?", "'add'"]),
    ("rate: sigmoid", "rates: sigmoid", 11, "model.mixers.memory.update.rates", ["'rate'?", "steps"]),
    # wrong kinds and words
    ("kind: swiglu", "kind: swigul", 18, "model.mixers.feedforward", ["'swigul'", "'swiglu'?", "attention"]),
    ("      loss: l2", "      loss: l3", 8, "model.mixers.memory.loss", ["'l3'", "'l2'?", "Allowed: dot, l2."]),
    ("rate: sigmoid", "rate: double", 11, "model.mixers.memory.update.rate", ["'double'", "'double-sigmoid'?"]),
    ("        residual: add", "        residual: ad", 23, "model.layers.l.0.residual", ["'ad'", "'add'?", "next"]),
    ("parameterisation: hgrn", "parameterisation: hgrm", 17, "model.mixers.lru", ["'hgrm'", "'hgrn'?", "mamba1"]),
    ("      kind: matrix", "      kind: matrix\n      parameterisation: rwkv8", 6, "model.mixers.memory",
     ["'rwkv8'", "'rwkv7'?", "mlstm"]),
    # combinations that make no sense
    ("      features: l2norm", "      features: none", 6, "model.mixers.memory", ["loss l2", "set features: l2norm"]),
    ("      features: l2norm", "      features: l2norm\n      normaliser: sum", 6, "model.mixers.memory",
     ["loss l2", "set normaliser: none"]),
    ("loss: l2", "loss: dot\n      normaliser: sum", 6, "model.mixers.memory", ["set features: elu1"]),
    ("loss: l2\n      features: l2norm\n      retention: {per: head, gate: mamba}\n      update: {kind: gradient, "
     "rate: sigmoid}", "loss: dot\n      update: {rate: double-sigmoid}", 6, "model.mixers.memory",
     ["rate up to 2", "use sigmoid or one"]),
    ("per: head, gate: mamba", "per: channel, gate: fixed", 10, "model.mixers.memory.retention", ["set per: head"]),
    ("per: head, gate: mamba", "per: none, gate: mamba", 10, "model.mixers.memory.retention", ["'mamba'", "set per:"]),
    ("per: head, gate: mamba", "per: head", 10, "model.mixers.memory.retention", ["gate: mamba, gla, sigmoid"]),
    ("per: head, gate: mamba", "per: head, gate: mamba, rank: 4", 10, "model.mixers.memory.retention", ["rank"]),
    ("query: 4, key_value: 2", "query: 4, key_value: 3", 16, "model.mixers.attention", ["multiple", "key_value (3)"]),
    ("query: 4, key_value: 2", "query: 3", 16, "model.mixers.attention", ["width 64", "query (3)", "set heads.dim"]),
    ("        value: 4", "        value: 4\n        key: 3", 6, "model.mixers.memory", ["is 4", "heads.key (3)"]),
    ("kind: matrix", "kind: matrix\n      loss: dot", 9, "", ["'loss' is given twice"]),
    ("rate: sigmoid}\n      heads:\n        value: 4\n        dim_key: 16", "rate: sigmoid}\n      position: rope\n"
     "      heads:\n        value: 4\n        dim_key: 15", 6, "model.mixers.memory", ["15", "even"]),
    ("parameterisation: hgrn", "parameterisation: hgrn, local: conv4", 17, "model.mixers.lru", ["leave it out"]),
    ("parameterisation: hgrn", "parameterisation: s5, dim_state: 3", 17, "model.mixers.lru", ["must be even"]),
    ("kind: swiglu", "kind: swiglu, activation: relu", 18, "model.mixers.feedforward", ["use kind: mlp"]),
    ("kind: swiglu", "kind: swiglu, gated: true", 18, "model.mixers.feedforward", ["is gated", "leave it out"]),
    ("kind: swiglu", "kind: swiglu, expand: 2, dim_hidden: 8", 18, "model.mixers.feedforward", ["not both"]),
    ("kind: matrix", "kind: matrix\n      value_residual: a", 6, "model.mixers.memory", ["parameterisation: rwkv7"]),
    # numbers
    ("width: 64", "width: 0", 4, "model.width", ["greater than 0", "(got 0)"]),
    ("width: 64", "width: wide", 4, "model.width", ["integer", "(got 'wide')"]),
    ("query: 4, key_value: 2", "query: 4, dim: 0", 16, "model.mixers.attention.heads.dim", ["(got 0)"]),
    ("repeat: 2", "repeat: -1", 27, "model.stack.1.repeat", ["-1", "whole number >= 1"]),
    ("{repeat: 2, of: [l, attention/feedforward]}", "{tile: [l, attention/feedforward], layers: 0}", 27,
     "model.stack.1.layers", ["0", "whole number >= 1"]),
    # names
    ("    - m\n", "    - n\n", 26, "model.stack.0", ["'n' is no layer", "Allowed: attention"]),
    ("of: [l, attention/f", "of: [l, atention/f", 27, "model.stack.1.of.1", ["'atention'", "'attention'?"]),
    ("use: lru", "use: lrv", 22, "model.layers.l.0.use", ["'lrv'", "'lru'?"]),
    ("repeat: 2, of: [l,", "repeat: 2, of: [m,", 17, "model.mixers.lru", ["stands in no layer", "remove it"]),
    ("        residual: add", "        input: [x, embeding]", 23, "model.layers.l.0.input.1",
     ["'embeding'", "'embedding'?"]),
    ("        residual: add", "        publish: {a: value}", 23, "model.layers.l.0.publish.a", ["'value'", "nothing"]),
    ("      - use: feedforward", "      - {use: feedforward, residual: next}", 24, "model.layers.l.1.residual",
     ["needs a sublayer after it"]),
    ("use: lru\n        residual: add\n      - use: feedforward", "use: {kind: vectr}", 22, "model.layers.l.0.use",
     ["'vectr'", "'vector'?"]),
    # shapes of the file
    ("    - m\n", "    - {repeet: 2}\n", 26, "model.stack.0", ["repeet", "{repeat: n, of: [...]}"]),
    ("version: 1", "version: 7", 1, "version", ["7", "reads 1 to 1", "Upgrade"]),
    ("version: 1", "version: one", 1, "version", ["'one'"]),
    ("name: wrong", "name: [wrong", 3, "", ["not valid YAML"]),
]


@pytest.mark.parametrize(("old", "new", "line", "path", "texts"), CASES, ids=[f"{c[3]}-{i}" for i, c in
                                                                        enumerate(CASES)])
def test_wrong_recipe(recipe_file, old, new, line, path, texts):
    load(recipe_file())
    file = recipe_file(old, new)
    with pytest.raises(DesignError) as caught:
        load(file)
    message = str(caught.value)
    assert message.startswith(f"{file}:{line}: {path}: " if path else f"{file}:{line}: "), message
    assert "\n" not in message
    for text in texts:
        assert text in message, message


@pytest.mark.parametrize(("model", "text"), [
    ({"mixers": {}, "stack": []}, "the stack is empty"),
    ({"mixers": {"a": {"kind": "attention"}}, "stack": [{"repeat": 2, "of": []}]}, "nothing to repeat"),
    ({"mixers": {"a": {"kind": "attention"}}, "layers": {"l": []}, "stack": ["l", "a"]}, "layer without sublayers"),
    ({"mixers": {"a": {"heads": 2}}, "stack": ["a"]}, "a mixer is a mapping with a 'kind'"),
    ({"mixers": ["a"], "stack": ["a"]}, "'mixers' is a mapping of names"),
    ({"mixers": {"a": {"kind": "attention"}}, "stack": "a"}, "the stack is a list of layers"),
    ({"mixers": {"a": {"kind": "attention"}}, "pattern": "a"}, "the pattern is a list of layers"),
])
def test_wrong_shapes(model, text):
    with pytest.raises(DesignError, match=text):
        load({"version": 1, "name": "z", "model": {"width": 32, **model}})


def test_missing_files_and_names():
    with pytest.raises(DesignError, match=r"^no/such.yaml: cannot read the recipe: No such file.*postformer list"):
        load("no/such.yaml")
    with pytest.raises(DesignError, match=r"file 'transfomer'. Did you mean 'transformer'\? Allowed: .*, deltanet, "):
        load("transfomer")
    with pytest.raises(DesignError, match="a recipe is a mapping with at least 'name' and 'model'"):
        load({"name": "z"})
    with pytest.raises(DesignError, match=r"^name: this field is needed"):
        load({"model": {"width": 32, "mixers": {"a": {"kind": "attention"}}, "stack": ["a"]}})


def test_an_error_in_the_short_form_finds_its_line(tmp_path):
    path = tmp_path / "short.yaml"
    path.write_text("name: s\nmodel:\n  width: 32\n  memory:\n    kind: matrix\n    loss: l3\n", encoding="utf-8")
    with pytest.raises(DesignError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}:6: model.mixers.memory.loss: 'l3' is not possible")


JUNK = [None, 3, -1, "x", [], {}, [1], {"a": 1}, True, [[]], {"kind": 3}, {"kind": "chain"}, [{"use": 3}],
        {"repeat": 2}]
LONG = {"version": 1, "name": "z", "model": {
    "width": 32, "embedding": {"tie": True},
    "mixers": {"a": {"kind": "attention", "heads": {"query": 2}},
               "c": {"kind": "parallel", "merge": "gate", "of": [{"kind": "attention"}, {"kind": "chain", "of": [
                   {"kind": "swiglu"}]}]}},
    "shared": {"b": {"copies": 2, "layer": [{"use": "a", "input": ["x", "embedding"], "residual": "none"}]}},
    "layers": {"h": [{"use": "b", "residual": "next", "norm": "none"}, {"use": "c", "scale": 0.5}]},
    "stack": [{"tile": ["h"], "layers": 3}]}}
SHORT = {"name": "s", "model": {"width": 32, "memory": {"kind": "matrix"}, "feedforward": {"kind": "swiglu"},
                                "num_layers": 3, "pattern": ["memory"]}}


def _nodes(data, path=()):
    if path:
        yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from _nodes(value, (*path, key))


@pytest.mark.parametrize("whole", [LONG, SHORT], ids=["long", "short"])
def test_junk_anywhere_loads_or_is_refused_in_one_line(whole):
    load(whole)
    refused = []
    for path in _nodes(whole):
        for junk in JUNK:
            wrong = copy.deepcopy(whole)
            at = wrong
            for key in path[:-1]:
                at = at[key]
            at[path[-1]] = junk
            try:
                load(wrong)
            except DesignError as e:
                refused.append(str(e))
    assert len(refused) > 100
    assert [message for message in refused if "\n" in message or len(message) < 20] == []


@pytest.mark.parametrize(("override", "text"), [
    ("model.width", "'model.width' is not an override; write path.to.field=value"),
    ("=3", "'=3' is not an override"),
    ("model.mixers.memory.loss=l3", "model.mixers.memory.loss: 'l3' is not possible. Did you mean 'l2'?"),
    ("model.mixers.memry.loss=l2", "model.mixers.memry: no 'memry' here. Did you mean 'memory'?"),
    ("modle.width=3", "modle: unknown field 'modle'"),
    ("model.width.x=3", "model.width: 'width' has no fields of its own"),
    ("model.stack.9=a", "model.stack.9: '9' is no index of a list of 8"),
    ("model.width=[1", "model.width: '[1' is not a YAML value"),
    ("model.mixers.memory.heads.valu=2", "model.mixers.memory.heads.valu: unknown field 'valu' (value 2)."),
    ("model.mixers.memory.features=none", "loss l2 needs keys of bounded norm"),
    ("model.mixers.memory.heads.key=3", "heads.value is 4; it must be a multiple of heads.key (3)"),
])
def test_wrong_overrides(override, text):
    with pytest.raises(DesignError) as caught:
        load("gated-deltanet", [override])
    assert text in str(caught.value)
    assert ".yaml" not in str(caught.value)


def test_overrides_change_what_they_name_and_nothing_else():
    plain, other = load("gated-deltanet"), load("gated-deltanet", [
        "model.mixers.memory.retention.per=channel", "model.head.softcap=30", "model.stack.0=feedforward",
        "model.layers.feedforward=[{use: feedforward}]"])
    assert other.model.mixers["memory"].retention.per == "channel"
    assert other.model.head.softcap == 30.0
    assert other.model.stack == ("feedforward", *plain.model.stack[1:])
    before, after = plain.dump()["model"], other.dump()["model"]
    assert {k for k in before if before[k] != after[k]} == {"mixers", "head", "stack", "layers"}
    assert load("gated-deltanet").id == plain.id


def test_sizes_of_a_recipe_have_names():
    whole, tiny = load("palimpsest"), load("palimpsest-tiny")
    assert (tiny.name, tiny.model.width, len(tiny.model.stack)) == ("palimpsest-tiny", 128, 8)
    assert tiny.id == load("palimpsest", width=128, layers=8).id != whole.id
    assert load("palimpsest-tiny", width=64).model.width == 64
    assert "palimpsest-tiny" not in names()
    with pytest.raises(DesignError, match=r"file 'palimpsest-12m'. Did you mean 'palimpsest-125m'\?"):
        load("palimpsest-12m")
    with pytest.raises(DesignError, match="file 'transformer-125m'"):
        load("transformer-125m")


def test_recipes_on_disk_are_named_after_their_files():
    for name in names():
        assert load(name).name == name
        assert yaml.safe_load(yaml.safe_dump(load(name).dump())) == load(name).dump()
