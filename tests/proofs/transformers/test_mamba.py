"""mamba, mamba2, jamba and nemotron-h-style: whole models, weights copied from transformers."""

from __future__ import annotations

from typing import Any

import pytest

from postformer.design import load

pytest.importorskip("transformers")
from transformers import (
    JambaConfig,
    JambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
)


def mamba1(at: Any, here: str) -> dict[str, Any]:
    x, z = at("in_proj.weight").chunk(2)
    return {f"{here}.x.weight": x, f"{here}.z.weight": z, f"{here}.conv.weight": at("conv1d.weight").squeeze(1),
            f"{here}.conv.bias": at("conv1d.bias"), f"{here}.bcdt.weight": at("x_proj.weight"),
            f"{here}.dt.weight": at("dt_proj.weight"), f"{here}.dt.bias": at("dt_proj.bias"),
            f"{here}.A_log": at("A_log"), f"{here}.D": at("D"), f"{here}.out.weight": at("out_proj.weight")}


def mamba2(at: Any, here: str) -> dict[str, Any]:
    inner, heads = at("out_proj.weight").shape[1], at("D").shape[0]
    rows = at("in_proj.weight")
    gate, xbc, dt = rows.split([inner, rows.shape[0] - inner - heads, heads])
    return {f"{here}.params.xbc.weight": xbc, f"{here}.params.dt.weight": dt, f"{here}.gate.weight": gate,
            f"{here}.params.conv.weight": at("conv1d.weight").squeeze(1), f"{here}.params.conv.bias": at("conv1d.bias"),
            f"{here}.params.dt_bias": at("dt_bias"), f"{here}.params.A_log": at("A_log"), f"{here}.params.D": at("D"),
            f"{here}.norm.weight": at("norm.weight"), f"{here}.out.weight": at("out_proj.weight")}


