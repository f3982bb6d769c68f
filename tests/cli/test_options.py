"""Options that contradict each other or say nothing, and what verbs share with Python."""

import json

import pytest

import postformer
from postformer.training import TrainingError
from postformer.training.work import configured, run_directory, work

SMALL = ("-s", "train.batch_size=4", "-s", "train.length=32", "-s", "train.steps=2", "-s", "train.evaluate_batches=1")
TINY = ("--width", "32", "--layers", "1")


def said(done, code, *words):
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    for word in words:
        assert word in " ".join(done.err.replace("│", " ").split()), done.err


@pytest.mark.parametrize(("items", "words"), [
    (["train.x=[1"], ["train.x", "not a YAML value"]),
    (["train.optimiser=x", "train.optimiser.learning_rate=1"], ["train.optimiser", "'x'", "no fields"]),
    (["train.optimiser=x"], ["train.optimiser", "'x'"]),
    (["train.batchsize=1"], ["train.batchsize", "Did you mean 'batch_size'?"]),
    (["train.optimiser.learning=1"], ["train.optimiser.learning", "learning_rate"]),
    (["train.batch_size"], ["write path.to.field=value"]),
    (["train.batch_size=0"], ["train.batch_size", "greater than or equal to 1", "got 0"]),
])
def test_overrides_of_the_training(inside, items, words):
    said(inside("train", "transformer", *(part for item in items for part in ("-s", item))), 2, *words)


def test_a_mapping_can_be_refined(inside):
    from postformer.cli.console import split_overrides

    design, train = split_overrides(["train.optimiser={kind: muon}", "model.vocab=9", "train.optimiser.eps=1"])
    assert (design, train) == (["model.vocab=9"], {"optimiser": {"kind": "muon", "eps": 1}})


@pytest.mark.parametrize("tokens", ["inf", "nan", "-inf", "0", "1e999", "many"])
def test_tokens(inside, tokens):
    said(inside("train", "transformer", f"--tokens={tokens}"), 2, "--tokens", "500k")


@pytest.mark.parametrize("given", [
    ("gated-deltanet",), ("--data", "stdlib"), ("--out", "x"), ("--tokens", "2M"), ("--width", "64"),
    ("--layers", "2"), ("-s", "train.steps=3"), ("--device", "cpu"), ("--dry-run",)])
def test_resume_refuses_what_it_would_ignore(inside, given):
    names = {"-s": "--set", "gated-deltanet": "gated-deltanet"}
    said(inside("train", "--resume", "run", *given), 2, names.get(given[0], given[0]), "--resume")


def test_resuming_what_is_no_run(inside):
    said(inside("train", "--resume", "nowhere"), 2, "no directory nowhere")


def test_a_design_that_cannot_fit_is_refused(inside, text):
    said(inside("train", "transformer", "--data", text, "--width", "1000000000", "--dry-run"), 4, "parameters",
         "--width")


def test_names_of_run_directories(tmp_path, monkeypatch):
    (tmp_path / "my texts").mkdir()
    monkeypatch.chdir(tmp_path / "my texts")
    assert str(run_directory("leaky", ".")) == "runs/leaky-my-texts"
    assert str(run_directory("leaky", "stdlib")) == "runs/leaky-stdlib"
    assert str(run_directory("leaky", "task:group-s3")) == "runs/leaky-group-s3"
    assert str(run_directory("leaky", "/a/b.txt")) == "runs/leaky-b.txt"
    assert str(run_directory("leaky", "/")) == "runs/leaky-data"
    assert run_directory("../up/and over", "x").parent.name == "runs"


def test_defaults_of_a_training_by_hand():
    made = configured({})
    assert (made.tokens, made.checkpoint_every, made.evaluate_every) == (2_000_000, 200, 200)
    assert configured({"steps": 3, "evaluate_every": None}).evaluate_every is None


def test_a_task_fits_the_vocabulary_unless_the_recipe_states_one():
    assert work(postformer.load("transformer", (), 32, 1).recipe, "task:group-s3").recipe.model.vocab < 256
    stated = postformer.load("transformer", ["model.vocab=300"], 32, 1).recipe
    assert work(stated, "task:group-s3").recipe.model.vocab == 300


def test_python_trains_on_a_task_and_generates_no_text_from_it(inside, tmp_path):
    made = postformer.load("transformer", (), 32, 1).train(
        "task:group-s3", steps=1, batch_size=2, evaluate_batches=1, progress="quiet")
    assert made.directory.name == "transformer-group-s3"
    assert made.result.status == "finished"
    with pytest.raises(ValueError, match="on the task group-s3, not on text"):
        made.generate("def ")
    said(inside("generate", made.directory), 2, "on the task group-s3")


@pytest.fixture
def trained(inside, text):
    assert inside("train", "transformer", *TINY, "--data", text, "--out", "run", *SMALL).code == 0
    return postformer.Run("run")


