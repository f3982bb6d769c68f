"""RWKV-7 (2503.14456) after the reference implementation x070 of BlinkDL/RWKV-LM: time mix, channel mix, ln0."""

from __future__ import annotations

import torch
from loops_plain import Here, Weights, layer_norm, model_loop, model_of, prove, sigmoid, softplus, standard
from torch import Tensor

H, N = 4, 8


def shifted(here: Here, x: Tensor) -> Tensor:
    """The previous token's input minus this one's."""
    before = here.memory.get("before", torch.zeros_like(x))
    here.memory["before"] = x
    return before - x


def time_mix(w: Weights, x: Tensor, here: Here) -> Tensor:
    xx, p = shifted(here, x), w.at("params")
    xr, xw, xk, xv, xa, xg = (x + xx * p(f"x_{n}") for n in "rwkvag")
    r, k, v = p.map("r", xr), p.map("k", xk), p.map("v", xv)
    z = p("decay.bias") + p.map("decay.b", torch.tanh(p.map("decay.a", xw)))
    decay = torch.exp(-torch.exp(-softplus(-z) - 0.5))
    if here.layer == 0:
        here.token["v_first"] = v
    else:
        nu = sigmoid(p("residual.bias") + p.map("residual.b", p.map("residual.a", xv)))
        v = v + (here.token["v_first"] - v) * nu
    a = sigmoid(p("rate.bias") + p.map("rate.b", p.map("rate.a", xa)))
    g = p.map("gate.b", sigmoid(p.map("gate.a", xg)))
    kk = k * p("k_k")
    k = k * (1 + (a - 1) * p("k_a"))
    out = []
    for h in range(H):
        c = slice(N * h, N * (h + 1))
        kappa = kk[c] / torch.linalg.vector_norm(kk[c]).clamp_min(1e-12)
        s = here.memory.get(h, torch.zeros(N, N, dtype=x.dtype))
        s = s * decay[c][None, :] + torch.outer(s @ -kappa, kappa * a[c]) + torch.outer(v[c], k[c])
        here.memory[h] = s
        y = standard(s @ r[c], 64e-5) * w("norm.weight")[c] + w("norm.bias")[c]
        out.append(y + (r[c] * k[c] * p("r_k")[h]).sum() * v[c])
    return w.map("out", torch.cat(out) * g)


def channel_mix(w: Weights, x: Tensor, here: Here) -> Tensor:
    k = w.map("k", x + shifted(here, x) * w("x_k"))
    return w.map("out", torch.clamp(k, min=0) ** 2)


def test_rwkv7(record_proof):
    heads = [f"model.mixers.{m}.heads.{k}={v}" for m in ("first", "time")
             for k, v in (("value", H), ("dim_key", N), ("dim_value", N))]
    model = model_of("rwkv7", heads, layers=3)
    norm = layer_norm(1e-5)
    prove(record_proof, "rwkv7", "2503.14456", model, lambda w, tokens: model_loop(
        w, tokens, [[time_mix, channel_mix]] * 3, norm, embed=lambda x: norm(w.at("embedding_norm"), x)))
