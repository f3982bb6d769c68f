"""What a model publishes, seen while it generates: recorded steps, stepped ones and a whole pass say the same."""

import pytest
import torch

from postformer.design import load
from postformer.kernels import use
from postformer.model import build
from postformer.sampling import Policy, generate, stream

RECIPE = {"name": "unsure", "model": {"width": 32, "vocab": 40, "mixers": {
    "memory": {"kind": "filter", "heads": {"value": 2, "dim_key": 8}, "local": "conv3",
               "retention": {"per": "head", "gate": "mamba"}}, "feedforward": {"kind": "swiglu"}},
    "layers": {"l": [{"use": "memory", "publish": {"doubt": "variance"}}, {"use": "feedforward"}]}, "stack": ["l"]}}
GREEDY = Policy(temperature=0)


@pytest.fixture(scope="module")
def model():
    return build(load(RECIPE).model).eval()


def test_it_is_what_a_whole_pass_publishes(model):
    prompt = torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(0))
    made = generate(model, prompt, GREEDY, 20, watch=["doubt"])
    with torch.no_grad():
        whole = model(made.tokens).published["doubt"]
    watched = made.trace.watched["doubt"]
    assert watched.shape == (3, 20, 2)
    assert torch.allclose(watched, whole[:, 8:-1], atol=1e-5)
    assert watched.std(1).max() > 1e-3
    with use(backend="parallel"):
        eager = generate(model, prompt, GREEDY, 20, watch=["doubt"]).trace.watched["doubt"]
    assert torch.allclose(watched, eager, atol=1e-5)
    pieces = [piece.watched["doubt"] for piece in stream(model, prompt, GREEDY, 20, watch=["doubt"])]
    assert torch.equal(torch.stack(pieces, 1), watched)


def test_it_goes_on_after_a_prefix(model):
    prompt = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    whole = generate(model, prompt, GREEDY, 12, watch=["doubt"]).trace
    first = generate(model, prompt, GREEDY, 5)
    rest = generate(model, first.trace.after, GREEDY, 7, watch=["doubt"]).trace
    assert torch.allclose(rest.watched["doubt"], whole.watched["doubt"][:, 5:], atol=1e-5)
    assert not first.trace.watched


def test_a_name_that_nothing_publishes_is_refused(model):
    prompt = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="Did you mean 'doubt'"):
        generate(model, prompt, GREEDY, 2, watch=["doubts"])
    after = generate(model, prompt, GREEDY, 2).trace.after
    with pytest.raises(ValueError, match="publishes nothing per token as 'variance'"):
        generate(model, after, GREEDY, 2, watch=["variance"])
