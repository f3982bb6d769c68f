"""What reads the last hidden state: it sees nothing else, trains whole, and its runs are saved, resumed and loaded."""

import pytest
import torch
from torch import nn

from postformer import design, task
from postformer.model import build
from postformer.objective import NextToken
from postformer.task import TaskError, seeded
from postformer.task.compression import Reader
from postformer.training import (
    CheckpointError,
    TrainConfig,
    Trainer,
    load_run,
    resume,
    task_source,
    train_task,
)
from postformer.training.optimise import roles

OPTIONS = {"train": [4, 8], "evaluate": [4, 8]}


def recipe(name="gated-deltanet"):
    return design.load(name, ["model.vocab=16"], 16, 1)


@pytest.fixture
def reader():
    return task.load("compression").around(build(recipe().model, 0))


def tokens_of(rows, length, seed=0):
    return task.load("compression").batch(length, rows, seeded(seed)).tokens


def test_only_the_last_hidden_state_is_read(reader):
    tokens = tokens_of(3, 9)
    out, _ = reader.model.run(reader.model.embed(tokens))
    whole = reader(tokens).logits
    others, last = out.y.clone(), out.y.clone()
    others[:, :-1] += 1
    last[:, -1] += torch.randn(16, generator=seeded(0))
    reader.model.hidden = lambda tokens, ctx=None: out._replace(y=others)
    assert torch.equal(reader(tokens).logits, whole)
    reader.model.hidden = lambda tokens, ctx=None: out._replace(y=last)
    assert not torch.allclose(reader(tokens).logits, whole, atol=1e-2)


def test_every_position_is_named_by_itself(reader):
    tokens = tokens_of(3, 9)
    logits = reader(tokens).logits
    assert logits.shape == (3, 9, 16)
    assert not torch.allclose(logits[:, 0], logits[:, 4], atol=1e-3)
    select = torch.rand(3, 9, generator=seeded(1)) < 0.5
    assert torch.allclose(reader(tokens, select=select).logits, logits[select], atol=1e-6)


def test_the_decoder_is_not_wider_than_the_model(reader):
    maps = [m for m in reader.decoder.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in maps] == [(16, 16), (16, 16)]


def test_the_same_seed_gives_the_same_reader_and_the_global_generator_stays():
    state = torch.random.get_rng_state()
    a, b, c = (Reader(build(recipe().model, seed)).decoder.state_dict() for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["1.weight"], c["1.weight"])


def test_what_it_cannot_read_is_refused(reader):
    with pytest.raises(TaskError, match="has no hidden and no logits and no design; give a model that"):
        task.load("compression").around(nn.Linear(2, 2))
    with pytest.raises(TaskError, match="whole rows"):
        reader(tokens_of(1, 4), reader.model.initial(1))


@pytest.mark.parametrize("name", ["gated-deltanet", "transformer"])
def test_every_parameter_trains(name):
    source = task_source("compression", None, config := settings(1), OPTIONS)
    reader = source.around(build(recipe(name).model, 0))
    before = {key: value.clone() for key, value in reader.named_parameters()}
    assert set(roles(reader)) == set(before)
    kinds = {key: role.kind for key, role in roles(reader).items() if key.startswith("decoder.")}
    assert set(kinds.values()) == {"matrix", "bias", "norm"}
    inner = {key: role for key, role in reader.roles().items() if key not in kinds}
    assert inner == {f"model.{key}": role for key, role in reader.model.roles().items()}
    trainer = Trainer(reader, NextToken(), source.batch_at, config)
    for step in range(4):
        trainer.advance(step)
    still = [key for key, value in reader.named_parameters() if torch.equal(value, before[key])]
    assert not still


def test_gradient_checkpointing_reaches_the_model(reader):
    reader.gradient_checkpointing = True
    assert reader.model.gradient_checkpointing
    assert reader.gradient_checkpointing


def test_what_the_experts_measure_reaches_them():
    mixture = design.load("deepseek-moe", ["model.vocab=16"], 16)
    source = task_source("compression", None, config := settings(1), OPTIONS)
    reader = source.around(build(mixture.model, 0))
    called = []
    reader.model.after_step = called.append
    Trainer(reader, NextToken(), source.batch_at, config).advance(0)
    assert called
    assert all(name.endswith(".load") for name in called[0])


def settings(steps=6, **more):
    return TrainConfig.model_validate(
        {"steps": steps, "batch_size": 4, "evaluate_every": 3, "evaluate_batches": 2, "threads": 1, **more}
    )


def test_a_run_is_saved_resumed_and_loaded(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = train_task(recipe(), "compression", None, settings(), whole, options=OPTIONS, progress="quiet")
    train_task(recipe(), "compression", None, settings(time_limit=1e-6), broken, options=OPTIONS, progress="quiet")
    result = resume(broken, progress="quiet")
    assert result.step == 6
    assert result.validation == done.validation
    readers = [load_run(folder)[1] for folder in (whole, broken)]
    assert all(isinstance(reader, Reader) for reader in readers)
    assert all(torch.equal(a, b) for a, b in zip(*(reader.parameters() for reader in readers), strict=True))
    assert {"4/token_accuracy", "8/token_accuracy"} < done.validation.keys()


def test_a_run_of_a_task_object_is_loaded_with_it(tmp_path):
    made = task.load("compression", **OPTIONS)
    train_task(recipe(), made, None, settings(1), tmp_path / "run", progress="quiet")
    with pytest.raises(CheckpointError, match="decoder"):
        load_run(tmp_path / "run")
    assert isinstance(load_run(tmp_path / "run", task=made)[1], Reader)
