"""A run may start from another's weights, with maps of another kind too; the two-stage schedule of ternary runs."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from postformer.data import load_corpus
from postformer.design import load
from postformer.model import build
from postformer.training import CheckpointError, TrainConfig, load_run, resume, train_language
from postformer.training.checkpoint import start_from, weights
from postformer.training.config import OptimiserConfig, ScheduleConfig
from postformer.training.optimise import Optimisers, decay_schedule, schedule

TWO = ScheduleConfig(kind="two-stage", warmup=2, final=0.0, second=0.5)


@pytest.fixture
def corpus(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} and {i + 1} make {2 * i + 1}.\n" for i in range(900)))
    return load_corpus(text, cache=tmp_path / "cache")


def design(linear="dense", width=16, layers=1):
    return load("transformer", [f"model.linear.projection={linear}"], width=width, layers=layers)


def config(**changes):
    return TrainConfig(**{"steps": 4, "batch_size": 2, "length": 16, "evaluate_batches": 1, "checkpoint_every": 2}
                       | changes)


@pytest.fixture
def trained(tmp_path, corpus):
    train_language(design(), corpus, config(), tmp_path / "full", progress="quiet")
    return tmp_path / "full"


@pytest.mark.parametrize("which", ["", "checkpoints/step-4", "checkpoints/step-4/model.safetensors"])
def test_full_precision_weights_start_a_ternary_run(tmp_path, corpus, trained, which, capsys):
    start = str(trained / which)
    train_language(design("ternary"), corpus, config(start=start, steps=1), tmp_path / "ternary", progress="plain")
    source = trained / "checkpoints" / "step-4" / "model.safetensors"
    assert f"11 of 11 tensors start from {source}\n" in capsys.readouterr().err
    model = build(design("ternary").model, 3)
    assert start_from(model, start) == [f"11 of 11 tensors start from {source}"]
    before = load_run(trained)[1].state_dict()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    after = load_run(tmp_path / "ternary")[1].state_dict()
    moved = [float((after[name] - before[name]).abs().max()) for name in before]
    assert 0 < max(moved) < 3e-3  # one step at the peak rate of 1e-3, not a fresh start


def test_what_does_not_match_is_named_and_stays(trained):
    model, fresh = build(design("lora", layers=2).model, 3), build(design("lora", layers=2).model, 3)
    notes = start_from(model, trained)
    assert notes[0].startswith("11 of 48 tensors start from ")
    assert notes[1].startswith("37 tensors stay as the seed drew them: stack.layers.0.sublayers.0.mixer.k.lora_a, ")
    assert len(notes) == 2
    there = load_run(trained)[1].state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, there.get(name, fresh.state_dict()[name])), name
    assert "stack.layers.1.norm" not in there
    back = build(design().model, 5)
    file = trained / "lora.safetensors"
    save_file({name: value.clone() for name, value in weights(model).items()}, file)
    assert start_from(back, file)[1].startswith("37 tensors of that file have no place here: stack.layers.0.sub")


def test_a_low_rank_start_computes_the_same(trained):
    model = build(design("lora").model, 3)
    start_from(model, trained)
    tokens = torch.randint(0, 256, (2, 9))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, load_run(trained)[1](tokens).logits)


def test_what_cannot_be_a_start_is_refused_before_the_run_begins(tmp_path, corpus, trained):
    cases = [(design(width=32), trained, "embedding.weight is [256, 16] there and [256, 32] here", "width and layers"),
             (design(), tmp_path / "nowhere", "does not exist", "a run directory"),
             (design(), tmp_path / "cache", "holds neither a checkpoint nor model.safetensors", "a run directory"),
             (load({"name": "x", "model": {"width": 16, "mixers": {"m": {"kind": "mlp"}}, "stack": ["m"]}}),
              tmp_path / "other.safetensors", "no tensor of this model: it holds foreign", "same kinds of memory")]
    save_file({"foreign": torch.zeros(2)}, tmp_path / "other.safetensors")
    for recipe, start, said, remedy in cases:
        with pytest.raises(CheckpointError) as caught:
            train_language(recipe, corpus, config(start=str(start)), tmp_path / "run", progress="quiet")
        assert said in caught.value.message
        assert remedy in caught.value.remedy
        assert not (tmp_path / "run").exists()


def bits(folder, step):
    return {f"{name}:{key}": value.numpy().tobytes() for name in ("model", "train")
            for key, value in load_file(folder / "checkpoints" / f"step-{step}" / f"{name}.safetensors").items()}


def test_a_started_two_stage_run_resumes_bit_identically(tmp_path, corpus, trained):
    settings = config(steps=8, start=str(trained), schedule=TWO)
    train_language(design("ternary"), corpus, settings, tmp_path / "whole", progress="quiet")
    limited = settings.model_copy(update={"time_limit": 1e-9})
    train_language(design("ternary"), corpus, limited, tmp_path / "cut", progress="quiet")  # one step
    shutil.rmtree(trained)  # a resumed run needs its start no longer
    for _ in range(3):
        resume(tmp_path / "cut", corpus=corpus, time_limit=1e-9, progress="quiet")
    assert bits(tmp_path / "cut", 4) != bits(tmp_path / "whole", 8)
    resume(tmp_path / "cut", corpus=corpus, progress="quiet")
    assert bits(tmp_path / "cut", 8) == bits(tmp_path / "whole", 8)


def test_two_stages():
    rates = [schedule(step, 12, TWO) for step in range(12)]
    # warmup to step 2, then a line to 0 at step 11; from step 6 on half of that line
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 8 / 9, 7 / 9, 6 / 9, 5 / 18, 4 / 18, 3 / 18, 2 / 18, 1 / 18, 0])
    assert [decay_schedule(step, 12, TWO) for step in range(12)] == [1.0] * 6 + [0.0] * 6
    assert {decay_schedule(step, 12, ScheduleConfig(kind=kind)) for kind in ("cosine", "wsd", "constant")
            for step in range(12)} == {1.0}
    assert schedule(0, 1, ScheduleConfig(kind="two-stage")) > 0
    default = ScheduleConfig(kind="two-stage", warmup=0)
    assert schedule(0, 100, default) == 1.0
    assert schedule(99, 100, default) == pytest.approx(0.1 * 2 / 3)


def test_weight_decay_follows_the_schedule():
    layer = torch.nn.Linear(3, 2, bias=False)
    before = layer.weight.detach().clone()
    optimisers = Optimisers(layer, OptimiserConfig(learning_rate=0.5, weight_decay=0.1))
    for decay, factor in ((1.0, 0.95), (0.0, 0.95), (0.5, 0.95 * 0.975)):
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimisers.step(1.0, decay)
        torch.testing.assert_close(layer.weight.detach(), before * factor)
    assert optimisers.describe()[0]["weight_decay"] == 0.1


def test_a_run_begun_before_a_field_existed_is_still_that_run(tmp_path, corpus):
    from postformer.training.record import identity, read_run

    train_language(design(), corpus, config(), tmp_path / "run", progress="quiet")
    run = read_run(tmp_path / "run")
    older = run | {"config": {k: v for k, v in run["config"].items() if k != "start"}}
    assert identity(older) == identity(run)
    assert identity(run | {"config": run["config"] | {"start": "x"}}) != identity(run)
    assert identity(run | {"config": run["config"] | {"batch_size": 3}}) != identity(run)
