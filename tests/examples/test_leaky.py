"""The README's example of a memory of one's own: verified, trained, decoded."""

import importlib.util
from pathlib import Path

import pytest
import torch

from postformer.design import load, registry
from postformer.model import build
from postformer.verify import verify

EXAMPLES = Path(__file__).parents[2] / "examples"


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
