"""Surgeries by kind: what ships, one of a user's own, and what is said about a wrong one."""

from typing import Literal

import pytest
import torch

from postformer.design import DesignError, load
from postformer.model import build
from postformer.surgery import Grow, Surgery, base, names, register
from postformer.surgery import load as load_surgery


@pytest.fixture(autouse=True)
def _forgotten():
    before = dict(base._classes)
    yield
    base._classes.clear()
    base._classes.update(before)


@pytest.mark.parametrize(("said", "path", "words"), [
    ({"kind": "grw", "factor": 2}, "surgery.kind", ["no surgery is called 'grw'", "Did you mean 'grow'?"]),
    ({"factor": 2}, "surgery", ["a mapping with a 'kind'", "{kind: grow, factor: 2}"]),
    (7, "surgery", ["got 7"]),
    ({"kind": "grow", "facto": 2}, "surgery.facto", ["unknown field 'facto' (value 2)", "Did you mean 'factor'?"]),
    ({"kind": "grow", "factor": 1}, "surgery.factor", ["greater than or equal to 2", "got 1"]),
    ({"kind": "grow", "factor": 2, "how": "copy"}, "surgery.how", ["'stack', 'interleave' or 'identity'"]),
    ("grow", "surgery", ["either factor or layers"]),
])
def test_wrong_ones(said, path, words):
    with pytest.raises(DesignError) as error:
        load_surgery(said)
    assert error.value.path == path
    assert all(word in error.value.message for word in words), error.value.message


def test_grow_ships_and_a_users_own_is_found_alike():
    assert load_surgery({"kind": "grow", "layers": 4}) == Grow(layers=4)
    assert names() == ["grow"]

    @register
    class Damp(Surgery):
        kind: Literal["damp"] = "damp"
        by: float = 0.5

        def recipe(self, recipe):
            return recipe

        def operate(self, model):
            after = build(model.design)
            after.load_state_dict({name: value * self.by for name, value in model.state_dict().items()})
            return after

    assert names() == ["damp", "grow"]
    found = load_surgery({"kind": "damp", "by": 0.25})
    assert found.in_words() == "damp (by 0.25)"
    model = build(load("transformer", width=16, layers=1).model)
    after = found.operate(model).embedding.weight
    assert torch.equal(after, model.embedding.weight * 0.25)

    class Other(Surgery):
        kind: Literal["damp"] = "damp"

    with pytest.raises(TypeError, match="is already"):
        register(Other)


def test_what_is_not_written_says_so():
    class Empty(Surgery):
        kind: Literal["empty"] = "empty"

    recipe = load("transformer", width=16, layers=1)
    with pytest.raises(NotImplementedError, match="Empty does not define recipe"):
        Empty().recipe(recipe)
    with pytest.raises(NotImplementedError, match="Empty does not say what it preserves"):
        Empty().preserves()
    with pytest.raises(NotImplementedError, match="Empty does not define operate"):
        Empty().operate(build(recipe.model))

    class Nameless(Surgery):
        pass

    with pytest.raises(TypeError, match="names no kind"):
        register(Nameless)
