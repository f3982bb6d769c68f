"""griffin is RecurrentGemma: whole model, weights copied from transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from postformer.design import load

pytest.importorskip("transformers")
from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM


def remember(theirs: nn.Module) -> None:
    """Recurrence gates nearly or entirely shut in most channels, so that a is almost 1 and 1 - a^2 almost 0."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if name.endswith("recurrent_gate_bias"):
                p.copy_(torch.rand(p.shape, generator=draw) * 25 - 25)


def case() -> tuple[Any, Any, Any]:
    """(recipe, config, mapping): both lengths of the proof exceed the window of 11; theirs rounds sqrt(64) to bf16."""
    overrides = ["model.mixers.attention.heads={query: 4, key_value: 1, dim: 16}", "model.mixers.attention.window=11",
                 "model.mixers.recurrent.blocks=4", "model.mixers.recurrent.dim_inner=96"]
    recipe = load("griffin", overrides, width=64, layers=4)

    def weights(take: Any) -> dict[str, Any]:
        found = {"embedding.weight": take("model.embed_tokens.weight"),
                 "stack.norm.weight": take("model.final_norm.weight")}
        for i, name in enumerate(recipe.model.stack):
            at, here = take.at(f"model.layers.{i}"), f"stack.layers.{i}.sublayers"
            found |= {f"{here}.0.norm.weight": at("temporal_pre_norm.weight"),
                      f"{here}.1.norm.weight": at("channel_pre_norm.weight")}
            for a, b in (("gate", "gate"), ("up", "up"), ("out", "down")):
                for part in ("weight", "bias"):
                    found[f"{here}.1.mixer.{a}.{part}"] = at(f"mlp_block.{b}_proj.{part}")
            at = at.at("temporal_block")
            if name.startswith("attention"):
                found |= {f"{here}.0.mixer.{a}.weight": at(f"{b}_proj.weight")
                          for a, b in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o"))}
                found[f"{here}.0.mixer.out.bias"] = at("o_proj.bias")
                continue
            inner = f"{here}.0.mixer.params"
            for part in ("weight", "bias"):
                found |= {f"{inner}.{n}.{part}": at(f"linear_{n}.{part}") for n in ("x", "y", "out")}
                found |= {f"{inner}.input_{part}": at(f"rg_lru.input_gate_{part}"),
                          f"{inner}.recurrence_{part}": at(f"rg_lru.recurrent_gate_{part}")}
            found |= {f"{inner}.conv.weight": at("conv_1d.weight").squeeze(1), f"{inner}.conv.bias": at("conv_1d.bias"),
                      f"{inner}.decay": at("rg_lru.recurrent_param")}
        return found

    config = RecurrentGemmaConfig(vocab_size=256, hidden_size=64, intermediate_size=2 * 192, num_hidden_layers=4,
                                  num_attention_heads=4, num_key_value_heads=1, lru_width=96, attention_window_size=11)
    return recipe, config, weights


def test_griffin(prove: Any) -> None:
    """Their recurrence, norms and softmax are in float32: widened for float64."""
    recipe, config, weights = case()
    prove(recipe, RecurrentGemmaForCausalLM, config, weights)


@pytest.mark.parametrize("dtype", [torch.float64], indirect=True)
def test_griffin_shut(prove: Any) -> None:
    """Where the gates let almost nothing in; in float64 only, since their 1 - a^2 has no digits left in float32."""
    recipe, config, weights = case()
    prove(recipe, RecurrentGemmaForCausalLM, config, weights, label=" (gates nearly shut)", adjust=remember)