def attention(at: Any, here: str) -> dict[str, Any]:
    pairs = (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o"))
    return {f"{here}.{a}.weight": at(f"{b}_proj.weight") for a, b in pairs}


def swiglu(at: Any, here: str) -> dict[str, Any]:
    pairs = (("gate", "gate"), ("up", "up"), ("out", "down"))
    return {f"{here}.{a}.weight": at(f"{b}_proj.weight") for a, b in pairs}


def test_mamba(prove: Any) -> None:
    """Their scan, A, D and norms are in float32: widened for float64."""
    recipe = load("mamba", width=64, layers=3)

    def weights(take: Any) -> dict[str, Any]:
        found = {"embedding.weight": take("backbone.embeddings.weight"),
                 "stack.norm.weight": take("backbone.norm_f.weight")}
        for i in range(3):
            at, here = take.at(f"backbone.layers.{i}"), f"stack.layers.{i}.sublayers.0"
            found[f"{here}.norm.weight"] = at("norm.weight")
            found |= mamba1(at.at("mixer"), f"{here}.mixer.params")
        return found

    config = MambaConfig(vocab_size=256, hidden_size=64, num_hidden_layers=3, state_size=16)
    prove(recipe, MambaForCausalLM, config, weights)


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2(prove: Any, groups: int) -> None:
    """Their scan, A, gates and norms are in float32: widened for float64.

    With two groups theirs norms each group's channels, as the paper's code does: read.per is then `group`.
    """
    heads = f"model.mixers.mamba.heads={{value: 8, key: {groups}, dim_key: 16, dim_value: 16}}"
    more = ["model.mixers.mamba.read.per=group"] if groups > 1 else []
    recipe = load("mamba2", [heads, "model.embedding={tie: false}", *more], width=64, layers=3)

    def weights(take: Any) -> dict[str, Any]:
        found = {"embedding.weight": take("backbone.embeddings.weight"), "head.weight": take("lm_head.weight"),
                 "stack.norm.weight": take("backbone.norm_f.weight")}
        for i in range(3):
            at, here = take.at(f"backbone.layers.{i}"), f"stack.layers.{i}.sublayers.0"
            found[f"{here}.norm.weight"] = at("norm.weight")
            found |= mamba2(at.at("mixer"), f"{here}.mixer")
        return found

    config = Mamba2Config(vocab_size=256, hidden_size=64, num_hidden_layers=3, state_size=16, num_heads=8, head_dim=16,
                          n_groups=groups, chunk_size=32, tie_word_embeddings=False)
    prove(recipe, Mamba2ForCausalLM, config, weights, label=f" (n_groups={groups})")


@pytest.mark.parametrize("count", [6, 1])
def test_jamba(prove: Any, experts: Any, count: int) -> None:
    """With experts, and dense by the override in the recipe. Their scan, norms, softmax and router are in float32:
    widened for float64."""
    overrides = ["model.mixers.attention.heads={query: 4, key_value: 2, dim: 16}"]
    overrides.append(f"model.mixers.experts.experts={count}" if count > 1 else "model.mixers.experts={kind: swiglu}")
    recipe = load("jamba", overrides, width=64, layers=8)
    assert [name.startswith("attention") for name in recipe.model.stack].index(True) == 4

    def weights(take: Any) -> dict[str, Any]:
        found = {"embedding.weight": take("model.embed_tokens.weight"), "head.weight": take("lm_head.weight"),
                 "stack.norm.weight": take("model.final_layernorm.weight")}
        for i, name in enumerate(recipe.model.stack):
            at, here = take.at(f"model.layers.{i}"), f"stack.layers.{i}.sublayers"
            found |= {f"{here}.0.norm.weight": at("input_layernorm.weight"),
                      f"{here}.1.norm.weight": at("pre_ff_layernorm.weight")}
            mixed = count > 1 and name.endswith("experts")
            assert mixed == (count > 1 and i % 2 == 1)
            ffn, ours = at.at("feed_forward"), f"{here}.1.mixer"
            found |= experts(ffn, ours, router="router") if mixed else swiglu(ffn, ours)
            if name.startswith("attention"):
                found |= attention(at.at("self_attn"), f"{here}.0.mixer")
                continue
            inner = f"{here}.0.mixer.params"
            found |= mamba1(at.at("mamba"), inner)
            found |= {f"{inner}.norms.{j}.weight": at(f"mamba.{n}_layernorm.weight")
                      for j, n in enumerate(("dt", "b", "c"))}
        return found

    config = JambaConfig(vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=8, num_experts=count,
                         num_experts_per_tok=min(2, count), num_attention_heads=4, num_key_value_heads=2,
                         mamba_d_state=16, rms_norm_eps=1e-6)
    prove(recipe, JambaForCausalLM, config, weights, label="" if count > 1 else " (dense)")


def test_nemotron_h(prove: Any) -> None:
    """Without experts. Their scan, norms and softmax are in float32: widened for float64.

    Theirs clamps the step size from below at time_step_min, in its prefill alone; the clamp is set out of reach.
    """
    overrides = ["model.mixers.attention.heads={query: 4, key_value: 2, dim: 16}", "model.mixers.mlp.dim_hidden=104",
                 "model.mixers.mamba.heads={value: 4, key: 2, dim_key: 16, dim_value: 16}"]
    recipe = load("nemotron-h-style", overrides, width=64, layers=8)

    def weights(take: Any) -> dict[str, Any]:
        found = {"embedding.weight": take("model.embeddings.weight"), "head.weight": take("lm_head.weight"),
                 "stack.norm.weight": take("model.norm_f.weight")}
        for i, name in enumerate(recipe.model.stack):
            at, here = take.at(f"model.layers.{i}"), f"stack.layers.{i}.sublayers.0"
            found[f"{here}.norm.weight"] = at("norm.weight")
            if name == "mlp":
                found |= {f"{here}.mixer.up.weight": at("mixer.up_proj.weight"),
                          f"{here}.mixer.out.weight": at("mixer.down_proj.weight")}
            else:
                found |= (mamba2 if name == "mamba" else attention)(at.at("mixer"), f"{here}.mixer")
        return found

    kinds = {"mamba": "linear_attention", "mlp": "mlp", "attention": "full_attention"}
    assert set(recipe.model.stack) == set(kinds)
    config = NemotronHConfig(vocab_size=256, hidden_size=64, intermediate_size=104, ssm_state_size=16, n_groups=2,
                             layers_block_type=[kinds[n] for n in recipe.model.stack], num_attention_heads=4,
                             num_key_value_heads=2, head_dim=16, mamba_num_heads=4, mamba_head_dim=16, chunk_size=32,
                             time_step_min=1e-30)
    prove(recipe, NemotronHForCausalLM, config, weights)
