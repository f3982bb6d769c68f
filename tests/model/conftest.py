import pytest
import torch

from postformer.design import load
from postformer.model import build

torch.set_num_threads(1)


@pytest.fixture
def small():
    """small(name) -> the recipe at width 32 with at most two layers (one of each kind), built in fp64."""
    def make(name: str, seed: int = 0):
        recipe = load(name, width=32, layers=max(2, len(set(load(name).model.stack))))
        return build(recipe.model, seed).double()
    return make
