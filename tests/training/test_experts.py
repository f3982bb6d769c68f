"""Experts in training: their biases follow the loads, are saved, resumed, and the same however a step is computed."""

import json

import pytest
import torch

import postformer.block.experts
import postformer.memory.vector  # noqa: F401
from postformer import design
from postformer.model import build
from postformer.objective import Batch, NextToken
from postformer.training import TrainConfig, Trainer, corpus_source, load_run, resume, train_language


def recipe(balance="bias", **moe):
    return design.load({"name": f"moe-{balance}", "model": {
        "width": 16, "memory": {"kind": "vector", "parameterisation": "mingru"},
        "feedforward": {"kind": "moe", "expert": {"dim_hidden": 8}, "balance": balance} | moe, "num_layers": 2}})


def config(**changes):
    return TrainConfig(**{"steps": 6, "batch_size": 4, "length": 16, "evaluate_batches": 1,
                          "optimiser": {"learning_rate": 0.01}} | changes)


def biases(model):
    return {name: value for name, value in model.state_dict().items() if name.endswith(".bias")}


def test_a_resumed_run_has_the_same_bits(tmp_path, corpus):
    train_language(recipe(), corpus, config(), tmp_path / "whole", progress="quiet")
    train_language(recipe(), corpus, config(time_limit=1e-6), tmp_path / "broken", progress="quiet")
    while resume(tmp_path / "broken", progress="quiet", time_limit=1e-6).step < 6:  # one step a session
        pass
    a, b = (load_run(tmp_path / name)[1].state_dict() for name in ("whole", "broken"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [name for name in a if name.endswith("mixer.bias")] == [f"stack.layers.{i}.sublayers.1.mixer.bias"
                                                                  for i in (0, 1)]
    moved = a["stack.layers.0.sublayers.1.mixer.bias"] / 0.01
    assert moved.abs().max() >= 1
    torch.testing.assert_close(moved, moved.round())  # six steps of one rate each
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= line["max_violation"] <= 7 for line in lines)


def test_parts_and_checkpointing_change_neither_loads_nor_biases(corpus):
    source, found = corpus_source(corpus, config()), []
    for changes in ({}, {"accumulate": 4}, {"gradient_checkpointing": True}):
        model = build(recipe().model)
        line = Trainer(model, NextToken(), source.batch_at, config(**changes)).advance(0)
        found.append((line["max_violation"], line["grad_norm"], biases(model)))
    for violation, norm, bias in found[1:]:
        assert violation == found[0][0]
        assert norm == pytest.approx(found[0][1], rel=1e-4)
        assert all(torch.equal(bias[name], value) for name, value in found[0][2].items())


def test_a_call_changes_no_bias_and_a_model_without_balance_has_none(corpus):
    batch = corpus_source(corpus, config()).batch_at(0)
    for balance in ("bias", "loss", "none"):
        model = build(recipe(balance).model)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        loss, metrics = NextToken().loss(model, batch)
        loss.backward()
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert bool(biases(model)) == (balance == "bias")
        assert ("auxiliary" in metrics) == (balance == "loss")


def test_balancing_brings_down_the_violation_on_a_skewed_stream():
    """Token n of 64 comes in proportion to 1 / n: without balance the experts that took the frequent ones keep them."""
    def batch_at(step):
        draw = torch.Generator().manual_seed(step)
        often = 1 / torch.arange(1.0, 65.0)
        return Batch.windows(torch.multinomial(often.expand(8, -1), 65, True, generator=draw))

    violations = {}
    for balance in ("none", "bias"):
        model = build(recipe(balance).model)
        trainer = Trainer(model, NextToken(), batch_at, config(steps=60), progress="quiet")
        last = [trainer.advance(step)["max_violation"] for step in range(60)][-10:]
        violations[balance] = sum(last) / 10
    assert violations["bias"] < 0.7 * violations["none"]  # without: 3.0, one expert in every token's choice
