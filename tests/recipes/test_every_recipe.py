"""Every shipped recipe trains a few steps, is saved, reloaded, and generates the same with a carried state."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from postformer.contract.context import DOCUMENT, Context
from postformer.design import load, names
from postformer.design.papers import bibtex, title
from postformer.model import build
from postformer.sampling import Policy, generate
from postformer.training import load_weights, save_weights

RECIPES = Path(__file__).parents[2] / "src" / "postformer" / "recipes"


def own_page(name):
    """Of a design that comes from here and from no paper; its variants are NAME-WORD."""
    return RECIPES.parents[2] / "docs" / f"{name.partition('-')[0]}.md"


def small(name):
    return load(name, width=32, layers=max(2, len(set(load(name).model.stack))))


@pytest.mark.parametrize("name", names())
def test_trains_saves_reloads_generates(name, tmp_path):
    torch.manual_seed(0)
    recipe = small(name)
    model = build(recipe.model)
    tokens = torch.randint(0, 40, (4, 1)) + torch.arange(48) % 7
    two = Context(boundary=torch.zeros(4, 48, dtype=torch.int8).index_fill(1, torch.tensor([30]), DOCUMENT))
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(model(tokens, ctx=two).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses

    save_weights(model, tmp_path / "model.safetensors", {})
    again = build(recipe.model, seed=9)
    load_weights(again, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)

    made = generate(again, tokens[:, :20], Policy(temperature=0), 6).tokens
    with torch.no_grad():
        expected = tokens[:, :20]
        for _ in range(6):
            expected = torch.cat([expected, again(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, expected)


@pytest.mark.parametrize("name", names())
def test_is_well_described(name):
    raw = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    assert raw.startswith("# yaml-language-server: $schema=../schema/recipe.json\n")
    data = yaml.safe_load(raw)
    assert data["version"] == 1
    assert data["name"] == name
    assert len(data["summary"]) > 30
    if "paper" in data:
        assert title(data["paper"])
        assert data["paper"] in bibtex(data["paper"])
    else:
        assert own_page(name).exists()


def test_readme_names_them_all():
    readme = (RECIPES.parents[2] / "README.md").read_text(encoding="utf-8")
    papers = {name: load(name).paper for name in names()}
    pages = {name: f"https://arxiv.org/abs/{paper}" if paper else f"docs/{own_page(name).name}"
             for name, paper in papers.items()}
    assert [name for name, page in pages.items() if f"[{name}]({page})" not in readme] == []


def test_attention_can_look_both_ways_and_the_others_say_that_they_cannot():
    tokens = torch.randint(0, 256, (2, 12))
    model = build(small("transformer").model)
    with torch.no_grad():
        both = model(tokens, ctx=Context(causal=False)).logits
        changed = tokens.clone()
        changed[:, -1] = (changed[:, -1] + 1) % 256
        assert not torch.allclose(model(changed, ctx=Context(causal=False)).logits[:, 0], both[:, 0])
        with pytest.raises(ValueError, match="looks back only"):
            build(small("gated-deltanet").model)(tokens, ctx=Context(causal=False))
