"""A run directory is the full record of a run, and enough to continue it."""

import json
from typing import Literal

import pytest
import torch
import yaml
from fake import FakeModel

from postformer import design
from postformer.contract.mixer import Mixer
from postformer.data import load_corpus
from postformer.design import Cost, Design
from postformer.task import TaskError, load
from postformer.training import (
    Diverged,
    Interrupted,
    OutOfMemory,
    RunExists,
    TrainConfig,
    TrainingError,
    checkpoint,
    corpus_source,
    evaluate_split,
    evaluate_task,
    load_run,
    plan,
    read_result,
    read_run,
    resume,
    run,
    train_language,
    train_task,
)
from postformer.training.memory import available_memory


class FakeDesign(Design):
    kind: Literal["fake-recurrent"] = "fake-recurrent"


@design.register(FakeDesign)
class FakeMixer(Mixer):
    @classmethod
    def cost(cls, design, site):
        return Cost(params=10, flops_per_token=20.0, state=64)


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    monkeypatch.setattr(run, "build_model", lambda r, seed: FakeModel(r.model.vocab, r.model.width, seed))


def recipe(width=16, vocab=256):
    model = {"width": width, "vocab": vocab, "mixers": {"memory": {"kind": "fake-recurrent"}}, "stack": ["memory"]}
    return design.load({"name": "small", "model": model})


@pytest.fixture
def corpus(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} and {i + 1} make {2 * i + 1}.\n" for i in range(900)))
    return load_corpus(text, cache=tmp_path / "cache")


def config(**changes):
    return TrainConfig(**{"steps": 6, "batch_size": 2, "length": 16, "evaluate_every": 3, "evaluate_batches": 2,
                          "checkpoint_every": 2, "optimiser": {"learning_rate": 0.01}} | changes)


def test_the_record(tmp_path, corpus):
    folder = tmp_path / "run"
    result = train_language(recipe(), corpus, config(), folder, progress="quiet")
    assert sorted(p.name for p in folder.iterdir()) == [
        ".lock", "checkpoints", "metrics.jsonl", "recipe.yaml", "result.json", "run.json", "train.log"]
    assert design.load(folder / "recipe.yaml").id == recipe().id
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["model"]["width"] == 16

    record = read_run(folder)
    assert record["recipe_id"] == recipe().id
    assert record["data"]["name"] == corpus.name
    assert {"source", "licence", "digest"} <= record["data"].keys()
    assert TrainConfig.model_validate(record["config"]) == config(threads=1, device="cpu")
    assert {"torch", "postformer", "cpu", "threads", "device"} <= record["environment"].keys()
    assert record["command"]

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["tokens"] for line in lines] == [32 * s for s in range(1, 7)]
    for line in lines:
        assert {"loss", "bits_per_byte", "lr", "grad_norm", "tokens_per_s", "elapsed_s"} <= line.keys()
        assert line["bits_per_byte"] == pytest.approx(line["loss"] / 0.6931472)
        assert ("validation_bits_per_byte" in line) == (line["step"] in (3, 6))

    assert result == read_result(folder)
    assert (result.status, result.step, result.tokens, result.reason) == ("finished", 6, 192, None)
    assert result.validation["bits_per_byte"] == lines[-1]["validation_bits_per_byte"]
    assert result.params == sum(p.numel() for p in FakeModel().parameters())
    assert result.flops_per_token == pytest.approx(recipe().cost().flops(16) / 16)
    assert result.state_bytes == recipe().cost().state_bytes(16)
    assert result.peak_memory_mb > 10
    assert "step 6/6" in (folder / "train.log").read_text()


