"""The load of experts, counted by hand."""

import pytest
import torch

import postformer.block.experts
import postformer.memory.vector  # noqa: F401
from postformer.contract.context import Context
from postformer.design import load as load_design
from postformer.model import build
from postformer.probe.load import even, load


def model(**feedforward):
    return build(load_design({"name": "m", "model": {
        "width": 16, "memory": {"kind": "vector", "parameterisation": "mingru"}, "feedforward": feedforward,
        "num_layers": 2}}).model)


def test_the_shares_are_those_of_the_choices_of_valid_tokens():
    made = model(kind="moe", experts=5, top=2, expert={"dim_hidden": 8})
    tokens = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    valid = torch.arange(9) < torch.tensor([[9], [4]])
    seen = []
    mixer = made.stack.layers[1].sublayers[1].mixer
    handle = mixer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    before = {name: value.clone() for name, value in made.state_dict().items()}
    found = load(made, (tokens, None, Context(valid=valid)))
    handle.remove()
    assert list(found) == ["0.1", "1.1"]
    assert all(torch.equal(before[name], value) for name, value in made.state_dict().items())

    counts = [0] * 5
    for row in range(2):
        for t in range(9):
            if valid[row, t]:
                scores = made.stack.layers[1].sublayers[1].mixer.router(seen[0][row, t]).tolist()
                for expert in sorted(range(5), key=lambda i, s=scores: -s[i])[:2]:
                    counts[expert] += 1
    assert sum(counts) == 26
    assert found["1.1"].share.tolist() == pytest.approx([c / 26 for c in counts])
    assert float(found["1.1"].max_violation) == pytest.approx(max(counts) / (26 / 5) - 1)
    assert float(found["1.1"].min_share) == pytest.approx(min(counts) / 26)


def test_figures_of_known_counts():
    assert [round(float(v), 9) for v in even(torch.tensor([6, 2, 0, 4]))[1:]] == [1.0, 0.0]
    assert float(even(torch.tensor([3, 3])).max_violation) == 0
    assert even(torch.tensor([0, 0])).share.tolist() == [0, 0]


def test_without_experts_there_is_nothing_to_measure():
    with pytest.raises(ValueError, match="kind moe"):
        load(model(kind="swiglu"), (torch.zeros(1, 3, dtype=torch.long),))
