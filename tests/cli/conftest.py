"""Run the command line as a user does: a process, its output, its exit code."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out.strip().splitlines()[-1])


@pytest.fixture
def cli(tmp_path):
    def run(*args: str, timeout: float = 120, **env: str) -> Done:
        done = subprocess.run(
            [sys.executable, "-m", "postformer", *map(str, args)], capture_output=True, text=True, timeout=timeout,
            cwd=tmp_path,
            env={**os.environ, "POSTFORMER_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", **env})
        return Done(done.returncode, done.stdout, done.stderr)
    return run


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} of a small corpus, {i * i} words\n" for i in range(900)), encoding="utf-8")
    return path


@pytest.fixture
def inside(tmp_path, monkeypatch, capsys):
    """The same in this process: faster, for what needs no process of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POSTFORMER_CACHE", str(tmp_path / "cache"))

    def run(*args: str, verbs=None) -> Done:
        from postformer.cli import main, trouble

        monkeypatch.setattr(sys, "argv", ["postformer", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            trouble.run(verbs or main.app)
        out, err = capsys.readouterr()
        return Done(caught.value.code, out, err)
    return run
