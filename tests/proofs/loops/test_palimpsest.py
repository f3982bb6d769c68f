"""Palimpsest as one loop over tokens: what each layer does is said here once more, without a word of the library.

Three documents follow one another in each sequence. At the end of one everything is forgotten but what the Kalman
memory keeps of itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from loops_plain import (
    Here,
    Weights,
    model_of,
    projected,
    prove,
    rms,
    rms_norm,
    sigmoid,
    silu,
    softplus,
    swiglu,
    unit,
)
from torch import Tensor

from postformer.contract.context import DOCUMENT, Context

H, DK, DV, DIM, MOST = 2, 6, 10, 6, 4
SIZES = [f"model.mixers.{of}.heads={{value: {H}, dim_key: {DK}, dim_value: {DV}}}" for of in ("track", "remember.of")]
SIZES += [f"model.mixers.look.of.{i}.heads={{query: 4, key_value: 2, dim: {DIM}}}" for i in range(2)]
NORM = rms_norm()
HERE = Here(0, 0, {})
"""Where a feed-forward runs: nowhere in particular"""


def ends(length: int) -> set[int]:
    """Before which tokens a document ends."""
    return {length // 3, length // 3 + 7}


def split(u: Tensor, size: int) -> list[Tensor]:
    return list(u.split(size))


def decay(w: Weights, x: Tensor) -> Tensor:
    """exp(-exp(A) softplus(W x + b)), one for each head"""
    step = softplus(w.map("params.decay.map", x) + w("params.decay.dt_bias"))
    return torch.exp(-torch.exp(w("params.decay.A_log")) * step)


def read(w: Weights, x: Tensor, heads: list[Tensor]) -> Tensor:
    return w.map("out", torch.cat([rms(o, 1e-5) * w("norm.weight") for o in heads]) * silu(w.map("gate", x)))


def kalman(w: Weights, x: Tensor, here: Here, kept: dict) -> Tensor:
    """A Kalman filter (stationary process, full covariance) whose state starts from what was kept of the last ones:

    K <- K + c (S_end - K), of the mean and of the covariance, with c = sigmoid(u . mean of the document's x + b)
    """
    m, out = w.at("of"), []
    a, r, p_0 = decay(m, x), softplus(m.map("noise", x)) + 0.01, torch.exp(4 * torch.tanh(m("prior") / 4))
    q, k, v = projected(m.at("params"), x, here, (H * DK, H * DK, H * DV))
    eye = torch.eye(DK, dtype=x.dtype)
    for h in range(H):
        first = (p_0[h] * eye, torch.zeros(DV, DK, dtype=x.dtype))
        if "begun" in here.memory and ("now", h) not in here.memory:
            c = sigmoid(w.map("share", torch.stack(here.memory["begun"]).mean(0)))
            old = kept.get(h, first)
            kept[h] = tuple(u + c * (now - u) for u, now in zip(old, here.memory["ended", h]))
        p, s = here.memory.get(("now", h), kept.get(h, first))
        q_h, k_h = unit(split(q, DK)[h]) / DK**0.5, unit(split(k, DK)[h])
        p, s = a[h] ** 2 * p + (1 - a[h] ** 2) * p_0[h] * eye, a[h] * s
        gain = p @ k_h / (k_h @ p @ k_h + r[h])
        p, s = p - torch.outer(gain, k_h @ p), s + torch.outer(split(v, DV)[h] - s @ k_h, gain)
        here.memory["now", h] = (p, s)
        out.append(s @ q_h)
    here.memory["seen"] = [*here.memory.get("seen", []), x]
    return read(m, x, out)


def forget_kalman(memory: dict) -> dict:
    """What is left when a document ends: its end state and its tokens, until the next token settles what is kept."""
    return {"begun": memory["seen"], **{("ended", h): memory["now", h] for h in range(H)}}


def track(w: Weights, x: Tensor, here: Here) -> Tensor:
    """S <- a S, then twice S <- S - b (S k - v) k^T (2502.10297): a and b are sigmoids that are drawn out by a
    twentieth, b at both ends, and cut, so that a = 1, b = 0 and b = 2 are reached."""
    q, k, v = (w.map(f"params.{name}", x) for name in "qkv")
    a = (1.05 * sigmoid(w.map("params.decay.map", x))).clamp(max=1)
    b, out = (1.1 * 2 * sigmoid(w.map("params.rate", x)) - 0.1).clamp(0, 2), []
    for h in range(H):
        s = a[h] * here.memory.get(h, torch.zeros(DV, DK, dtype=x.dtype))
        for j in (h, H + h):
            k_j = unit(split(k, DK)[j])
            s = s - b[j] * torch.outer(s @ k_j - split(v, DV)[j], k_j)
        here.memory[h] = s
        out.append(s @ unit(split(q, DK)[h]) / DK**0.5)
    return read(w, x, out)


def shifted(w: Weights, x: Tensor, here: Here) -> Tensor:
    """A squared-ReLU layer on a token mixed with the one before (2503.14456)."""
    last, here.memory["last"] = here.memory.get("last", torch.zeros_like(x)), x
    return w.map("out", torch.clamp(w.map("k", x + (last - x) * w("x_k")), min=0) ** 2)


def attention(w: Weights, x: Tensor, memory: dict, t: int, writes: bool, *, turning: bool, window: int) -> Tensor:
    """To the last `window` tokens, with positions (2104.09864), or without them, normed and sharper the more tokens
    are seen (2501.19399); a gate on every channel (2505.06708)."""
    def made(u: Tensor, norm: str) -> list[Tensor]:
        if not turning:
            return [rms(part, 1e-6) * w(f"{norm}.weight") for part in split(u, DIM)]
        theta = 10000.0 ** (-2 * torch.arange(DIM // 2, dtype=x.dtype) / DIM)
        return [torch.complex(part[: DIM // 2], part[DIM // 2 :]) * torch.exp(1j * t * theta) for part in split(u, DIM)]

    if writes:
        memory[t] = (made(w.map("k", x), "k_norm"), split(w.map("v", x), DIM))
    out = []
    for h, q in enumerate(made(w.map("q", x), "q_norm")):
        keys, values = zip(*((k[h // 2], v[h // 2]) for s, (k, v) in memory.items() if s > t - window))
        sharp = 1.0 if turning else w("sharpness")[h] * math.log(len(keys))
        weight = torch.exp(sharp * torch.stack([(q * k.conj()).sum().real for k in keys]) / DIM**0.5)
        out.append(weight @ torch.stack(values) / weight.sum())
    return w.map("out", torch.cat(out) * sigmoid(w.map("gate", x)))


def think(block: Weights, gate: Weights, x: Tensor, memory: dict, t: int, window: int) -> Tensor:
    """The block again and again until the token halts; its keys and values are those of the first time.

    Backward goes through the mean over all steps (2107.05407), forward is the step at which half has halted.
    """
    h, rest, mean, chosen = x, torch.ones((), dtype=x.dtype), torch.zeros_like(x), None
    for n in range(MOST):
        u = NORM(block.at("sublayers.0.norm"), h)
        for i in range(2):
            heads = block.at(f"sublayers.0.mixer.of.{i}")
            h = h + attention(heads, u, memory.setdefault(i, {}), t, n == 0, turning=i == 1, window=window)
        h = h + swiglu(block.at("sublayers.1.mixer"), NORM(block.at("sublayers.1.norm"), h), HERE)
        halts = sigmoid(gate.map("gate", h))[0] if n + 1 < MOST else torch.ones((), dtype=x.dtype)
        mean, rest = mean + rest * halts * h, rest * (1 - halts)
        if chosen is None and rest <= 0.5:
            chosen = h
    assert chosen is not None
    return chosen.detach() + mean - mean.detach()


def loop(w: Weights, tokens: Sequence[int], window: int) -> Tensor:
    """Logits [T, vocab]"""
    layers, thinks = [w.at(f"stack.layers.{i}.sublayers") for i in range(2)], w.at("stack.layers.2.sublayers.0.depth")
    memories: dict[str, dict] = {name: {} for name in ("track", "kalman", "0", "1", "list")}
    kept: dict = {}
    rows = []
    for t, token in enumerate(tokens):
        if t in ends(len(tokens)):
            memories = {name: forget_kalman(of) if name == "kalman" else {} for name, of in memories.items()}
        x = w("embedding.weight")[token]
        for i, layer in enumerate(layers):
            u = NORM(layer.at("0.norm"), x)
            x = x + (kalman(layer.at("0.mixer"), u, Here(t, 0, memories["kalman"]), kept) if i
                     else track(layer.at("0.mixer"), u, Here(t, 0, memories["track"])))
            x = x + shifted(layer.at("1.mixer"), NORM(layer.at("1.norm"), x), Here(t, 0, memories[str(i)]))
        x = think(w.at("stack.shared.hop-0"), thinks, x, memories["list"], t, window)
        rows.append(w("embedding.weight") @ NORM(w.at("stack.norm"), x))
    return torch.stack(rows)


@pytest.mark.parametrize(("recipe", "window"), [("palimpsest", 10**6), ("palimpsest-windowed", 9)])
def test_palimpsest(record_proof, recipe, window):
    narrow = [f"model.mixers.look.of.{i}.window={window}" for i in range(2)] if "windowed" in recipe else []
    model = model_of(recipe, SIZES + narrow, layers=3)

    def call(tokens: Tensor) -> Tensor:
        boundary = torch.zeros(tokens.shape, dtype=torch.int8)
        boundary[:, sorted(ends(tokens.shape[1]))] = DOCUMENT
        return model(tokens, ctx=Context(boundary=boundary)).logits

    prove(record_proof, recipe, "2511.21016, 2502.10297, 2107.05407 (three documents)", model,
          lambda w, tokens: loop(w, tokens, window), call=call)
