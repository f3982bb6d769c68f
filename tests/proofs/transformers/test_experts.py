"""deepseek-moe: the experts are DeepSeek-V3's, the whole model is GLM-4.5's; weights copied from transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from postformer.design import load
from postformer.model import build

pytest.importorskip("transformers")
from transformers import DeepseekV3Config, Glm4MoeConfig, Glm4MoeForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

COUNT = 6
SIZES: dict[str, Any] = dict(hidden_size=64, intermediate_size=176, moe_intermediate_size=40, n_routed_experts=COUNT,
                             num_experts_per_tok=3, n_group=1, topk_group=1, norm_topk_prob=True,
                             routed_scaling_factor=2.5)
OVERRIDES = [f"model.mixers.experts.experts={COUNT}", "model.mixers.experts.top=3",
             "model.mixers.experts.expert={dim_hidden: 40}"]


def preference(layer: int) -> Tensor:
    """Biases wide enough to decide many choices, exact in both widths."""
    drawn = torch.randn(COUNT, generator=torch.Generator().manual_seed(10 + layer))
    return (0.3 * drawn * 256).round() / 256


def prefer(model: nn.Module) -> None:
    for layer, router in enumerate(m for m in model.modules() if hasattr(m, "e_score_correction_bias")):
        router.e_score_correction_bias.copy_(preference(layer))  # type: ignore[operator]


def test_deepseek_v3s_experts(prove_layer: Any, experts: Any) -> None:
    """The feed-forward alone, with one group of experts and two shared ones. Their router is in float32: widened for
    float64."""
    recipe = load("deepseek-moe", [*OVERRIDES, "model.mixers.experts.shared=2"], width=64, layers=2)
    config = DeepseekV3Config(**SIZES, n_shared_experts=2)
    config._experts_implementation = "eager"

    def make() -> nn.Module:
        made = DeepseekV3MoE(config)
        prefer(made)
        return made

    mixer = build(recipe.model, seed=0).stack.layers[1].sublayers[1].mixer

    def weights(take: Any) -> dict[str, Any]:
        found = experts(take, "m", router="gate", shared="shared_experts")
        return {name.removeprefix("m."): value for name, value in found.items()} | {"bias": preference(0)}

    prove_layer(recipe, mixer, make, weights, "experts, n_group=1")


def test_glm(prove: Any, experts: Any) -> None:
    """First layer dense, then experts. Their norms, angles, softmax and router are in float32: widened for float64."""
    recipe = load("deepseek-moe", [*OVERRIDES, "model.mixers.attention.heads={query: 4, key_value: 2, dim: 16}"],
                  width=64, layers=4)
    config = Glm4MoeConfig(**SIZES, vocab_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                           head_dim=16, n_shared_experts=1, first_k_dense_replace=1, use_qk_norm=False,
                           rms_norm_eps=1e-6, tie_word_embeddings=False, num_mtp_layers=0,
                           rope_parameters={"rope_type": "default", "rope_theta": 10000.0,
                                            "partial_rotary_factor": 1.0})

    def weights(take: Any) -> dict[str, Any]:
        found = {"embedding.weight": take("model.embed_tokens.weight"), "head.weight": take("lm_head.weight"),
                 "stack.norm.weight": take("model.norm.weight")}
        for i in range(4):
            at, here = take.at(f"model.layers.{i}"), f"stack.layers.{i}.sublayers"
            found |= {f"{here}.0.norm.weight": at("input_layernorm.weight"),
                      f"{here}.1.norm.weight": at("post_attention_layernorm.weight")}
            found |= {f"{here}.0.mixer.{a}.weight": at(f"self_attn.{b}_proj.weight")
                      for a, b in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o"))}
            if i:
                found |= experts(at.at("mlp"), f"{here}.1.mixer", router="gate", shared="shared_experts")
                found[f"{here}.1.mixer.bias"] = preference(i - 1)
            else:
                found |= {f"{here}.1.mixer.{a}.weight": at(f"mlp.{b}_proj.weight")
                          for a, b in (("gate", "gate"), ("up", "up"), ("out", "down"))}
        return found

    prove(recipe, Glm4MoeForCausalLM, config, weights, adjust=prefer)
