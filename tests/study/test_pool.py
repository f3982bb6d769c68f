"""The pool and the demo's record: failures stay with their job, and a rerun repeats nothing that is finished."""

import json
import sys

import pytest

from postformer.study import demo as module
from postformer.study.contenders import CONTENDERS, TRIALS, contender, trial
from postformer.study.demo import run_demo, run_name
from postformer.study.pool import Pool


def run_jobs(tmp_path, jobs, workers=1):
    found, queue = {}, iter(jobs)
    with Pool(workers, tmp_path / "logs") as pool:
        pool.run(lambda: next(queue, None), lambda job, outcome: found.__setitem__(job["name"], outcome))
    return found


@pytest.fixture
def echo(monkeypatch, tmp_path):
    """A pool whose workers are a few lines of Python: they answer, crash or hang as the job says."""
    script = tmp_path / "echo.py"
    script.write_text(
        "import json, os, sys, time\n"
        "for line in sys.stdin:\n"
        "    job = json.loads(line)\n"
        "    if job['do'] == 'crash': os._exit(7)\n"
        "    if job['do'] == 'hang': time.sleep(60)\n"
        "    print(json.dumps({'pid': os.getpid()}), flush=True)\n"
    )
    import subprocess

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda args, **kw: popen([sys.executable, str(script)], **kw))


@pytest.mark.usefixtures("echo")
def test_a_crash_and_a_hang_cost_only_their_own_job(tmp_path):
    jobs = [
        {"name": "a", "do": "answer", "limit": 30}, {"name": "b", "do": "crash", "limit": 30},
        {"name": "c", "do": "answer", "limit": 30}, {"name": "d", "do": "hang", "limit": 0.5},
        {"name": "e", "do": "answer", "limit": 30},
    ]  # fmt: skip
    found = run_jobs(tmp_path, jobs)
    assert found["b"] == {"error": "its process ended (exit code 7); see logs/worker-0.log"}
    assert "stopped after 0 s" in found["d"]["error"]
    pids = [found[name]["pid"] for name in "ace"]
    assert len(set(pids)) == 3  # a new process after the crash, and one after the hang


@pytest.mark.usefixtures("echo")
def test_two_workers_share_the_queue(tmp_path):
    found = run_jobs(tmp_path, [{"name": str(i), "do": "answer", "limit": 30} for i in range(12)], workers=2)
    assert len(found) == 12
    assert len({outcome["pid"] for outcome in found.values()}) <= 2


def test_every_contender_builds_in_every_trial_at_the_size_that_the_design_declares():
    from postformer.model import build

    for test in TRIALS:
        for one in test.contenders():
            recipe = test.recipe(one)
            assert recipe.name == one.name
            assert sum(p.numel() for p in build(recipe.model).parameters()) == recipe.cost().params
    params = [trial("text").recipe(c).cost().params for c in CONTENDERS]
    assert max(params) < 1.25 * min(params)


def test_the_tracking_test_is_one_layer_without_local_mixing():
    test = trial("s3")
    assert list(test.left_out()) == ["hybrid"]
    for one in test.contenders():
        model = test.recipe(one).model
        assert len(model.stack) == 1
        mixer = model.mixers[one.mixer]
        assert getattr(mixer, "local", None) is None or mixer.local.kind == "none"
    product = test.recipe(contender("deltaproduct")).model.mixers["memory"]
    assert (product.update.steps, product.rate) == (2, "double-sigmoid")
    assert test.recipe(contender("mamba2 (state 4)")).model.mixers["mamba"].heads.dim_key == 4


def test_run_directories_have_plain_names():
    assert run_name("mqar", "mamba2 (state 4)") == "mqar-mamba2-state-4"


def test_a_demo_is_not_mixed_with_one_of_other_arguments(tmp_path):
    asked = {"minutes": 4, "seed": 0, "contexts": [128], "corpus": "stdlib"}
    (tmp_path / "plan.json").write_text(json.dumps({"asked": asked, "elapsed_s": 1.0}))
    with pytest.raises(ValueError, match="choose another directory"):
        run_demo(tmp_path, minutes=4, seed=1)
    with pytest.raises(ValueError, match="positive"):
        run_demo(tmp_path, minutes=0)