def test_two_runs_in_one_directory(tmp_path, corpus):
    folder = tmp_path / "run"
    result = train_language(recipe(), corpus, config(), folder, progress="quiet")
    with pytest.raises(RunExists, match="this very run") as caught:
        train_language(recipe(), corpus, config(), folder, progress="quiet")
    assert f"--resume {folder}" in caught.value.remedy
    for other in ((recipe(8), config()), (recipe(), config(seed=1)), (recipe(), config(steps=7))):
        with pytest.raises(RunExists, match="another run"):
            train_language(other[0], corpus, other[1], folder, progress="quiet", resume=True)
    with pytest.raises(RunExists, match="seed is 0 there, 1 here"):
        train_language(recipe(), corpus, config(seed=1), folder, progress="quiet")
    assert resume(folder) == result
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(RunExists, match="not empty"):
        train_language(recipe(), corpus, config(), tmp_path / "full", progress="quiet")


def test_a_stopped_run_is_resumed_from_its_directory_alone(tmp_path, corpus, monkeypatch):
    monkeypatch.setenv("POSTFORMER_CACHE", str(tmp_path / "cache"))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_language(recipe(), corpus, config(), whole, progress="quiet")
    stopped = train_language(recipe(), corpus, config(time_limit=1e-6), broken, progress="quiet")
    assert (stopped.status, stopped.step, stopped.reason) == ("finished", 1, "time limit")
    assert resume(broken, progress="quiet", time_limit=1e-6).step == 2
    result = resume(broken, progress="quiet")
    assert (result.step, result.reason) == (6, None)
    models = [load_run(folder)[1] for folder in (whole, broken)]
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters()))
    assert result.validation == read_result(whole).validation


def test_resume_refuses_other_data_and_another_design(tmp_path, corpus, monkeypatch):
    monkeypatch.setenv("POSTFORMER_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "run"
    train_language(recipe(), corpus, config(time_limit=1e-6), folder, progress="quiet")
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace("width: 16", "width: 24"))
    with pytest.raises(TrainingError, match="not the design"):
        resume(folder, progress="quiet")
    (folder / "recipe.yaml").write_text(text)
    (tmp_path / "text.txt").write_text("something else\n" * 500)
    with pytest.raises(TrainingError, match="content has changed"):
        resume(folder, progress="quiet")
    with pytest.raises(TrainingError, match="holds no run"):
        resume(tmp_path / "cache")


def test_how_it_ended_is_written_when_it_ends_badly(tmp_path, corpus, monkeypatch):
    class Bad(FakeModel):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            return out._replace(logits=out.logits / 0)

    monkeypatch.setattr(run, "build_model", lambda r, seed: Bad())
    with pytest.raises(Diverged):
        train_language(recipe(), corpus, config(), tmp_path / "a", progress="quiet")
    result = read_result(tmp_path / "a")
    assert (result.status, result.step) == ("diverged", 0)
    assert "learning rate" in result.reason
    assert "Diverged" in (tmp_path / "a" / "train.log").read_text()

    class Interrupting(FakeModel):
        def forward(self, *args, **kwargs):
            raise Interrupted("stopped", "resume")

    monkeypatch.setattr(run, "build_model", lambda r, seed: Interrupting())
    with pytest.raises(Interrupted):
        train_language(recipe(), corpus, config(), tmp_path / "b", progress="quiet")
    assert read_result(tmp_path / "b").status == "interrupted"


