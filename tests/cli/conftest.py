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
