"""The gauntlet from end to end: same numbers twice, failures that stay single cells, kills that lose nothing."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from postformer.study.asking import ask, entries
from postformer.study.cell import Cell
from postformer.study.gauntlet import run_gauntlet
from postformer.study.ledger import Ledger
from postformer.training import read_run

SMALL = ["tokens=2048", "batch_size=8", "width=16", "head=8", "layers=1", "test_batches=2", "evaluate_batches=2",
         "extend=0", "finalists=1"]
TASKS = '''
import os, time, torch
from postformer.task import Task, TaskBatch, Difficulties

class Same(Task):
    """Repeat the token."""
    name, vocab, difficulties = "same", 4, Difficulties(train=(8,), inside=(8,))
    def describe(self): return "Repeat the token."
    def chance(self, setting): return 1 / 4
    def check(self, setting): pass
    def generate(self, setting, batch_size, generator):
        tokens = torch.randint(4, (batch_size, setting), generator=generator)
        return TaskBatch(tokens, tokens)

class Crash(Same):
    def generate(self, setting, batch_size, generator): raise RuntimeError("the generator broke")

class Die(Same):
    def generate(self, setting, batch_size, generator): os._exit(3)

class Hang(Same):
    def generate(self, setting, batch_size, generator): time.sleep(1000)

class NaN(Same):
    def around(self, model):
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))
        return model
'''


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A package with tasks, as a user would install one; on the path of this process and of all workers."""
    place = tmp_path_factory.mktemp("site")
    (place / "odd_tasks.py").write_text(TASKS)
    info = place / "odd_tasks-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-tasks\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[postformer.tasks]\n" + "".join(
        f"{name.lower()} = odd_tasks:{name}\n" for name in ("Same", "Crash", "Die", "Hang", "NaN")))
    return place


@pytest.fixture
def visible(installed, monkeypatch):
    from postformer.task import registry

    monkeypatch.syspath_prepend(str(installed))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")]))
    registry._installed.cache_clear()
    yield
    registry._installed.cache_clear()


def quiet(line):
    pass


def test_a_users_task_and_the_same_numbers_twice(visible, tmp_path):
    found = []
    for name in ("a", "b"):
        plan = ask(["transformer", "gla"], tasks="same", seeds=2, changes=SMALL)
        found.append(run_gauntlet(plan, tmp_path / name, workers=2, costs=False, progress=quiet))
    for one, two in zip(found[0]["cells"], found[1]["cells"]):
        for a, b in zip(one["seeds"], two["seeds"]):
            assert a["test"] == b["test"]
            assert a["validation"] == b["validation"]
        assert one["sweep"] == two["sweep"]
    cell = found[0]["cells"][0]
    assert (cell["design"], cell["task"], cell["status"], len(cell["sweep"]), len(cell["seeds"])) == (
        "transformer", "same", "finished", 3, 2)
    assert cell["seeds"][0]["test"] != cell["seeds"][1]["test"]
    assert cell["params"] > 0
    assert cell["state_bytes"]["8"] > 0
    assert found[0]["tasks"][0]["settings"] == [
        {"setting": 8, "name": "8", "inside": True, "chance": 0.25, "shortcut": 0.25}]
    assert json.loads((tmp_path / "a" / "gauntlet.json").read_text()) == json.loads(json.dumps(found[0]))
    # The validation split chose the rate; what the test split says differs, being other problems.
    assert cell["seeds"][0]["validation"]["8/loss"] != cell["seeds"][0]["test"]["8"]["loss"]
    # A finished study is read, not run.
    began = time.monotonic()
    again = run_gauntlet(ask(["transformer", "gla"], tasks="same", seeds=2, changes=SMALL), tmp_path / "a",
                         costs=False, progress=lambda line: pytest.fail(line))
    assert again["cells"] == found[0]["cells"]
    assert time.monotonic() - began < 3
    # Exported and taken over elsewhere, it is finished there too.
    text = (tmp_path / "a" / "ledger.jsonl").read_text()
    other = run_gauntlet(ask(["transformer", "gla"], tasks="same", seeds=2, changes=SMALL), tmp_path / "c", merge=text,
                         costs=False, progress=lambda line: pytest.fail(line))
    assert other["cells"] == found[0]["cells"]


