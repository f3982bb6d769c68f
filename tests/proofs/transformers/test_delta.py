"""gated-deltanet, qwen3-next and kda: whole models and layers, weights copied from transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from postformer.design import load
from postformer.model import build

pytest.importorskip("transformers")
from transformers import (
    KimiLinearConfig,
    KimiLinearForCausalLM,
    OlmoHybridConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridLinearAttentionDecoderLayer
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
NEXT: dict[str, Any] = dict(vocab_size=256, hidden_size=64, intermediate_size=176, num_attention_heads=4,
                            num_key_value_heads=2, head_dim=32, linear_key_head_dim=16, linear_value_head_dim=24,
                            linear_num_value_heads=4, num_experts=0, rms_norm_eps=1e-6, rope_parameters=ROPE)


def next_delta(at: Any, here: str, keys: int) -> dict[str, Any]:
    """Qwen3-Next interleaves q, k, v and the gate by key head, and b with a."""
    group, dim_key, dim_value, values = at("A_log").shape[0] // keys, 16, 24, at("A_log").shape[0]
    rows = at("in_proj_qkvz.weight").unflatten(0, (keys, -1))
    q, k, v, z = rows.split([dim_key, dim_key, group * dim_value, group * dim_value], 1)
    b, a = at("in_proj_ba.weight").unflatten(0, (keys, -1)).split([group, group], 1)
    assert v.flatten(0, 1).shape[0] == values * dim_value
    return {f"{here}.params.q.weight": q.flatten(0, 1), f"{here}.params.k.weight": k.flatten(0, 1),
            f"{here}.params.v.weight": v.flatten(0, 1), f"{here}.gate.weight": z.flatten(0, 1),
            f"{here}.params.rate.weight": b.flatten(0, 1), f"{here}.params.decay.map.weight": a.flatten(0, 1),
            f"{here}.params.decay.A_log": at("A_log"), f"{here}.params.decay.dt_bias": at("dt_bias"),
            f"{here}.params.conv.weight": at("conv1d.weight").squeeze(1), f"{here}.norm.weight": at("norm.weight"),
            f"{here}.out.weight": at("out_proj.weight")}


def swiglu(at: Any, here: str) -> dict[str, Any]:
    pairs = (("gate", "gate"), ("up", "up"), ("out", "down"))
    return {f"{here}.{a}.weight": at(f"{b}_proj.weight") for a, b in pairs}


def next_model(take: Any, stack: tuple[str, ...], keys: int, feedforward: Any = swiglu) -> dict[str, Any]:
    found = {"embedding.weight": take("model.embed_tokens.weight"), "head.weight": take("lm_head.weight"),
             "stack.norm.weight": take("model.norm.weight")}
    for i, name in enumerate(stack):
        at, here = take.at(f"model.layers.{i}"), f"stack.layers.{i}.sublayers"
        found |= {f"{here}.0.norm.weight": at("input_layernorm.weight"),
                  f"{here}.1.norm.weight": at("post_attention_layernorm.weight")}
        found |= feedforward(at.at("mlp"), f"{here}.1.mixer")
        if name.startswith("memory"):
            found |= next_delta(at.at("linear_attn"), f"{here}.0.mixer", keys)
            continue
        at, inner = at.at("self_attn"), f"{here}.0.mixer"
        q, gate = at("q_proj.weight").unflatten(0, (4, 2, 32)).unbind(1)
        found |= {f"{inner}.q.weight": q.flatten(0, 1), f"{inner}.gate.weight": gate.flatten(0, 1)}
        found |= {f"{inner}.{a}.weight": at(f"{b}.weight") for a, b in
                  (("k", "k_proj"), ("v", "v_proj"), ("out", "o_proj"), ("q_norm", "q_norm"), ("k_norm", "k_norm"))}
    return found


@pytest.mark.parametrize("count", [6, 0])
def test_qwen3_next(prove: Any, experts: Any, count: int) -> None:
    """With experts, and dense by the override in the recipe. Their delta rule, norms, angles, softmax and router are in
    float32: widened for float64."""
    overrides = ["model.mixers.memory.heads={value: 4, key: 2, dim_key: 16, dim_value: 24}",
                 "model.mixers.attention.heads={query: 4, key_value: 2, dim: 32}"]
    if count:
        overrides += [f"model.mixers.feedforward.{field}" for field in (f"experts={count}", "top=3",
                                                                        "expert={dim_hidden: 40}")]
    else:
        overrides.append("model.mixers.feedforward={kind: swiglu}")
    recipe = load("qwen3-next", overrides, width=64, layers=8)
    config = Qwen3NextConfig(**NEXT | {"num_experts": count}, num_hidden_layers=8, linear_num_key_heads=2,
                             tie_word_embeddings=False, num_experts_per_tok=3, norm_topk_prob=True,
                             moe_intermediate_size=40, shared_expert_intermediate_size=40)

    def gated(at: Any, here: str) -> dict[str, Any]:
        return experts(at, here, router="gate", shared="shared_expert") | {
            f"{here}.shared_gate.weight": at("shared_expert_gate.weight")}

    prove(recipe, Qwen3NextForCausalLM, config,
          lambda take: next_model(take, recipe.model.stack, 2, gated if count else swiglu),
          label="" if count else " (dense)")


def test_gated_deltanet(prove: Any) -> None:
    """Qwen3-Next without its attention layers: the recipe with that model's norms (zero-centred, eps 1e-6) and head."""
    overrides = ["model.mixers.memory.heads={value: 4, dim_key: 16, dim_value: 24}", "model.norm=zero-centred-rms",
                 "model.mixers.memory.read={norm: rms, gate: silu, eps: 1.0e-6}", "model.embedding={tie: false}"]
    recipe = load("gated-deltanet", overrides, width=64, layers=3)
    config = Qwen3NextConfig(**NEXT, num_hidden_layers=3, linear_num_key_heads=4, tie_word_embeddings=False,
                             layer_types=["linear_attention"] * 3)
    prove(recipe, Qwen3NextForCausalLM, config, lambda take: next_model(take, recipe.model.stack, 4),
          label=" (no attention layers)")