def test_generate_checks_before_it_writes_and_agrees_with_python(inside, trained, tmp_path):
    for option, words in ((("--top-p", "2"), "top_p"), (("--prompt", ""), "prompt is empty"),
                          (("--temperature", "nan"), "temperature")):
        done = inside("generate", "run", *option)
        said(done, 2, words)
        assert done.out == ""
    for tokens in (0, -3):
        assert inside("generate", "run", "--tokens", tokens).code == 2
        with pytest.raises(ValueError, match="at least 1"):
            trained.generate("a", tokens)
    with pytest.raises(ValueError, match="prompt is empty"):
        trained.generate("")
    done = inside("generate", "run", "--prompt", "line", "--tokens", "9", "--json")
    assert trained.generate("line", 9) == "line" + done.json["text"]
    drawn = ("--prompt", "line", "--tokens", "60", "--json", "-s", "top_k=3", "-s", "min_p=0.01", "-s",
             "repetition_penalty=1.1")
    done = inside("generate", "run", *drawn)
    assert trained.generate("line", 60, top_k=3, min_p=0.01, repetition_penalty=1.1) == "line" + done.json["text"]
    text = done.json["text"]
    end = next(c for c in text[5:] if c.isascii() and c.isprintable())
    cut = inside("generate", "run", *drawn, "-s", f"stop={json.dumps([end])}")
    assert cut.json["text"] == text[:text.index(end)]
    said(inside("generate", "run", "-s", "top_q=3"), 2, "top_q", "top_k, ")
    said(inside("generate", "nowhere"), 2, "no directory nowhere")
    said(inside("generate", tmp_path), 2, "holds no run")
    with pytest.raises(TrainingError, match="no directory nowhere"):
        postformer.Run("nowhere")


def test_generate_needs_a_vocabulary_of_bytes(inside, text):
    assert inside("train", "transformer", *TINY, "--data", text, "--out", "run", *SMALL, "-s",
                  "model.vocab=300").code == 0
    said(inside("generate", "run"), 2, "vocabulary of 300", "model.vocab=256")


def test_report_tells_what_it_could_not_read(inside, trained):
    done = inside("report", "run", "nowhere", "--json")
    said(done, 0, "warning: nowhere has nothing to show")
    assert done.json["missing"] == ["nowhere"]
    assert inside("report", "run", "--json").json["missing"] == []


MIXED = """
name: mixed
model:
  width: 32
  mixers: {ff: {kind: swiglu}}
  layers:
    a: [{use: {kind: attention}}, {use: ff}]
    b: [{use: block}]
  shared:
    block: {layer: [{use: {kind: chain, of: [{kind: envelope, of: {kind: cell}}, {kind: attention}]}}], copies: 2}
  stack: [a, b, b]
"""


def test_explain_shows_mixers_wherever_they_are_written(inside, tmp_path):
    (tmp_path / "mixed.yaml").write_text(MIXED)
    done = inside("explain", "mixed.yaml", "--json")
    assert done.code == 0, done.err
    block = "shared.block.layer.0"
    assert list(done.json["memories"]) == ["layers.a.0", f"{block}.of.0.of", f"{block}.of.1"]
    assert "1 x  attention  then  ff (swiglu)" in done.out
    assert "2 x  block (shared)" in done.out
    assert "shared block block, 2 copies:  chain" in done.out


def test_explain_without_a_declared_cost(inside, tmp_path):
    from typing import Literal

    from postformer.contract.mixer import Mixer
    from postformer.design import Design, register

    class SilentDesign(Design):
        kind: Literal["silent-about-cost"] = "silent-about-cost"

    @register(SilentDesign)
    class Silent(Mixer):
        """Its author declared no cost."""

    (tmp_path / "mine.yaml").write_text("name: mine\nmodel: {width: 32, memory: {kind: silent-about-cost}}\n")
    done = inside("explain", "mine.yaml", "--json")
    assert done.code == 0, done.err
    assert "cost: not declared by kind 'silent-about-cost'" in done.out
    assert done.json["params"] is None
    assert "cost not declared" in repr(postformer.load("mine.yaml"))
    assert json.dumps(done.json)


STAGES = "stages:\n  - train: {steps: 2}\n  - {surgery: {kind: grow, how: identity, factor: 2}, train: {steps: 3}}\n"


def test_stages(inside, tmp_path, text):
    (tmp_path / "stages.yaml").write_text(STAGES)
    asked = ("train", "transformer", "--data", text, *TINY, *SMALL[:4], "-s", "train.evaluate_batches=1", "--stages",
             "stages.yaml", "--out", "run", "--quiet", "--json")
    planned = json.loads(inside(*asked, "--dry-run").out.splitlines()[-1])
    assert [stage["steps"] for stage in planned["stages"]] == [2, 3]
    one, two = (stage["params"] for stage in planned["stages"])
    assert two > 1.5 * one
    done = inside(*asked)
    assert done.code == 0, done.err
    result = json.loads(done.out.splitlines()[-1])
    assert (result["step"], result["params"], result["directory"]) == (3, two, "run/stage-1")
    assert json.loads(inside("train", "--resume", "run", "--json").out.splitlines()[-1])["step"] == 3
    assert inside("generate", "run", "--tokens", "3").code == 0
    said(inside(*asked), 2, "already holds this very training", "--resume run")


@pytest.mark.parametrize(("more", "words"), [
    (("--stages", "none.yaml"), ["none.yaml", "cannot read the stages"]),
    (("--stages", "stages.yaml", "--tokens", "2k"), ["--tokens", "says how long each stage is"]),
    (("--stages", "stages.yaml", "-s", "train.stepz=3"), ["stages.0.train.stepz", "Did you mean 'steps'?"]),
    (("--stages", "stages.yaml", "--layers", "3", "-s", "model.mixers.feedforward.kind=swigl"), ["swigl"]),
])
def test_wrong_stages(inside, tmp_path, text, more, words):
    (tmp_path / "stages.yaml").write_text(STAGES)
    said(inside("train", "transformer", "--data", text, "--width", "32", *more), 2, *words)
    assert not (tmp_path / "runs").exists()