def test_a_task(tmp_path):
    task = load("mqar", vocab=16, train=(16, 2), evaluate=((16, 2), (32, 3)))
    folder = tmp_path / "run"
    options = {"vocab": 16, "train": (16, 2), "evaluate": ((16, 2), (32, 3))}
    result = train_task(recipe(vocab=16), "mqar", None, config(), folder, options=options, progress="quiet")
    assert {"token_accuracy", "exact_match", "last_accuracy", "loss", "32x3/token_accuracy"} <= result.validation.keys()
    assert result.validation["token_accuracy"] == result.validation["16x2/token_accuracy"]
    assert result.context == 16
    _, model = load_run(folder)
    found = evaluate_task(model, task, [(16, 2)], batch_size=2, batches=4)
    assert found["16x2"]["token_accuracy"] == pytest.approx(result.validation["token_accuracy"])
    other = evaluate_task(model, task, [(16, 2)], batch_size=2, batches=4, stream="test")
    assert other["16x2"]["loss"] != found["16x2"]["loss"]
    (folder / "result.json").unlink()
    assert resume(folder, progress="quiet").step == 6  # options and settings survive the JSON
    with pytest.raises(TaskError, match="do not fit"):
        train_task(recipe(vocab=16), task, (4, 2), config(), tmp_path / "other", progress="quiet")
    with pytest.raises(ValueError, match=r"model.vocab=16"):
        train_task(recipe(vocab=8), task, None, config(), tmp_path / "other", progress="quiet")


def test_a_task_given_as_an_object_is_needed_again(tmp_path):
    task = load("mqar", vocab=16, train=(16, 2))
    folder = tmp_path / "run"
    train_task(recipe(vocab=16), task, [(16, 2), (16, 1)], config(time_limit=1e-6), folder, progress="quiet")
    with pytest.raises(TrainingError, match="given as an object"):
        resume(folder, progress="quiet")
    assert resume(folder, task=task, progress="quiet").step == 6


def test_bits_per_byte_of_a_whole_split(corpus):
    model = FakeModel()
    found = evaluate_split(model, corpus.validation, 16, 4)
    assert found["bytes"] == len(corpus.validation) - 1
    tokens = torch.from_numpy(corpus.validation[:1 + 16].astype("int64"))[None]
    first = evaluate_split(model, corpus.validation[:17], 16, 4)
    loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).logits[0], tokens[0, 1:])
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_a_plan_says_what_a_run_takes(corpus):
    before = recipe()
    made = plan(before, corpus_source(corpus, config()), config(tokens=3200, steps=None))
    params = sum(p.numel() for p in FakeModel().parameters())
    assert (made.params, made.steps, made.tokens) == (params, 100, 3200)
    assert made.weights == made.gradients == 4 * params
    assert made.optimiser >= 8 * params
    # At least the logits' probabilities and the hidden states of 2 rows of 16 tokens.
    assert made.activations >= 2 * 16 * (256 + 16) * 4
    assert made.peak_memory > made.weights + made.gradients + made.optimiser + made.activations
    assert made.seconds == pytest.approx(100 * made.seconds_per_step)
    half = plan(before, corpus_source(corpus, config()), config(accumulate=2))
    assert half.activations == made.activations // 2
    text = "\n".join(made.lines())
    assert f"{params:,}" in text
    assert "measured on two steps" in text


def test_a_plan_where_the_peak_cannot_be_measured(corpus, monkeypatch):
    monkeypatch.setattr("postformer.training.planning.reset_peak", lambda device: False)
    made = plan(recipe(), corpus_source(corpus, config()), config())
    assert made.peak_memory == made.weights + made.gradients + made.optimiser + made.activations
    assert "estimated" in "".join(made.lines())


def test_seeds_give_different_runs_and_the_same_seed_the_same(tmp_path, corpus):
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_language(recipe(), corpus, config(seed=seed), tmp_path / name, progress="quiet")
        weights.append(checkpoint.read_tensors(tmp_path / name / "checkpoints" / "step-6" / "model.safetensors")[0])
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    assert not torch.equal(weights[0]["inner.weight"], weights[2]["inner.weight"])


class UndeclaredDesign(Design):
    kind: Literal["fake-undeclared"] = "fake-undeclared"


@design.register(UndeclaredDesign)
class Undeclared(Mixer):
    """Its author declared no cost."""


def test_a_memory_that_declares_no_cost_trains_and_is_recorded(tmp_path, corpus):
    made = design.load({"name": "mine", "model": {"width": 16, "memory": {"kind": "fake-undeclared"}}})
    result = train_language(made, corpus, config(), tmp_path / "run", progress="quiet")
    assert result == read_result(tmp_path / "run")
    assert (result.status, result.flops_per_token, result.state_bytes) == ("finished", None, None)
    assert result.params == sum(p.numel() for p in FakeModel().parameters())


