"""Depth in training: thresholds follow the share of a whole step, however it is computed; what is reported."""

import pytest
import torch

from postformer import design
from postformer.model import build
from postformer.objective import NextToken
from postformer.training import TrainConfig, Trainer, corpus_source


def recipe(depth):
    return design.load({"name": "deep", "model": {
        "width": 16, "mixers": {"m": {"kind": "vector", "parameterisation": "rglru", "local": "none"},
                                "ff": {"kind": "swiglu"}},
        "layers": {"l": [{"use": "m", "depth": depth}, {"use": "ff"}]}, "stack": ["l", "l"]}})


def config(**changes):
    return TrainConfig(**{"steps": 6, "batch_size": 4, "length": 16, "optimiser": {"learning_rate": 0.01}} | changes)


@pytest.mark.parametrize("depth", ["mod", {"kind": "loop", "most": 3, "price": 0.5}, {"kind": "ode", "most": 3}])
def test_parts_and_checkpointing_change_nothing(corpus, depth):
    source, found = corpus_source(corpus, config()), []
    for changes in ({}, {"accumulate": 4}, {"gradient_checkpointing": True}):
        model = build(recipe(depth).model)
        line = Trainer(model, NextToken(), source.batch_at, config(**changes)).advance(0)
        moved = [value for name, value in model.state_dict().items() if name.endswith("threshold")]
        found.append((line["depth"], line["grad_norm"], moved))
    assert len(found[0][2]) == 2 * (depth == "mod")
    for reported, norm, moved in found[1:]:
        assert reported == found[0][0]
        assert norm == pytest.approx(found[0][1], rel=1e-3)
        assert all(torch.allclose(a, b, atol=1e-6) and b.abs() > 0 for a, b in zip(moved, found[0][2], strict=True))


def test_the_mean_depth_of_a_step_is_reported(corpus):
    source = corpus_source(corpus, config())
    model = build(recipe({"kind": "loop", "most": 3}).model)
    for bias, depth in ((1e3, 1.0), (-1e3, 3.0)):
        for layer in model.stack.layers:
            torch.nn.init.constant_(layer.sublayers[0].depth.gate.bias, bias)
        assert Trainer(model, NextToken(), source.batch_at, config()).advance(0)["depth"] == depth
    assert "depth" not in Trainer(build(recipe("fixed").model), NextToken(), source.batch_at, config()).advance(0)
