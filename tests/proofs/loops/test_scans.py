"""Vector memories: Mamba, Griffin, HGRN and minGRU, one token at a time."""

from __future__ import annotations

import torch
from loops_plain import (
    VOCAB,
    Here,
    Weights,
    convolve,
    gelu_tanh,
    layer_norm,
    model_loop,
    model_of,
    prove,
    rms,
    rms_norm,
    sigmoid,
    silu,
    softplus,
    swiglu,
)
from torch import Tensor


def small(**mixer) -> dict:
    """Three layers of one vector memory, without feed-forwards."""
    return {"name": "proof", "model": {"width": 12, "vocab": VOCAB, "mixers": {"memory": {"kind": "vector", **mixer}},
                                       "stack": ["memory"] * 3}}


def mamba(w: Weights, x: Tensor, here: Here) -> Tensor:
    """2312.00752, algorithm 2 and the block of figure 3: A is discretised exactly, B by Delta B."""
    p = w.at("params")
    z, u = p.map("z", x), p.map("x", x)
    u = silu(convolve(here, "u", u, p("conv.weight"), p("conv.bias")))
    states, rank = p("A_log").shape[1], p("dt.weight").shape[1]
    low, b, c = p.map("bcdt", u).split([rank, states, states])
    delta, a = softplus(p.map("dt", low)), -torch.exp(p("A_log"))
    h = here.memory.get("h", torch.zeros_like(a))
    out = []
    rows = []
    for i in range(len(u)):
        rows.append(torch.exp(delta[i] * a[i]) * h[i] + delta[i] * b * u[i])
        out.append(rows[i] @ c + p("D")[i] * u[i])
    here.memory["h"] = torch.stack(rows)
    return p.map("out", torch.stack(out) * silu(z))


def test_mamba(record_proof):
    model = model_of("mamba", ["model.mixers.mamba.dim_state=5", "model.mixers.mamba.dim_inner=20"])
    prove(record_proof, "mamba", "2312.00752", model,
          lambda w, tokens: model_loop(w, tokens, [[mamba]] * 2, rms_norm(1e-5)))


PREFERENCE = (-0.05, 0.15, 0.1)


def one_expert(w: Weights, x: Tensor, here: Here) -> Tensor:
    """2402.01771: each token goes to one SwiGLU expert, weighed by the sigmoid of its logit.

    The expert is the best one, after a preference that the paper makes of Sinkhorn's algorithm and here is a constant.
    """
    s = sigmoid(w.map("router", x))
    preferred = [a + b for a, b in zip(s.tolist(), PREFERENCE)]
    best = preferred.index(max(preferred))
    return s[best] * swiglu(w.at(f"experts.{best}"), x, here)


def test_blackmamba(record_proof):
    model = model_of("blackmamba", ["model.mixers.mamba.dim_state=5", "model.mixers.mamba.dim_inner=20",
                                    "model.mixers.experts.experts=3"], layers=4)
    for layer in model.stack.layers[1::2]:
        layer.sublayers[0].mixer.bias.copy_(torch.tensor(PREFERENCE))

    def norm(w: Weights, x: Tensor) -> Tensor:
        return (layer_norm if w.has("bias") else rms_norm)(1e-5)(w, x)

    prove(record_proof, "blackmamba", "2402.01771", model,
          lambda w, tokens: model_loop(w, tokens, [[mamba], [one_expert]] * 2, norm))


WINDOW, DIM, QUERIES, BLOCKS = 11, 8, 4, 4


def recurrent_block(w: Weights, x: Tensor, here: Here) -> Tensor:
    """2402.19427, section 2.4: GeLU branch times RG-LRU branch; the gates' maps are block-diagonal.

    a_t = sigma(-Lambda)^(8 r_t); the first token enters with weight one, as in the released code.
    """
    p = w.at("params")
    u = convolve(here, "u", p.map("x", x), p("conv.weight"), p("conv.bias"))
    size = len(u) // BLOCKS

    def gate(name: str) -> Tensor:
        parts = [u[size * i : size * (i + 1)] @ p(f"{name}_weight")[i] + p(f"{name}_bias")[i] for i in range(BLOCKS)]
        return sigmoid(torch.cat(parts))

    a = sigmoid(-p("decay")) ** (8 * gate("recurrence"))
    if here.t == 0:
        h = gate("input") * u
    else:
        h = a * here.memory["h"] + torch.sqrt(1 - a * a) * (gate("input") * u)
    here.memory["h"] = h
    return p.map("out", gelu_tanh(p.map("y", x)) * h)


