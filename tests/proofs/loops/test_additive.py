"""Memories that add: linear attention, RetNet, GLA, HGRN2, each as its paper writes one step."""

from __future__ import annotations

import math

import torch
from loops_plain import (
    Here,
    Weights,
    gelu,
    layer_norm,
    model_loop,
    model_of,
    prove,
    rms,
    rms_norm,
    sigmoid,
    silu,
    standard,
    swiglu,
)
from torch import Tensor

HEADS = ["model.mixers.memory.heads.value=2", "model.mixers.memory.heads.dim_key=6",
         "model.mixers.memory.heads.dim_value=10"]


def linear_attention(w: Weights, x: Tensor, here: Here) -> Tensor:
    """2006.16236, equations 16 to 20, phi(x) = elu(x) + 1 (equation 7)."""
    def phi(u: Tensor) -> Tensor:
        return torch.where(u > 0, u + 1, torch.exp(torch.clamp(u, max=0)))

    q, k, v = (w.map(f"params.{n}", x) for n in "qkv")
    out = []
    for h in range(2):
        q_h, k_h, v_h = phi(q[6 * h : 6 * h + 6]), phi(k[6 * h : 6 * h + 6]), v[10 * h : 10 * h + 10]
        s = here.memory.get(("s", h), torch.zeros(6, 10, dtype=x.dtype)) + torch.outer(k_h, v_h)
        z = here.memory.get(("z", h), torch.zeros(6, dtype=x.dtype)) + k_h
        here.memory["s", h], here.memory["z", h] = s, z
        out.append((q_h @ s) / (q_h @ z + 1e-6))
    return w.map("out", torch.cat(out))


def mlp(w: Weights, x: Tensor, here: Here) -> Tensor:
    return w.map("out", gelu(w.map("up", x)))


def test_linear_attention(record_proof):
    def positions(t: int) -> Tensor:
        """1706.03762, section 3.5."""
        each = [(math.sin, math.cos)[i % 2](t / 10000 ** ((i - i % 2) / 32)) for i in range(32)]
        return torch.tensor(each, dtype=torch.float64)

    prove(record_proof, "linear-attention", "2006.16236", model_of("linear-attention", HEADS),
          lambda w, tokens: model_loop(w, tokens, [[linear_attention, mlp]] * 2, layer_norm(1e-5),
                                       embed=lambda x: x * 32**0.5, added=positions))


def retention(w: Weights, x: Tensor, here: Here) -> Tensor:
    """2307.08621, the recurrent form: S_n = gamma S_{n-1} + K_n^dagger V_n with complex rotated keys, Re(Q_n S_n)."""
    theta = 10000.0 ** (-torch.arange(0, 6, 2, dtype=x.dtype) / 6)
    turn = torch.polar(torch.ones_like(theta), here.t * theta)
    q, k, v = (w.map(f"params.{n}", x) for n in "qkv")
    heads = []
    for h in range(2):
        gamma = 1 - 2.0 ** (-5 - h)
        q_h, k_h = q[6 * h : 6 * h + 6] / 6**0.5, k[6 * h : 6 * h + 6]
        q_h, k_h = torch.complex(q_h[0::2], q_h[1::2]) * turn, torch.complex(k_h[0::2], k_h[1::2]) * turn
        v_h = v[10 * h : 10 * h + 10].to(k_h.dtype)
        s = torch.outer(k_h.conj(), v_h)
        if ("s", h) in here.memory:
            s = gamma * here.memory["s", h] + s
        here.memory["s", h] = s
        heads.append(standard((q_h @ s).real, 1e-5))
    return w.map("out", silu(w.map("gate", x)) * torch.cat(heads))


def test_retnet(record_proof):
    prove(record_proof, "retnet", "2307.08621", model_of("retnet", HEADS),
          lambda w, tokens: model_loop(w, tokens, [[retention, mlp]] * 2, layer_norm()))


def gated_linear_attention(w: Weights, x: Tensor, here: Here) -> Tensor:
    """2312.06635: S_t = (alpha_t^T 1) . S_{t-1} + k_t^T v_t, alpha = sigma(.)^(1/16)."""
    q, k, v = (w.map(f"params.{n}", x) for n in "qkv")
    alpha = sigmoid(w.map("params.decay.map.b", w.map("params.decay.map.a", x))) ** (1 / 16)
    out = []
    for h in range(2):
        keys, values = slice(6 * h, 6 * h + 6), slice(10 * h, 10 * h + 10)
        s = here.memory.get(h, torch.zeros(6, 10, dtype=x.dtype))
        s = torch.outer(alpha[keys], torch.ones(10, dtype=x.dtype)) * s + torch.outer(k[keys], v[values])
        here.memory[h] = s
        out.append(rms((q[keys] / 6**0.5) @ s, 1e-5) * w("norm.weight"))
    return w.map("out", silu(w.map("gate", x)) * torch.cat(out))


def test_gla(record_proof):
    prove(record_proof, "gla", "2312.06635", model_of("gla", HEADS),
          lambda w, tokens: model_loop(w, tokens, [[gated_linear_attention, swiglu]] * 2, rms_norm()))


def test_hgrn2(record_proof):
    """2404.07904: h_t = Diag(f_t) h_{t-1} + (1 - f_t) outer i_t, y_t = h_t o_t.

    The floors are HGRN's (2311.04823): softmax over the layers, summed up to this one, minus the first.
    """
    def loop(whole: Weights, tokens):
        def memory(w: Weights, x: Tensor, here: Here) -> Tensor:
            bounds = whole("stack.tied.lower_bounds-3x12")
            share = torch.exp(bounds) / torch.exp(bounds).sum(0)
            floor = share[: here.layer + 1].sum(0) - share[0]
            f = floor + (1 - floor) * sigmoid(w.map("params.f", x))
            o, i = silu(w.map("params.q", x)), w.map("params.v", x)
            out = []
            for h in range(2):
                keys, values = slice(6 * h, 6 * h + 6), slice(10 * h, 10 * h + 10)
                s = here.memory.get(h, torch.zeros(10, 6, dtype=x.dtype))
                s = s @ torch.diag(f[keys]) + torch.outer(i[values], 1 - f[keys])
                here.memory[h] = s
                out.append(s @ o[keys])
            return w.map("out", rms(torch.cat(out), 1e-5) * w("norm.weight"))

        return model_loop(whole, tokens, [[memory, swiglu]] * 3, rms_norm())

    prove(record_proof, "hgrn2", "2404.07904", model_of("hgrn2", HEADS, layers=3), loop)