@pytest.fixture
def fake_pool(monkeypatch):
    """Runs the demo's jobs without processes: answers at once, fails what is told to fail, and counts."""
    class Fake:
        given: list = []
        fail: set = set()

        def __init__(self, workers, logs):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def remaining(self):
            return []

        def run(self, take, done):
            while (job := take()) is not None:
                self.given.append(job)
                done(job, self.answer(job))

        def answer(self, job):
            if (job.get("trial"), job["contender"]) in self.fail:
                return {"error": "Diverged: the loss is nan"}
            if job["kind"] == "probe":
                return {"per_step": {key: 0.01 for key in job["trials"]}}
            if job["kind"] == "decode":
                return {"points": [{"context": c, "declared_bytes": 8, "measured_bytes": 8, "seconds_per_token": 1e-3}
                                   for c in job["contexts"]]}  # fmt: skip
            if job["kind"] == "train":
                test, directory = trial(job["trial"]), module.Path(job["directory"])
                scores = {f"{'x'.join(map(str, module._listed(s)))}/token_accuracy": 0.5 for s in test.settings}
                result = {
                    "status": "finished", "recipe_id": "00", "params": 1, "flops_per_token": 2.0, "step": job["steps"],
                    "steps": job["steps"], "tokens": 100, "tokens_per_s": 3.0, "elapsed_s": job["expected"],
                    "validation": scores or {"bits_per_byte": 2.5},
                }  # fmt: skip
                directory.mkdir(parents=True)
                (directory / "result.json").write_text(json.dumps(result))
                return {"result": result}
            return {}

    monkeypatch.setattr(module, "Pool", Fake)
    return Fake


def test_a_demo_records_what_failed_and_does_not_repeat_what_finished(tmp_path, fake_pool):
    fake_pool.given, fake_pool.fail = [], {("s3", "deltaproduct")}
    demo = run_demo(tmp_path, minutes=4, workers=2, quiet=True)
    runs = {(t["key"], r["architecture"]): r for t in demo["tasks"] for r in t["runs"]}
    assert runs["s3", "deltaproduct"]["status"] == "failed"
    assert "the loss is nan" in runs["s3", "deltaproduct"]["reason"]
    assert sum(r["status"] == "done" for r in runs.values()) == 13
    for key in ("s3", "mqar", "text"):
        assert len({job["steps"] for job in fake_pool.given if job["kind"] == "train" and job["trial"] == key}) == 1
    assert [p["at"] for p in runs["mqar", "hybrid"]["points"]] == [2, 4, 8, 16]
    assert runs["mqar", "transformer"]["points"][0]["state_bytes"] < runs["mqar", "transformer"]["state_bytes"]

    fake_pool.given, fake_pool.fail = [], set()
    demo = run_demo(tmp_path, minutes=4, workers=2, quiet=True)
    assert [(job["kind"], job["contender"]) for job in fake_pool.given] == [("train", "deltaproduct")]
    assert all(r["status"] == "done" for t in demo["tasks"] for r in t["runs"])
    assert json.loads((tmp_path / "demo.json").read_text()) == demo


@pytest.mark.slow
def test_a_real_demo_of_a_few_seconds(tmp_path):
    """Everything for real, far too short to learn anything: all runs finish, and declared bytes are measured bytes."""
    (tmp_path / "text.txt").write_text("def add(a, b):\n    return a + b\n" * 4000)
    lines = []
    demo = run_demo(
        tmp_path / "demo", minutes=0.2, contexts=(32, 128), corpus=str(tmp_path / "text.txt"), progress=lines.append
    )
    assert [r for t in demo["tasks"] for r in t["runs"] if r["status"] != "done"] == []
    for run in demo["decode"]["runs"]:
        assert [p["context"] for p in run["points"]] == [32, 128]
        assert all(p["declared_bytes"] == p["measured_bytes"] for p in run["points"])
    growing = {r["architecture"]: r["points"][1]["declared_bytes"] > r["points"][0]["declared_bytes"]
               for r in demo["decode"]["runs"]}  # fmt: skip
    assert growing == {
        "transformer": True, "mamba2 (state 4)": False, "gated-deltanet": False, "deltaproduct": False, "hybrid": True
    }  # fmt: skip
    assert any(line.startswith("train s3 deltaproduct") for line in lines)
    again = run_demo(tmp_path / "demo", minutes=0.2, contexts=(32, 128), corpus=str(tmp_path / "text.txt"), quiet=True)
    assert again["tasks"] == demo["tasks"]