def test_trouble_with_the_record_does_not_hide_why_a_run_ended(tmp_path, corpus, monkeypatch):
    class Interrupting(FakeModel):
        def forward(self, *args, **kwargs):
            raise Interrupted("stopped", "resume")

    def broken(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(run, "build_model", lambda r, seed: Interrupting())
    monkeypatch.setattr(run, "_result", broken)
    with pytest.raises(Interrupted):
        train_language(recipe(), corpus, config(), tmp_path / "run", progress="quiet")


def test_a_design_too_large_for_the_memory_is_refused_before_anything_is_allocated(tmp_path, corpus, monkeypatch):
    def build(recipe, seed):
        raise AssertionError("built")

    monkeypatch.setattr(run, "build_model", build)
    monkeypatch.setattr("postformer.training.memory.available_memory", lambda device: 159)
    for act in (lambda: plan(recipe(), corpus_source(corpus, config()), config()),
                lambda: train_language(recipe(), corpus, config(), tmp_path / "run", progress="quiet")):
        with pytest.raises(OutOfMemory, match="parameters") as caught:
            act()
        assert "--width" in caught.value.remedy
    assert not (tmp_path / "run").exists()


def test_out_of_memory_while_building(corpus, monkeypatch):
    def build(recipe, seed):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes")

    monkeypatch.setattr(run, "build_model", build)
    with pytest.raises(OutOfMemory, match="out of memory"):
        plan(recipe(), corpus_source(corpus, config()), config())


def test_what_memory_is_available_is_known_here():
    assert available_memory(torch.device("cpu")) > 2**20


def test_the_model_of_a_directory_without_a_run(tmp_path):
    for folder, words in ((tmp_path / "nowhere", "no directory"), (tmp_path, "holds no run")):
        with pytest.raises(TrainingError, match=words):
            load_run(folder)


def test_a_training_that_is_stopped_says_so_once(tmp_path, corpus, monkeypatch, capsys):
    class Interrupting(FakeModel):
        def forward(self, *args, **kwargs):
            raise Interrupted("stopped by hand", "resume")

    monkeypatch.setattr(run, "build_model", lambda r, seed: Interrupting())
    with pytest.raises(Interrupted):
        train_language(recipe(), corpus, config(), tmp_path / "run", progress="plain")
    assert "stopped by hand" not in capsys.readouterr().err  # the error says it; the log keeps it
    assert "stopped by hand" in (tmp_path / "run" / "train.log").read_text()


def test_a_run_ends_when_its_task_is_solved(tmp_path):
    """`until` asks every evaluation setting, and a solved run is done: resuming returns what it has."""
    options = {"vocab": 8, "train": [[8, 1]], "evaluate": [[8, 1], [12, 2]]}
    solved = train_task(recipe(vocab=8), "mqar", None, config(steps=20, evaluate_every=5, until=0.0),
                        tmp_path / "a", options=options, progress="quiet")
    assert (solved.status, solved.reason, solved.step) == ("finished", "solved", 5)
    assert solved.validation["reached"] == min(solved.validation[f"{s}/token_accuracy"] for s in ("8x1", "12x2"))
    assert resume(tmp_path / "a") == solved
    (tmp_path / "a" / "result.json").unlink()  # as if killed between its last checkpoint and its result
    again = resume(tmp_path / "a")
    assert (again.reason, again.step, again.validation) == ("solved", 5, solved.validation)
    never = train_task(recipe(vocab=8), "mqar", None, config(steps=10, evaluate_every=5, until=1.1),
                       tmp_path / "b", options=options, progress="quiet")
    assert (never.reason, never.step) == (None, 10)
