import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from postformer.data import load_corpus
from postformer.objective import Batch

# importlib import mode keeps test folders off sys.path; the helpers are loaded by file.
for helper in ("fake", "session"):
    if helper not in sys.modules:
        spec = importlib.util.spec_from_file_location(helper, Path(__file__).parent / f"{helper}.py")
        sys.modules[helper] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[helper])


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def batch_at():
    """Sums of small random steps: something to learn."""
    def at(step, batch=4, length=12):
        generator = torch.Generator().manual_seed(step)
        return Batch.windows(torch.randint(1, 4, (batch, length + 1), generator=generator).cumsum(1) % 256)
    return at


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTFORMER_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} and {i + 1} make {2 * i + 1}.\n" for i in range(900)))
    return load_corpus(text)