def test_gated_deltanet_layer(prove_layer: Any) -> None:
    """The memory alone; key heads are as many as value heads. Float32 inside, widened for float64."""
    overrides = ["model.mixers.memory.heads={value: 4, dim_key: 16, dim_value: 24}",
                 "model.mixers.memory.read={norm: rms, gate: silu, eps: 1.0e-6}"]
    recipe = load("gated-deltanet", overrides, width=64, layers=1)
    config = Qwen3NextConfig(**NEXT, num_hidden_layers=1, linear_num_key_heads=4)
    mixer = build(recipe.model, seed=0).stack.layers[0].sublayers[0].mixer

    def weights(take: Any) -> dict[str, Any]:
        return {name.removeprefix("m."): p for name, p in next_delta(take, "m", 4).items()}

    prove_layer(recipe, mixer, lambda: Qwen3NextGatedDeltaNet(config, 0), weights, "memory")


@pytest.mark.parametrize("negative", [False, True])
def test_gated_deltanet_olmo(prove_layer: Any, negative: bool) -> None:
    """A whole layer of OLMo Hybrid: norm, memory, norm, SwiGLU. With rates in (0, 2) as an override of the rate."""
    rate = ["model.mixers.memory.update.rate=double-sigmoid"] if negative else []
    recipe = load("gated-deltanet", ["model.mixers.memory.heads={value: 4, dim_key: 16, dim_value: 24}", *rate],
                  width=64, layers=1)
    config = OlmoHybridConfig(vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=2,
                              num_attention_heads=4, linear_key_head_dim=16, linear_value_head_dim=24, pad_token_id=0,
                              linear_allow_neg_eigval=negative, rms_norm_eps=1e-6, eos_token_id=0)
    layer = build(recipe.model, seed=0).stack.layers[0]

    def weights(take: Any) -> dict[str, Any]:
        found = {"sublayers.0.norm.weight": take("input_layernorm.weight"),
                 "sublayers.1.norm.weight": take("post_attention_layernorm.weight")}
        found |= {f"sublayers.1.mixer.{a}.weight": take(f"mlp.{b}_proj.weight")
                  for a, b in (("gate", "gate"), ("up", "up"), ("out", "down"))}
        at, here = take.at("linear_attn"), "sublayers.0.mixer"
        found |= {f"{here}.{a}": at(f"{b}.weight") for a, b in (
            ("params.q.weight", "q_proj"), ("params.k.weight", "k_proj"), ("params.v.weight", "v_proj"),
            ("params.rate.weight", "b_proj"), ("params.decay.map.weight", "a_proj"), ("gate.weight", "g_proj"),
            ("norm.weight", "o_norm"), ("out.weight", "o_proj"))}
        return found | {f"{here}.params.decay.A_log": at("A_log"), f"{here}.params.decay.dt_bias": at("dt_bias"),
                        f"{here}.params.conv.weight": at("conv1d.weight").squeeze(1)}

    prove_layer(recipe, layer, lambda: OlmoHybridLinearAttentionDecoderLayer(config, 0), weights,
                "layer with rates in (0, 2)" if negative else "layer")


