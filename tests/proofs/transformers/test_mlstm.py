"""mlstm is xLSTM as in xLSTM-7B: whole model, weights copied from transformers."""

from __future__ import annotations

from typing import Any

import pytest

from postformer.design import load

pytest.importorskip("transformers")
from transformers import xLSTMConfig, xLSTMForCausalLM


def test_mlstm(prove: Any) -> None:
    """Their PyTorch kernels (the xlstm package is not needed). Norms and states in float32: widened for float64.

    The output depends on the running maximum m through the 1e-6 in the denominator alone. Autograd follows their m all
    the same, while ours carries no gradient (nor does m in the paper's kernels): the gradients differ by about 1e-8.
    """
    recipe = load("mlstm", ["model.mixers.memory.heads={value: 4, dim_key: 8, dim_value: 16}",
                            "model.mixers.feedforward={kind: swiglu, dim_hidden: 192}"], width=64, layers=3)

    def weights(take: Any) -> dict[str, Any]:
        found = {"embedding.weight": take("backbone.embeddings.weight"), "head.weight": take("lm_head.weight"),
                 "stack.norm.weight": take("backbone.out_norm.weight")}
        for i in range(3):
            at, here = take.at(f"backbone.blocks.{i}"), f"stack.layers.{i}.sublayers"
            found |= {f"{here}.0.norm.weight": at("norm_mlstm.weight"), f"{here}.1.norm.weight": at("norm_ffn.weight")}
            found |= {f"{here}.1.mixer.{a}.weight": at(f"ffn.proj_{b}.weight")
                      for a, b in (("gate", "up_gate"), ("up", "up"), ("out", "down"))}
            at, inner = at.at("mlstm_layer"), f"{here}.0.mixer"
            found |= {f"{inner}.params.{n}.weight": at(f"{n}.weight") for n in ("q", "k", "v")}
            for n in ("i", "f"):
                found |= {f"{inner}.params.{n}.{part}": at(f"{n}gate_preact.{part}") for part in ("weight", "bias")}
            found |= {f"{inner}.{a}.weight": at(f"{b}.weight") for a, b in
                      (("gate", "ogate_preact"), ("norm", "multihead_norm"), ("out", "out_proj"))}
        return found

    config = xLSTMConfig(vocab_size=256, hidden_size=64, num_hidden_layers=3, num_heads=4, chunk_size=16)
    prove(recipe, xLSTMForCausalLM, config, weights, gradient_tolerance=1e-6)
