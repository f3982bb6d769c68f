"""bitnet is BitNet b1.58 2B4T: the whole model with its maps quantised at every call; and the ternary map alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from postformer.contract.mixer import Out
from postformer.design import load
from postformer.design.linear import Ternary
from postformer.layers.linear import TernaryLinear

pytest.importorskip("transformers")
from transformers import BitNetConfig, BitNetForCausalLM

with pytest.MonkeyPatch.context() as _patch:
    _patch.setattr(torch, "compile", lambda fn: fn)  # their quantisers as written, not as compiled
    from transformers.integrations.bitnet import AutoBitLinear

SIZES: dict[str, Any] = dict(vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=3,
                             num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5,
                             rope_parameters={"rope_type": "default", "rope_theta": 500000.0})


class Quantised(BitNetForCausalLM):
    """BitNetForCausalLM with its linear maps as its integration trains them."""

    def __init__(self, config: BitNetConfig) -> None:
        super().__init__(config)
        for path, module in list(self.model.named_modules()):
            if type(module) is nn.Linear:
                made = AutoBitLinear(module.in_features, module.out_features, bias=False, online_quant=True)
                self.model.set_submodule(path, made)


Quantised.__name__ = "BitNetForCausalLM"


def weights(take: Any, layers: int = 3) -> dict[str, Any]:
    found = {"embedding.weight": take("model.embed_tokens.weight"), "stack.norm.weight": take("model.norm.weight")}
    for i in range(layers):
        at, here = take.at(f"model.layers.{i}"), f"stack.layers.{i}.sublayers"
        found |= {f"{here}.0.norm.weight": at("input_layernorm.weight"),
                  f"{here}.1.norm.weight": at("post_attention_layernorm.weight"),
                  f"{here}.0.mixer.sub_norm.weight": at("self_attn.attn_sub_norm.weight"),
                  f"{here}.1.mixer.norm.weight": at("mlp.ffn_sub_norm.weight")}
        found |= {f"{here}.0.mixer.{a}.weight": at(f"self_attn.{b}_proj.weight") for a, b in
                  (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o"))}
        found |= {f"{here}.1.mixer.{a}.weight": at(f"mlp.{b}_proj.weight") for a, b in
                  (("gate", "gate"), ("up", "up"), ("out", "down"))}
    return found


@pytest.mark.parametrize("dtype", [torch.float64], ids=["float64"])
def test_bitnet(prove: Any, dtype: torch.dtype) -> None:
    """Norms, angles, softmax and both quantisers are in float32 in their classes: widened for float64.

    Not in float32, where the two may round a channel to different sides of a half: a step of 1/127 in one token.
    """
    recipe = load("bitnet", ["model.mixers.attention.heads={query: 4, key_value: 2, dim: 16}",
                             "model.mixers.feedforward.dim_hidden=176"], width=64, layers=3)
    prove(recipe, Quantised, BitNetConfig(**SIZES, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0), weights)


class Alone(nn.Module):
    """Our map with the interface of a mixer."""

    def __init__(self) -> None:
        super().__init__()
        self.map = TernaryLinear(Ternary(norm="none"), 64, 64, bias=True)

    def forward(self, x: torch.Tensor) -> Out:
        return Out(self.map(x))


def test_ternary_map(prove_layer: Any) -> None:
    """Both quantisers are in float32 in their class: widened for float64."""
    prove_layer(load("bitnet", width=64), Alone(), lambda: AutoBitLinear(64, 64, bias=True, online_quant=True),
                lambda take: {f"map.{name}": take(name) for name in ("weight", "bias")}, "the ternary map")