def local_attention(w: Weights, x: Tensor, here: Here) -> Tensor:
    """One key-value head for all queries, the last WINDOW tokens, rotary on half of the channels."""
    def turned(u: Tensor) -> Tensor:
        half = DIM // 2
        theta = 10000.0 ** (-torch.arange(0, half, 2, dtype=x.dtype) / half)
        z = torch.complex(u[: half // 2], u[half // 2 : half]) * torch.polar(torch.ones_like(theta), here.t * theta)
        return torch.cat([z.real, z.imag, u[half:]])

    here.memory["k", here.t], here.memory["v", here.t] = turned(w.map("k", x)), w.map("v", x)
    seen = range(max(0, here.t - WINDOW + 1), here.t + 1)
    q, out = w.map("q", x), []
    for h in range(QUERIES):
        q_h = turned(q[DIM * h : DIM * (h + 1)])
        scores = torch.exp(torch.stack([q_h @ here.memory["k", s] for s in seen]) / DIM**0.5)
        out.append(sum(scores[i] * here.memory["v", s] for i, s in enumerate(seen)) / scores.sum())
    return w.map("out", torch.cat(out))


def gated_mlp(w: Weights, x: Tensor, here: Here) -> Tensor:
    return w.map("out", gelu_tanh(w.map("gate", x)) * w.map("up", x))


def test_griffin(record_proof):
    model = model_of("griffin", [
        f"model.mixers.recurrent.blocks={BLOCKS}", f"model.mixers.attention.window={WINDOW}",
        f"model.mixers.attention.heads.query={QUERIES}", "model.mixers.attention.heads.key_value=1",
        f"model.mixers.attention.heads.dim={DIM}",
    ], layers=3)
    layers = [[recurrent_block, gated_mlp], [recurrent_block, gated_mlp], [local_attention, gated_mlp]]
    prove(record_proof, "griffin", "2402.19427", model, lambda w, tokens: model_loop(
        w, tokens, layers, rms_norm(offset=1), embed=lambda x: x * 32**0.5, logits=lambda y: 30 * torch.tanh(y / 30)))


def test_hgrn(record_proof):
    """2311.04823, the real recurrence: f = floor + (1 - floor) sigma(.), h_t = f h_{t-1} + (1 - f) silu(.)."""
    def loop(whole: Weights, tokens):
        def memory(w: Weights, x: Tensor, here: Here) -> Tensor:
            p = w.at("params")
            bounds = whole("stack.tied.lower_bounds-3x10")
            share = torch.exp(bounds) / torch.exp(bounds).sum(0)
            floor = share[: here.layer + 1].sum(0) - share[0]
            f = floor + (1 - floor) * sigmoid(p.map("f", x))
            h = f * here.memory.get("h", torch.zeros_like(f)) + (1 - f) * silu(p.map("c", x))
            here.memory["h"] = h
            return p.map("out", rms(h, 1e-6) * p("norm.weight") * silu(p.map("gate", x)))

        return model_loop(whole, tokens, [[memory]] * 3, rms_norm())

    prove(record_proof, "vector: hgrn", "2311.04823",
          model_of(small(parameterisation="hgrn", dim_inner=10, bias=True)), loop)


def mingru(w: Weights, x: Tensor, here: Here) -> Tensor:
    """2410.01201, appendix B: h_t = (1 - z) h_{t-1} + z g(.), g(u) = u + 1/2 where u >= 0, else sigma(u)."""
    p = w.at("params")
    z, u = sigmoid(p.map("f", x)), p.map("c", x)
    h = z * torch.where(u >= 0, u + 0.5, sigmoid(u))
    if here.t:
        h = h + (1 - z) * here.memory["h"]
    here.memory["h"] = h
    return p.map("out", h)


def test_mingru(record_proof):
    prove(record_proof, "vector: mingru", "2410.01201",
          model_of(small(parameterisation="mingru", dim_inner=10, bias=True)),
          lambda w, tokens: model_loop(w, tokens, [[mingru]] * 3, rms_norm()))
