"""Models as one graph of torch.compile: outputs and gradients are the same."""

import pytest
import torch

import postformer


@pytest.mark.parametrize("name", ["mamba", "griffin", "deepseek-moe", "ttt-linear"])
def test_a_model_compiles_into_one_graph(name):
    model = postformer.load(name, width=32, layers=2).build()
    tokens = torch.randint(0, 250, (2, 20))
    torch.compiler.reset()
    found = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        logits = run(tokens).logits
        logits.sin().mean().backward()
        found.append([logits.detach(), *(None if p.grad is None else p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(found[1], found[0])


def test_a_call_without_a_state_is_told_so_and_its_pieces_are_not(monkeypatch):
    """`fresh` saves asking the state; a mixer that is called with one must not believe it."""
    from postformer.memory.attention import Attention

    model, seen = postformer.load("sliding-window", width=32, layers=2).build(), []
    plain = Attention.mix
    monkeypatch.setattr(Attention, "mix",
                        lambda self, x, state, ctx: seen.append(ctx.fresh) or plain(self, x, state, ctx))
    tokens = torch.randint(0, 250, (1, 12))
    first = model(tokens[:, :7])
    model(tokens[:, 7:], first.state)
    model(tokens, model.initial(1))
    assert seen == [True, True, False, False, False, False]
