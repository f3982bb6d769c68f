"""Training in stages: what each starts from, resuming inside one bit by bit, and what a user may get wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file

import postformer
from postformer.design import DesignError, load
from postformer.model import build
from postformer.objective import NextToken
from postformer.surgery import grow
from postformer.training import (
    RunExists,
    TrainingError,
    checkpoint,
    load_run,
    load_weights,
    metrics,
    read_result,
    read_run,
    resume,
    staged,
    train_stages,
    work,
)
from postformer.training.trainer import Trainer

SMALL = {"batch_size": 2, "length": 16, "evaluate_batches": 1, "checkpoint_every": 2}
GROW = {"kind": "grow", "how": "stack", "factor": 2}
STAGES = [{"train": {"steps": 4}}, {"surgery": GROW, "train": {"steps": 6, "optimiser": {"learning_rate": 2e-3}}},
          {"train": {"tokens": 96, "schedule": {"kind": "constant"}}}]


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTFORMER_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} and {i + 1} make {2 * i + 1}.\n" for i in range(900)))
    return work.work(load("gated-deltanet", width=16, layers=2), str(text))


def train(job, directory, stages=STAGES, **more):
    return train_stages(job, staged(job.recipe, stages, SMALL), directory, progress="quiet", **more)


def final(directory, stage):
    folder = directory / f"stage-{stage}" / "checkpoints"
    return folder / f"step-{checkpoint.steps(folder)[-1]}"


def bits(directory):
    return {f"{k}:{file}:{name}": tensor.numpy().tobytes() for k in range(3)
            for file in ("model.safetensors", "train.safetensors")
            for name, tensor in load_file(final(directory, k) / file).items()}


class Stopped(Exception):
    pass


@pytest.fixture
def stop(monkeypatch):
    """stop(step, layers): the process dies in that step of the stage of so many layers."""
    whole = Trainer.advance

    def at(step, layers):
        def advance(self, now):
            if now == step and len(self.model.design.stack) == layers:
                raise Stopped
            return whole(self, now)

        monkeypatch.setattr(Trainer, "advance", advance)

    yield at
    monkeypatch.setattr(Trainer, "advance", whole)


def test_each_stage_is_a_run_that_begins_where_the_one_before_ended(job, tmp_path):
    result = train(job, tmp_path / "run")
    assert (result.step, result.steps, result.seed, result.directory) == (3, 3, 2000, str(tmp_path / "run" / "stage-2"))
    runs = [read_run(tmp_path / "run" / f"stage-{k}") for k in range(3)]
    assert [run["seed"] for run in runs] == [0, 1000, 2000]
    assert [run["config"]["optimiser"]["learning_rate"] for run in runs] == [1e-3, 2e-3, 1e-3]
    assert [run["stage"]["surgery"] for run in runs] == [None, GROW, None]
    assert runs[1]["recipe_id"] == runs[2]["recipe_id"] == load("gated-deltanet", width=16, layers=4).id
    assert [read_result(tmp_path / "run" / f"stage-{k}").step for k in range(3)] == [4, 6, 3]
    log = (tmp_path / "run" / "stage-1" / "train.log").read_text()
    assert "surgery: grow (how stack, factor 2): 2 layers become 4" in log
    assert "what stays: the weights of every layer, not the logits; the optimiser starts afresh" in log

    # One step of the first grown stage, done by hand.
    model = build(job.recipe.model, 7)
    load_weights(model, final(tmp_path / "run", 0) / "model.safetensors")
    stage = staged(job.recipe, STAGES, SMALL)[1]
    source = job.source(stage.config)
    trainer = Trainer(grow(model, factor=2), NextToken(), source.batch_at, stage.config, progress="quiet")
    line = trainer.advance(0)
    first = metrics.read(tmp_path / "run" / "stage-1" / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(line["loss"], abs=1e-6)
    assert first["lr"] == line["lr"]


@pytest.mark.parametrize(("step", "layers"), [(3, 2), (0, 4), (1, 4), (5, 4)])
def test_stopped_anywhere_it_ends_in_the_same_bits(job, tmp_path, stop, step, layers):
    train(job, tmp_path / "whole")
    stop(step, layers)
    with pytest.raises(Stopped):
        train(job, tmp_path / "broken")
    stop(-1, 0)
    again = resume(tmp_path / "broken", progress="quiet")
    assert again.step == 3
    assert bits(tmp_path / "broken") == bits(tmp_path / "whole")


def test_a_stage_is_resumed_as_a_part_of_its_training(job, tmp_path, stop):
    train(job, tmp_path / "whole")
    stop(1, 4)  # before the grown stage has a checkpoint: as a run of its own it would begin with fresh weights
    with pytest.raises(Stopped):
        train(job, tmp_path / "broken")
    stop(-1, 0)
    resume(tmp_path / "broken" / "stage-1", progress="quiet")
    assert bits(tmp_path / "broken") == bits(tmp_path / "whole")
    (tmp_path / "broken" / "stage-1").rename(tmp_path / "alone")
    with pytest.raises(TrainingError, match="Move it back"):
        resume(tmp_path / "alone")


def test_a_time_limit_stops_between_steps_and_the_rest_follows(job, tmp_path):
    stages = [STAGES[0] | {"train": {"steps": 4, "time_limit": 1e-9}}, *STAGES[1:]]
    result = train(job, tmp_path / "run", stages)
    assert (result.step, result.reason) == (1, "time limit")
    assert not (tmp_path / "run" / "stage-1").exists()
    assert resume(tmp_path / "run", progress="quiet").directory == str(tmp_path / "run" / "stage-2")
    train(job, tmp_path / "whole")
    assert bits(tmp_path / "run") == bits(tmp_path / "whole")


def test_the_directory_stands_for_its_newest_stage(job, tmp_path):
    train(job, tmp_path / "run")
    recipe, model = load_run(tmp_path / "run")
    assert len(recipe.model.stack) == 4
    trained = load_file(final(tmp_path / "run", 2) / "model.safetensors")
    assert torch.equal(model.embedding.weight, trained["embedding.weight"])
    run = postformer.Run(tmp_path / "run")
    assert run.generate("1 and", 4).startswith("1 and")
    page = run.report(tmp_path / "page.html").read_text()
    assert "3 training runs" in page


def test_the_verb_in_python(job, tmp_path):
    text = tmp_path / "text.txt"
    file = tmp_path / "stages.yaml"
    file.write_text("train: {steps: 2}\nstages:\n  - {}\n  - surgery: {kind: grow, how: identity, layers: 3}\n"
                    "    train: {seed: 5}\n")
    run = postformer.load("transformer", width=16, layers=1).train(str(text), tmp_path / "run", progress="quiet",
                                                                   stages=file, **SMALL)
    assert len(run.model.design.stack) == 3
    assert run.result.seed == 5
    before, after = (metrics.read(tmp_path / "run" / f"stage-{k}" / "metrics.jsonl") for k in (0, 1))
    assert [len(before), len(after)] == [2, 2]
    asked = json.loads((tmp_path / "run" / "stages.json").read_text())
    assert [stage.get("surgery", {}).get("how") for stage in asked["stages"]] == [None, "identity"]


def test_a_reading_of_the_tasks_own_is_carried_over(tmp_path):
    compression = work.work(load("transformer", width=16, layers=1), "task:compression")
    train_stages(compression, staged(compression.recipe, [{"train": {"steps": 2}}, {
        "surgery": GROW, "train": {"steps": 1, "optimiser": {"learning_rate": 1e-12, "weight_decay": 0}}}], SMALL),
        tmp_path / "run", progress="quiet")
    before, after = (load_file(final(tmp_path / "run", k) / "model.safetensors") for k in (0, 1))
    own = [name for name in before if name.startswith("decoder.")]
    assert len(own) == 7
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in own)


def test_the_same_directory_again(job, tmp_path):
    train(job, tmp_path / "run")
    with pytest.raises(RunExists, match="already holds this very training"):
        train(job, tmp_path / "run")
    with pytest.raises(RunExists, match="another training of stages"):
        train(job, tmp_path / "run", STAGES[:2], resume=True)
    assert train(job, tmp_path / "run", resume=True).step == 3
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(RunExists, match=r"not empty \(it has notes.txt\)"):
        train(job, tmp_path / "full")


@pytest.mark.parametrize(("said", "path", "words"), [
    ({}, "", ["a mapping with a list of 'stages'"]),
    ([], "", ["a mapping with a list of 'stages'"]),
    ({"stage": []}, "", ["a mapping with a list of 'stages'"]),
    ({"stages": [{"train": {"steps": 1}}], "steps": 3}, "", ["unknown field 'steps'"]),
    ([{"train": {"steps": 1}}, 3], "stages.1", ["this is a mapping (got 3)"]),
    ([{"steps": 1}], "stages.0", ["unknown field 'steps'", "stand under `train`"]),
    ([{"train": {"steps": 1}}, {"surgery": GROW}], "stages.1.train", ["how long this stage is: steps or tokens"]),
    ([{"train": {"steps": 1, "tokens": 2}}], "stages.0.train", ["either steps or tokens"]),
    ([{"train": {"step": 1, "tokens": 2}}], "stages.0.train.step", ["Did you mean 'steps'?"]),
    ([{"train": 3}], "stages.0.train", ["a mapping", "got 3"]),
    ([{"surgery": GROW, "train": {"steps": 1}}], "stages.0.surgery", ["nothing is trained before the first stage"]),
    ([{"train": {"steps": 1}}, {"surgery": {"kind": "grow"}, "train": {"steps": 1}}], "stages.1.surgery",
     ["either factor or layers"]),
    ([{"train": {"steps": 1}}, {"surgery": {"kind": "grow", "layers": 2}, "train": {"steps": 1}}],
     "stages.1.surgery.layers", ["ask for more"]),
    ([{"train": {"steps": 1}}, {"train": {"steps": 1, "start": "x"}}], "stages.1.train.start", ["leave start out"]),
])
def test_mistakes_are_found_before_the_first_step(said, path, words):
    with pytest.raises(DesignError) as error:
        staged(load("gated-deltanet", width=16, layers=2), said)
    assert error.value.path == path
    assert all(word in error.value.message for word in words), error.value.message


def test_files_that_cannot_be_read(tmp_path):
    recipe = load("gated-deltanet", width=16, layers=2)
    with pytest.raises(DesignError, match="cannot read the stages"):
        staged(recipe, tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("stages:\n  - {\n")
    with pytest.raises(DesignError, match=r"bad.yaml:3: not valid YAML"):
        staged(recipe, tmp_path / "bad.yaml")


def test_settings_lie_between_the_file_and_its_stages():
    said = {"train": {"batch_size": 3, "length": 9, "steps": 5},
            "stages": [{}, {"train": {"tokens": 90, "length": 10, "schedule": {"final": 0.5}}}]}
    found = [s.config for s in staged(load("transformer", width=16, layers=1), said,
                                      {"batch_size": 4, "schedule": {"kind": "wsd"}})]
    assert [(c.batch_size, c.length, c.total_steps) for c in found] == [(4, 9, 5), (4, 10, 3)]
    assert [(c.schedule.kind, c.schedule.final) for c in found] == [("wsd", 0.1), ("wsd", 0.5)]