def kimi(at: Any, here: str) -> dict[str, Any]:
    found = {f"{here}{a}.weight": at(f"{b}.weight") for a, b in (
        ("params.q", "q_proj"), ("params.k", "k_proj"), ("params.v", "v_proj"), ("params.rate", "b_proj"),
        ("params.decay.map.a", "forget_gate.f_a_proj"), ("params.decay.map.b", "forget_gate.f_b_proj"),
        ("gate.a", "g_a_proj"), ("gate.b", "g_b_proj"), ("norm", "o_norm"), ("out", "o_proj"))}
    return found | {f"{here}params.conv.weight": at("conv1d.weight").squeeze(1),
                    f"{here}params.decay.A_log": at("forget_gate.A_log").flatten(),
                    f"{here}params.decay.dt_bias": at("forget_gate.dt_bias")}


def kimi_config(layers: int) -> Any:
    return KimiLinearConfig(vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=layers,
                            linear_head_dim=16, linear_num_heads=4, num_attention_heads=4, num_key_value_heads=4,
                            layer_types=["linear_attention"] * layers, mlp_layer_types=["dense"] * layers,
                            pad_token_id=0, bos_token_id=0, eos_token_id=0, rms_norm_eps=1e-5)


KDA_HEADS = "model.mixers.memory.heads={value: 4, dim_key: 16, dim_value: 16}"


def test_kda_layer(prove_layer: Any) -> None:
    """The memory alone. Their delta rule, gates and norm are in float32: widened for float64."""
    recipe = load("kda", [KDA_HEADS], width=64, layers=1)
    mixer = build(recipe.model, seed=0).stack.layers[0].sublayers[0].mixer

    def make() -> Any:
        return KimiLinearDeltaAttention(kimi_config(1), 0)

    prove_layer(recipe, mixer, make, lambda take: kimi(take, ""), "memory")


def test_kda(prove: Any) -> None:
    """Kimi Linear with delta attention in every layer and dense MLPs; norms with eps 1e-5, untied head."""
    recipe = load("kda", [KDA_HEADS, "model.norm={kind: rms, eps: 1.0e-5}", "model.embedding={tie: false}"], width=64,
                  layers=3)

    def weights(take: Any) -> dict[str, torch.Tensor]:
        found = {"embedding.weight": take("model.embed_tokens.weight"), "head.weight": take("lm_head.weight"),
                 "stack.norm.weight": take("model.norm.weight")}
        for i in range(3):
            at, here = take.at(f"model.layers.{i}"), f"stack.layers.{i}.sublayers"
            found |= {f"{here}.0.norm.weight": at("input_layernorm.weight"),
                      f"{here}.1.norm.weight": at("post_attention_layernorm.weight")}
            found |= {f"{here}.1.mixer.{a}.weight": at(f"mlp.{b}_proj.weight")
                      for a, b in (("gate", "gate"), ("up", "up"), ("out", "down"))}
            found |= kimi(at.at("self_attn"), f"{here}.0.mixer.")
        return found

    prove(recipe, KimiLinearForCausalLM, kimi_config(3), weights, label=" (KDA layers only)")