def test_a_task_that_breaks_is_one_failed_cell(visible, tmp_path):
    plan = ask(["gla"], tasks="crash,die,nan,same", seeds=1, changes=SMALL)
    lines = []
    found = run_gauntlet(plan, tmp_path / "g", workers=2, limit=300, costs=False, progress=lines.append)
    by_task = {cell["task"]: cell for cell in found["cells"]}
    assert by_task["same"]["status"] == "finished"
    for task, why in (("crash", "the generator broke"), ("die", "exit code 3"), ("nan", "loss is nan")):
        cell = by_task[task]
        assert cell["status"] == "failed"
        assert cell["seeds"] == []
        assert len(cell["failures"]) == 3
        assert why in cell["failures"][0]["why"], cell["failures"]
        assert (tmp_path / "g" / cell["failures"][0]["log"]).exists()
        assert any(f"{task} gla sweep" in line and "FAILED" in line for line in lines)
    assert found["ended"] is not None


def test_a_trial_that_hangs_is_stopped(visible, tmp_path):
    plan = ask(["gla"], tasks="hang", seeds=1, changes=SMALL)
    found = run_gauntlet(plan, tmp_path / "g", workers=3, limit=10, costs=False, progress=quiet)
    assert [f["why"] for f in found["cells"][0]["failures"]] == ["stopped after 10 s, which was its limit"] * 3


STUDY = ["gla", "--tasks", "same", "--seeds", "2", "--workers", "2", "--quiet", "-s", "tokens=24000"] + [
    word for change in SMALL[1:] for word in ("-s", change)]


def started(directory):
    return subprocess.Popen([sys.executable, "-m", "postformer", "gauntlet", *STUDY, "--out", str(directory)],
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)


def test_kills_lose_and_repeat_nothing(visible, tmp_path):
    """SIGKILL of the runner at 20 random moments, then two runners at once, against a study that was left alone."""
    draw, directory = random.Random(0), tmp_path / "g"
    known: dict = {}
    for _ in range(20):
        runner = started(directory)
        time.sleep(draw.uniform(0.5, 7))
        runner.send_signal(signal.SIGKILL)
        runner.wait()
        runner.stderr.close()
        if (directory / "ledger.sqlite").exists():
            with Ledger(directory / "ledger.sqlite") as ledger:
                outcomes = ledger.outcomes()
            assert {k: outcomes.get(k) for k in known} == known, "a finished trial was lost or made again"
            known = outcomes
        if len(known) == 5:
            break
    both = [started(directory), started(directory)]
    for runner in both:
        assert runner.wait(120) == 0, runner.stderr.read()
        runner.stderr.close()
    with Ledger(directory / "ledger.sqlite") as ledger:
        outcomes, trials = ledger.outcomes(), ledger.trials()
    assert {k: outcomes[k] for k in known} == known
    assert len(outcomes) == len(trials) == 5
    alone = tmp_path / "alone"
    changes = ["tokens=24000", *SMALL[1:]]
    run_gauntlet(ask(["gla"], tasks="same", seeds=2, changes=changes), alone, workers=2, costs=False, progress=quiet)
    with Ledger(alone / "ledger.sqlite") as ledger:
        for key, outcome in ledger.outcomes().items():
            for part in ("validation", "loss", "tokens"):
                assert outcomes[key].data["result"][part] == outcome.data["result"][part]
            assert outcomes[key].data.get("test") == outcome.data.get("test")


