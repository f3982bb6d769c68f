"""The JSON Schema that editors use is the one that the grammar makes, and accepts what ships."""

import json
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
import yaml

from postformer.design import names
from postformer.design.schema import recipe_schema

BUILT_IN = {"attention", "matrix", "vector", "deep", "filter", "cell", "self-modifying", "swiglu", "geglu", "mlp",
            "channel-mix", "moe", "chain", "parallel", "context", "router", "envelope", "slow", "timescales",
            "consolidated"}


@pytest.fixture(scope="module")
def shipped():
    return json.loads(files("postformer").joinpath("schema", "recipe.json").read_text(encoding="utf-8"))


def test_it_is_current(shipped):
    made = recipe_schema(BUILT_IN)
    assert made == shipped, "run: python -m postformer.design.schema"


def test_it_is_a_schema(shipped):
    jsonschema.Draft202012Validator.check_schema(shipped)


@pytest.mark.parametrize("name", names())
def test_it_accepts_what_ships(shipped, name):
    text = files("postformer").joinpath("recipes", f"{name}.yaml").read_text(encoding="utf-8")
    jsonschema.validate(yaml.safe_load(text), shipped)


def test_it_accepts_the_short_form(shipped):
    path = Path(__file__).parents[2] / "examples" / "leaky" / "leaky.yaml"
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    data["model"]["memory"] = {"kind": "attention"}
    jsonschema.validate(data, shipped)


@pytest.mark.parametrize("change", [
    lambda m: m["mixers"]["memory"].update(bogus=1), lambda m: m["mixers"]["memory"].update(loss="l9"),
    lambda m: m.update(widht=3), lambda m: m.update(stack=[{"repeat": 0, "of": ["memory"]}]),
])
def test_it_refuses_what_the_grammar_refuses(shipped, change):
    data = yaml.safe_load(files("postformer").joinpath("recipes", "gla.yaml").read_text(encoding="utf-8"))
    change(data["model"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, shipped)
