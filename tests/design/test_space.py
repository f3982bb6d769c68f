"""Any point of the matrix memory's choices builds and keeps the contract, or is refused with a remedy."""

from collections import Counter

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from postformer.contract import state as states
from postformer.design import DesignError, load
from postformer.model import build
from postformer.verify import verify

POINTS = st.fixed_dictionaries({
    "loss": st.sampled_from(["dot", "l2"]),
    "retention": st.fixed_dictionaries({"per": st.sampled_from(["none", "head", "channel"])},
                                       optional={"gate": st.sampled_from(["mamba", "gla", "sigmoid", "fixed"])}),
    "update": st.fixed_dictionaries({"steps": st.sampled_from([1, 2, 3])},
                                    optional={"kind": st.sampled_from(["gradient", "gradient", "implicit"]),
                                              "rate": st.sampled_from(["one", "sigmoid", "double-sigmoid"])}),
    "features": st.sampled_from(["none", "l2norm", "elu1", "softmax", ["silu", "l2norm"], ["relu"]]),
    "normaliser": st.sampled_from(["none", "none", "sum"]),
    "local": st.sampled_from(["none", "conv3", "shift"]),
    "read": st.sampled_from(["none", "norm", "gated-norm", "group-norm-bonus-gate"]),
    "heads": st.sampled_from([{"value": 2}, {"value": 4, "key": 2}, {"value": 3, "key": 2},
                              {"value": 2, "key": 1, "dim_key": 6, "dim_value": 5}]),
    "position": st.sampled_from(["none", "none", "rope"]),
})
REMEDIES = ("set ", "use ", "leave it out", "needs a gate", "must be a multiple", "give ", "is only for")
CHECKS = ("token by token, fp64", "a later token", "pieces = whole, outputs", "packed documents", "garbage at",
          "declared params", "declared FLOPs")
seen: Counter[str] = Counter()


@settings(max_examples=100, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(POINTS)
def point(mixer):
    data = {"version": 1, "name": "point", "model": {"width": 16, "mixers": {"memory": {"kind": "matrix", **mixer}},
                                                     "stack": ["memory"]}}
    try:
        recipe = load(data)
    except DesignError as e:
        refused = e
    else:
        refused = None
    if refused:
        assert any(word in refused.message for word in REMEDIES), refused.message
        assert refused.path.startswith("model.mixers.memory")
        seen["refused"] += 1
        return
    seen["built"] += 1
    model, cost = build(recipe.model), recipe.cost()
    assert sum(p.numel() for p in model.parameters()) == cost.params
    with torch.no_grad():
        assert states.size(model(torch.zeros(1, 5, dtype=torch.long)).state) == cost.state_bytes(5)
    found = verify(recipe, only=CHECKS)
    assert [(r.name, r.value, r.note) for r in found.results if r.passed is False] == []
    assert len(found.results) >= len(CHECKS)


def test_points_of_the_space_are_sound_or_refused_with_a_remedy():
    seen.clear()
    point()
    assert seen["built"] >= 8, seen
    assert seen["refused"] >= 8, seen