def test_what_a_trial_records(visible, tmp_path):
    plan = ask(["two=gla@model.width=16"], tasks="same", seeds=1, changes=[*SMALL, "rates=[0.001, 0.01, 0.1]"],
               command="postformer gauntlet gla")
    run_gauntlet(plan, tmp_path / "g", workers=1, costs=False, progress=quiet)
    runs = sorted((tmp_path / "g" / "trials").iterdir())
    assert len(runs) == 4
    run = read_run(runs[0])
    assert run["command"].startswith("postformer gauntlet gla")
    assert run["data"]["name"] == "same"
    assert run["config"]["threads"] == 1


def test_wrong_questions_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'params'"):
        ask(["gla"], match="parms")
    with pytest.raises(ValueError, match="Did you mean 'tokens'"):
        entries("standard", "mqar", ["tokns=3"])
    with pytest.raises(ValueError, match="no task is called 'mqra'"):
        entries("standard", "mqra")
    with pytest.raises(ValueError, match=r"mqar\.rates"):
        entries("standard", "mqar", ["mqar.rates=[0.1]"])
    with pytest.raises(ValueError, match="two designs are called gla"):
        ask(["gla", "gla"], "standard", "mqar")
    with pytest.raises(ValueError, match="Did you mean 'gated-deltanet'"):
        ask(["gated-deltanett"], "standard", "mqar")
    with pytest.raises(ValueError, match="Did you mean 'standard'"):
        entries("standrad")


def test_labels():
    plan = ask(["mine=deltaproduct@model.width=64", "deltaproduct@model.mixers.memory.update.rate=sigmoid", "gla"],
               "standard", "mqar")
    assert list(plan.designs) == ["mine", "deltaproduct@model.mixers.memory.update.rate=sigmoid", "gla"]
    assert [c.recipe.model.width for c in plan.cells] == [32, 32, 32]


@pytest.mark.parametrize("on", ["params", "flops", "state"])
def test_matched_designs_are_equal(on):
    plan = ask(["transformer", "gated-deltanet", "hgrn2"], "standard", "mqar", match=on)
    from postformer.study.match import amount

    amounts = [amount(c.recipe, c.entry, on) for c in plan.cells]
    assert max(amounts) / min(amounts) < 1.1


def test_a_ray_cluster_gives_the_same(visible, installed, tmp_path):
    """A local cluster, in a process of its own: the same trials, the same ledger."""
    pytest.importorskip("ray")
    words = [sys.executable, "-m", "postformer", "gauntlet", "gla", "--tasks", "same,crash", "--seeds", "1", "--quiet"]
    words += [word for change in SMALL for word in ("-s", change)]
    texts = []
    for workers in ("2", "ray"):
        directory = tmp_path / workers
        subprocess.run([*words, "--workers", workers, "--out", str(directory)], check=True, capture_output=True)
        found = json.loads((directory / "gauntlet.json").read_text())
        assert [cell["status"] for cell in found["cells"]] == ["finished", "failed"]
        texts.append([(c["sweep"], [s["test"] for s in c["seeds"]], [f["why"] for f in c["failures"]])
                      for c in found["cells"]])
    assert texts[0] == texts[1]


def test_equal_flops_give_the_dearer_design_fewer_tokens():
    from postformer.study.match import amount

    plan = ask(["transformer", "deltaproduct"], "standard", "mqar", changes=["equal=flops"])
    one, two = plan.cells
    spent = [c.tokens * amount(c.recipe, c.entry, "flops") for c in (one, two)]
    assert spent[0] == pytest.approx(spent[1], rel=1e-4)
    assert one.tokens == one.entry.tokens > two.tokens
    assert two.wanted({})[0].tokens == two.tokens // 4


def test_trials_that_count_may_begin_at_another_seed(monkeypatch):
    monkeypatch.setattr(Cell, "rate", lambda self, outcomes: 0.01)

    def finals(*changes):
        return ask(["lstm"], "sprint", "s3", seeds=2, changes=changes).cells[0].finals({})

    usual, other = finals(), finals("s3.first_seed=100")
    assert [t.seed for t in usual] == [0, 1]
    assert [t.seed for t in other] == [100, 101]
    assert finals("s3.first_seed=1")[0].id == usual[1].id  # nothing that a result depends on, but for the seed
