"""The variance that filter memories publish, read off a model that does not publish it."""

import pytest
import torch

from postformer.contract.context import Context
from postformer.design import load as load_design
from postformer.model import build
from postformer.probe.variance import variance


def model(publish=False, **memory):
    data = {"kind": "filter", "heads": {"value": 2, "dim_key": 4}, "local": "conv3", **memory}
    layer = [{"use": "memory", **({"publish": {"doubt": "variance"}} if publish else {})}, {"use": "ff"}]
    return build(load_design({"name": "m", "model": {
        "width": 16, "mixers": {"memory": data, "ff": {"kind": "swiglu"}}, "layers": {"a": layer, "b": layer[1:]},
        "stack": ["a", "b"] if publish else ["a", "a", "b"]}}).model)


@pytest.mark.parametrize("covariance", ["full", "diagonal", "isotropic", "mean-field", "information"])
def test_it_is_what_the_memory_publishes_where_the_design_asks_for_it(covariance):
    tokens = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    boundary = torch.zeros(2, 12, dtype=torch.int8)
    boundary[0, 5] = 2
    ctx = Context(boundary=boundary)
    open_, quiet = model(True, covariance=covariance), model(covariance=covariance)
    published = open_(tokens, None, ctx).published["doubt"]
    found = variance(open_, (tokens, None, ctx))
    assert list(found) == ["0.0"]
    assert torch.equal(found["0.0"], published)
    assert published.shape == (2, 12, 2)
    assert published.min() > 0

    before = {name: value.clone() for name, value in quiet.state_dict().items()}
    logits = quiet(tokens, None, ctx).logits
    found = variance(quiet, (tokens, None, ctx))
    assert list(found) == ["0.0", "1.0"]
    assert all(x.shape == (2, 12, 2) and not x.requires_grad for x in found.values())
    after = quiet(tokens, None, ctx)
    assert torch.equal(after.logits, logits)
    assert not after.published
    assert all(torch.equal(before[name], value) for name, value in quiet.state_dict().items())
    assert not any(m._forward_hooks for m in quiet.modules())


def test_a_model_without_filters_is_named():
    with pytest.raises(ValueError, match="kind filter"):
        variance(build(load_design("gated-deltanet", width=32, layers=1).model), (torch.zeros(1, 3, dtype=torch.long),))
