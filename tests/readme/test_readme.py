"""The README's Python and commands run as written (the demo shortened by its --minutes)."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return tmp_path_factory.mktemp("readme")


def run(command, here):
    env = {**os.environ, "POSTFORMER_CACHE": str(here / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=here, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_link_leads_somewhere():
    root = Path(__file__).parents[2]
    for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.slow
def test_five_lines_of_python(here):
    code = re.search(r"```python\n(import postformer\n.*?)```", README, re.S)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 5
    code = code.replace("tokens=200_000", "tokens=50_000")
    out = run([sys.executable, "-c", code], here)
    assert out.startswith("def ")
    assert (here / "runs" / "gated-deltanet-stdlib" / "report.html").exists()


@pytest.mark.slow
def test_verbs(here):
    commands = re.findall(r"^\| `(postformer [^`]+)` \|", README, re.M)
    assert {c.split()[1] for c in commands} == {
        "demo", "list", "explain", "verify", "train", "generate", "gauntlet", "bench", "report", "doctor"}
    order = ("list", "explain", "verify", "train", "generate", "gauntlet", "report", "doctor")  # bench: tests/cli
    for verb in order:
        command = next(c for c in commands if c.split()[1] == verb)
        command = command.replace("500k", "30k").replace("RUN...", "runs/mamba2-stdlib")
        words = shlex.split(command)[1:]
        if verb == "generate":
            words += ["--tokens", "10"]
        if verb == "gauntlet":
            small = ("tokens=2048", "batch_size=8", "width=16", "head=8", "layers=1")
            words += ["--tasks", "mqar", "--seeds", "1", *(word for change in small for word in ("-s", change))]
        if verb == "report":
            words += ["--out", "page.html"]
        run([sys.executable, "-m", "postformer", *words], here)
    assert (here / "page.html").exists()
    assert (here / "runs" / "gauntlet" / "report.html").exists()


@pytest.mark.slow
def test_demo(here):
    out = run([sys.executable, "-m", "postformer", "demo", "--minutes", "0.3", "--out", "demo"], here)
    assert "report: demo/report.html" in out
    html = (here / "demo" / "report.html").read_text(encoding="utf-8")
    for word in ("gated-deltanet", "deltaproduct", "transformer", "mamba2", "<svg"):
        assert word in html
