"""The MatMul-free language model, one token at a time, with a quantiser of its own."""

from __future__ import annotations

from typing import Any

import torch
from loops_plain import Here, Weights, model_loop, model_of, prove, rms, rms_norm, sigmoid, silu
from torch import Tensor


def bit_linear(w: Weights, name: str, x: Tensor) -> Tensor:
    """2402.17764, equations 1 to 3, and 2310.11453 for the activations: round both, forget in the backward pass."""
    x, weight = rms(x, 1e-6), w(f"{name}.weight")
    step, beta = x.detach().abs().max() / 127, weight.detach().abs().mean()
    x_q = torch.floor(x.detach() / step + 0.5) * step
    sign = torch.where(weight > beta / 2, 1.0, 0.0).to(x) - torch.where(weight < -beta / 2, 1.0, 0.0).to(x)
    return (sign * beta + weight - weight.detach()) @ (x_q + x - x.detach())


def mlgru(w: Weights, x: Tensor, here: Here) -> Tensor:
    """2406.02528, section 3.3: no gate sees the state."""
    p = w.at("params")
    f, c, g = (bit_linear(p, name, x) for name in ("f", "c", "gate"))
    h = (1 - sigmoid(f)) * silu(c)
    if here.t:
        h = h + sigmoid(f) * here.memory["h"]
    here.memory["h"] = h
    return bit_linear(p, "out", sigmoid(g) * h)


def glu(w: Weights, x: Tensor, here: Here) -> Tensor:
    """Section 3.3.2."""
    return bit_linear(w, "out", silu(bit_linear(w, "gate", x)) * bit_linear(w, "up", x))


def test_matmul_free(record_proof: Any) -> None:
    prove(record_proof, "matmul-free", "2406.02528", model_of("matmul-free"),
          lambda w, tokens: model_loop(w, tokens, [[mlgru, glu]] * 2, rms_norm()))


def test_mlgru(record_proof: Any) -> None:
    """Its dense twin, with biases."""
    def dense(w: Weights, x: Tensor, here: Here) -> Tensor:
        p = w.at("params")
        f = sigmoid(p.map("f", x))
        h = f * here.memory.get("h", torch.zeros_like(f)) + (1 - f) * silu(p.map("c", x))
        here.memory["h"] = h
        return p.map("out", sigmoid(p.map("gate", x)) * h)

    recipe = {"name": "proof", "model": {"width": 12, "vocab": 17, "stack": ["memory"] * 3, "mixers": {
        "memory": {"kind": "vector", "parameterisation": "mlgru", "dim_inner": 10, "bias": True}}}}
    prove(record_proof, "vector: mlgru", "2406.02528", model_of(recipe),
          lambda w, tokens: model_loop(w, tokens, [[dense]] * 3, rms_norm()))
