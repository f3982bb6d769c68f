"""transformer is Llama, sliding-window is Mistral: whole models, weights copied from transformers."""

from __future__ import annotations

from typing import Any

import pytest

from postformer.design import load

pytest.importorskip("transformers")
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

SIZES: dict[str, Any] = dict(vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=3,
                             num_attention_heads=4, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6,
                             rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
HEADS = "model.mixers.attention.heads={query: 4, key_value: 2, dim: 16}"


def weights(take: Any, layers: int = 3, tied: bool = True) -> dict[str, Any]:
    found = {"embedding.weight": take("model.embed_tokens.weight"), "stack.norm.weight": take("model.norm.weight")}
    if not tied:
        found["head.weight"] = take("lm_head.weight")
    for i in range(layers):
        at = take.at(f"model.layers.{i}")
        here = f"stack.layers.{i}.sublayers"
        found |= {f"{here}.0.norm.weight": at("input_layernorm.weight"),
                  f"{here}.1.norm.weight": at("post_attention_layernorm.weight")}
        found |= {f"{here}.0.mixer.{a}.weight": at(f"self_attn.{b}_proj.weight") for a, b in
                  (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o"))}
        found |= {f"{here}.1.mixer.{a}.weight": at(f"mlp.{b}_proj.weight") for a, b in
                  (("gate", "gate"), ("up", "up"), ("out", "down"))}
    return found


def test_transformer(prove: Any) -> None:
    """Norms, rotary angles and the softmax are in float32 in their class: widened for float64."""
    recipe = load("transformer", [HEADS], width=64, layers=3)
    prove(recipe, LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True), weights)


def test_transformer_untied(prove: Any) -> None:
    """As Llama ships it: a head of its own."""
    recipe = load("transformer", [HEADS, "model.embedding={tie: false}"], width=64, layers=3)
    prove(recipe, LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=False), lambda t: weights(t, tied=False),
          label=" (untied)")


def test_sliding_window(prove: Any) -> None:
    """Both lengths exceed the window of 11. Norms, angles and softmax in float32: widened for float64."""
    recipe = load("sliding-window", [HEADS, "model.mixers.attention.window=11"], width=64, layers=3)
    config = MistralConfig(**SIZES, sliding_window=11, tie_word_embeddings=True)
    prove(recipe, MistralForCausalLM, config, weights)
