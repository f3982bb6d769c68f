"""Every recipe at other sizes: it builds, and its declared cost is the built model's."""

import subprocess
import sys

import pytest
import torch

from postformer.contract import state as states
from postformer.design import DesignError, load, names
from postformer.model import build


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize(("width", "layers"), [(64, 2), (128, 4)])
def test_scaled_recipes_build_with_the_declared_parameters_and_state(name, width, layers):
    layers = max(layers, len(set(load(name).model.stack)))  # one of each kind of layer
    recipe = load(name, width=width, layers=layers)
    assert recipe.model.width == width
    assert len(recipe.model.stack) == layers
    model = build(recipe.model)
    cost = recipe.cost()
    assert sum(p.numel() for p in model.parameters()) == cost.params
    with torch.no_grad():
        out = model(torch.zeros(1, 9, dtype=torch.long))
    assert out.logits.shape == (1, 9, recipe.model.vocab)
    assert states.size(out.state) == cost.state_bytes(9)


@pytest.mark.parametrize("name", names())
def test_large_sizes_are_costed_without_building(name):
    large, own = load(name, width=512, layers=12), load(name)
    assert len(large.model.stack) == 12
    assert large.cost().params > 2 * own.cost().params
    assert large.cost().flops(1, 1000) > 2 * own.cost().flops(1, 1000)
    assert large.cost().state_bytes(1000) > own.cost().state_bytes(1000)
    assert large.id != own.id
    assert set(large.model.stack) == set(own.model.stack)


def test_layers_keep_the_pattern_and_the_single_entries():
    assert load("rwkv7", layers=3).model.stack == ("first", "time", "time")
    kinds = load("qwen3-next", layers=12).model.stack
    assert [i for i, k in enumerate(kinds) if k.startswith("attention")] == [3, 7, 11]
    assert [k.split("/")[0] for k in load("griffin", layers=2).model.stack] == ["recurrent", "attention"]


@pytest.mark.parametrize(("width", "layers", "text"), [(60, None, "width is 60; it is a multiple of 8"),
                                                       (None, 0, "layers is 0; it is a whole number >= 1"),
                                                       (0, None, "width is 0")])
def test_sizes_that_cannot_be(width, layers, text):
    with pytest.raises(DesignError, match=text):
        load("griffin", width=width, layers=layers)


def test_scaling_to_too_few_layers_says_which_mixer_fell_out():
    with pytest.raises(DesignError, match=r"stands in no layer of the stack.*ask for more layers"):
        load("griffin", layers=1)


def test_design_does_not_import_torch():
    code = "import sys, postformer.design; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
