"""The README's example of a memory of one's own: verified, trained, decoded."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from postformer.design import load, registry
from postformer.model import build
from postformer.verify import verify

EXAMPLES = Path(__file__).parents[2] / "examples" / "leaky"


@pytest.fixture
def leaky():
    spec = importlib.util.spec_from_file_location("leaky", EXAMPLES / "leaky.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    registry._classes.pop("leaky")


def test_it_keeps_the_contract(leaky):
    result = verify(str(EXAMPLES / "leaky.yaml"))
    assert result.passed, [r for r in result.results if r.passed is False]


def test_it_trains_and_decodes(leaky):
    model = build(load(EXAMPLES / "leaky.yaml").model)
    tokens = torch.arange(64).repeat(4, 2) % 17
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_it_is_short():
    code = (EXAMPLES / "leaky.py").read_text().split('"""', 2)[2]
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith(("from", "import"))]
    memory = [line for line in lines if "cost" not in line]
    assert len(memory) <= 23


@pytest.mark.slow
def test_it_installs_as_a_package(tmp_path):
    """As a user does it: pip, then the command line finds the kind by its entry point."""
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target]
    subprocess.run([*pip, EXAMPLES], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "postformer", "verify", EXAMPLES / "leaky.yaml", "--only", "causal"], text=True,
        capture_output=True, env={**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "ok" in done.stdout
