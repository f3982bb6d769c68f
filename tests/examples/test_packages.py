"""The example packages, as a user meets them: installed by pip, verified, trained and read from by the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
PACKAGES = {"leaky": "leaky", "coupled": "coupled", "log-cosh": "deep"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """(environment that finds the packages, an empty directory)"""
    folder = tmp_path_factory.mktemp("packages")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade"]
    for name in PACKAGES:
        done = subprocess.run([*pip, "--target", folder / name, EXAMPLES / name], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    path = os.pathsep.join(str(folder / name) for name in PACKAGES)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "POSTFORMER_CACHE": str(folder / "cache")}, folder


def run(installed, *words):
    env, folder = installed
    done = subprocess.run([sys.executable, "-m", "postformer", *map(str, words)], env=env, cwd=folder, text=True,
                          capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGES)
def test_it_is_verified_by_its_entry_point(installed, name):
    recipe = EXAMPLES / name / f"{name}.yaml"
    told = json.loads(run(installed, "verify", recipe, "--json").splitlines()[-1])
    (result,) = told["recipes"]
    assert told["passed"]
    assert len(result["checks"]) >= 20
    assert all(c["passed"] for c in result["checks"]), [c for c in result["checks"] if not c["passed"]]
    notes = " ".join(c["note"] for c in result["checks"])
    assert ("leaky runs in blocks: state [32]: one factor for all" in notes) == (name == "leaky")


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGES)
def test_it_trains_and_generates(installed, name):
    _, folder = installed
    text = folder / "text"
    text.mkdir(exist_ok=True)
    (text / "a.txt").write_text("the cat sat on the mat and the dog sat on the log. " * 2000)
    recipe = EXAMPLES / name / f"{name}.yaml"
    few = ("steps=25", "batch_size=4", "length=128", "optimiser.learning_rate=0.01")
    run(installed, "train", recipe, "--data", text, "--width", 32, "--out", folder / f"run-{name}",
        *(word for item in few for word in ("-s", f"train.{item}")))
    losses = [json.loads(line) for line in (folder / f"run-{name}" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in losses if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    assert run(installed, "generate", folder / f"run-{name}", "--prompt", "the cat", "--tokens", 8)


@pytest.mark.parametrize("name", ["coupled", "log-cosh"])
def test_it_is_short(name):
    code = next((EXAMPLES / name).glob("*.py")).read_text(encoding="utf-8").split('"""', 2)[2]
    code = code.split("    @classmethod")[0]
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith(("from", "import"))]
    assert len(lines) <= {"coupled": 27, "log-cosh": 6}[name]
