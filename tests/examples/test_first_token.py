"""The example of a task of one's own, as a user meets it: installed by pip, trained on in a gauntlet, in its report."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from postformer.task import IGNORE, TaskError, seeded

EXAMPLE = Path(__file__).parents[2] / "examples" / "first-token"
SMALL = ("tokens=2048", "batch_size=8", "width=16", "head=8", "layers=1")


@pytest.fixture(scope="module")
def task():
    spec = importlib.util.spec_from_file_location("first_token", EXAMPLE / "first_token.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FirstToken()


def test_its_answer_is_the_first_token(task):
    batch = task.batch(9, 300, seeded(0, "train", 0))
    assert bool((batch.targets[:, :-1] == IGNORE).all())
    assert torch.equal(batch.targets[:, -1], batch.tokens[:, 0])
    guessed = task.score(task.guess(batch, seeded(1)), batch)["token_accuracy"]
    assert guessed == pytest.approx(task.chance(9), abs=0.05)
    with pytest.raises(TaskError, match="at least 2"):
        task.batch(1, 4, seeded(0))


def test_it_is_short():
    code = (EXAMPLE / "first_token.py").read_text(encoding="utf-8").split('"""', 2)[2]
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith(("from", "import"))]
    assert len([line for line in lines if '"""' not in line]) <= 20


@pytest.mark.slow
def test_a_gauntlet_on_it(tmp_path):
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, EXAMPLE]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = ["gauntlet", "transformer", "--tasks", "first-token", "--seeds", "1", "--workers", "1", "--out", "study"]
    words += [word for change in SMALL for word in ("-s", change)]
    env = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "postformer", *words, "--json"], env=env, cwd=tmp_path, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["failed"] == 0
    html = (tmp_path / told["report"]).read_text(encoding="utf-8")
    assert re.search(r"<h3>first-token\b", html)
    assert "Name the first token of a random sequence at its end." in html
    (cell,) = json.loads((tmp_path / "study" / "gauntlet.json").read_text(encoding="utf-8"))["cells"]
    (seed,) = cell["seeds"]
    assert set(seed["test"]) == {"8", "32", "64", "128"}
