"""The real model through everything that training and sampling offer."""

import pytest
import torch

# Importing registers the kinds also where the package is used from its source tree.
import postformer.block.feedforward
import postformer.memory.attention
import postformer.memory.matrix
import postformer.memory.vector  # noqa: F401
from postformer import design
from postformer.model import build
from postformer.objective import Batch, NextToken
from postformer.sampling import Policy, generate, left_pad
from postformer.training import (
    OptimiserConfig,
    TrainConfig,
    Trainer,
    corpus_source,
    load_run,
    plan,
    resume,
    train_language,
    train_task,
)
from postformer.training.optimise import Optimisers

MEMORIES = {
    "attention": {"kind": "attention", "heads": {"query": 2, "key_value": 1}},
    "window": {"kind": "attention", "window": 4},
    "delta": {"kind": "matrix", "loss": "l2", "retention": {"per": "head", "gate": "mamba"},
              "update": {"kind": "gradient", "rate": "sigmoid"}, "heads": {"value": 2, "dim_key": 8, "dim_value": 8},
              "features": "l2norm", "local": "conv4", "read": "gated-norm"},
}


def recipe(memory, **model):
    return design.load({"name": memory, "model": {
        "width": 16, "memory": MEMORIES[memory], "feedforward": {"kind": "swiglu"}, "num_layers": 2} | model})


def config(**changes):
    return TrainConfig(**{"steps": 6, "batch_size": 4, "length": 16, "evaluate_batches": 1,
                          "optimiser": {"kind": "muon", "learning_rate": 0.01}} | changes)


@pytest.mark.parametrize("memory", MEMORIES)
def test_train_stop_resume_generate(tmp_path, corpus, memory):
    whole = train_language(recipe(memory), corpus, config(), tmp_path / "whole", progress="quiet")
    assert whole.validation["bits_per_byte"] < 8.2
    assert whole.params == recipe(memory).cost().params
    train_language(recipe(memory), corpus, config(time_limit=1e-6), tmp_path / "broken", progress="quiet")
    while resume(tmp_path / "broken", progress="quiet", time_limit=1e-6).step < 6:  # one step a session
        pass
    made, model = load_run(tmp_path / "whole")
    assert made.id == recipe(memory).id
    other = load_run(tmp_path / "broken")[1]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    tokens, _ = generate(model, torch.tensor([list(b"7 and 8 ")]), Policy(temperature=0), 12)
    with torch.no_grad():
        logits = model(tokens).logits[:, 7:-1]
    assert torch.equal(tokens[:, 8:], logits.argmax(-1))


@pytest.mark.parametrize("memory", MEMORIES)
def test_left_padding_forced_tokens_and_idle_rows(memory):
    model = build(recipe(memory).model, seed=1).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    rows = [[1, 2, 3, 4, 5, 6, 7], [7], [8, 9, 10]]
    tokens, valid = left_pad(rows, pad=77)
    forced = {3: [65, 66]}

    def interpose(start):
        return lambda t: forced.get(t.shape[1] - start)

    greedy = Policy(temperature=0)
    alone = [generate(model, torch.tensor([row]), greedy, 9, interpose=interpose(len(row))).tokens[0, len(row):]
             for row in rows]
    together = generate(model, tokens, greedy, 9, valid=valid, interpose=interpose(7)).tokens[:, 7:]
    assert torch.equal(together, torch.stack(alone))
    end = alone[0][1].item()
    stopped = generate(model, tokens, greedy, 9, valid=valid, interpose=interpose(7), stop=end)
    for row in range(3):
        n = int(stopped.trace.length[row])
        assert torch.equal(stopped.tokens[row, 7:7 + n], alone[row][:n])


def test_the_optimiser_follows_the_roles_of_the_model():
    model = build(recipe("delta").model)
    found = {name: (g["optimiser"], g["weight_decay"] > 0)
             for g in Optimisers(model, OptimiserConfig(kind="muon")).describe() for name in g["names"]}
    roles = model.roles()
    assert found.keys() == roles.keys()
    for name, p in model.named_parameters():
        muon = roles[name].kind == "matrix" and p.ndim == 2
        assert found[name] == ("Muon" if muon else "AdamW", roles[name].decay)
    assert found["embedding.weight"] == ("AdamW", False)


@pytest.mark.parametrize("memory", ["attention", "delta"])
def test_gradient_checkpointing_and_accumulation_do_not_change_the_gradient(corpus, memory):
    source = corpus_source(corpus, config())
    norms = []
    for changes in ({}, {"gradient_checkpointing": True}, {"accumulate": 4}):
        model = build(recipe(memory).model)
        norms.append(Trainer(model, NextToken(), source.batch_at, config(**changes)).advance(0)["grad_norm"])
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)
    plans = [plan(recipe(memory), source, config(gradient_checkpointing=c)) for c in (False, True)]
    assert plans[0].params == recipe(memory).cost().params
    assert plans[1].activations < plans[0].activations


def test_bfloat16(corpus):
    losses = []
    for dtype in ("float32", "bfloat16"):
        model = build(recipe("delta").model)
        trainer = Trainer(model, NextToken(), corpus_source(corpus, config()).batch_at, config(dtype=dtype))
        losses.append([trainer.advance(s)["loss"] for s in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_a_task_with_few_scored_positions(tmp_path):
    made = recipe("attention", vocab=16)
    options = {"vocab": 16, "train": (16, 2), "evaluate": (16, 2)}
    result = train_task(made, "mqar", None, config(), tmp_path, options=options, progress="quiet")
    assert 0 <= result.validation["last_accuracy"] <= 1
    tokens = torch.randint(0, 16, (2, 8), generator=torch.Generator().manual_seed(0))
    targets = tokens.roll(-1, 1)
    model = build(made.model)
    full, _ = NextToken().loss(model, Batch(tokens, targets.masked_fill(torch.arange(8) % 4 != 1, -100)))
    with torch.no_grad():
        logits = model(tokens).logits[:, 1::4]
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, 1::4].flatten())
    assert full.item() == pytest.approx(wanted.item(), rel=1e-5)
