"""Softmax attention, full and over a window, with rotary positions as multiplication by complex numbers."""

from __future__ import annotations

import pytest
import torch
from loops_plain import Here, Weights, model_loop, model_of, prove, rms_norm, swiglu
from torch import Tensor

QUERIES, KEYS, DIM = 4, 2, 6


def attention(window: int | None, persistent: int = 0):
    def step(w: Weights, x: Tensor, here: Here) -> Tensor:
        """1706.03762, equation 1, with 2104.09864's rotation: channel j and j + d/2 are one complex number.

        Persistent keys (2501.00663, section 3.3) come before all others, unturned.
        """
        def paired(u: Tensor) -> Tensor:
            return torch.complex(u[: DIM // 2], u[DIM // 2 :])

        def turned(u: Tensor) -> Tensor:
            theta = 10000.0 ** (-2 * torch.arange(DIM // 2, dtype=x.dtype) / DIM)
            return paired(u) * torch.exp(1j * here.t * theta)

        k, v, q = w.map("k", x), w.map("v", x), w.map("q", x)
        for g in range(KEYS):
            here.memory["k", g, here.t] = turned(k[DIM * g : DIM * (g + 1)])
            here.memory["v", g, here.t] = v[DIM * g : DIM * (g + 1)]
        seen = range(0 if window is None else max(0, here.t - window + 1), here.t + 1)
        out = []
        for h in range(QUERIES):
            g, q_h = h // (QUERIES // KEYS), turned(q[DIM * h : DIM * (h + 1)])
            keys, values = ([here.memory[name, g, s] for s in seen] for name in "kv")
            if persistent:
                keys = [paired(w("persistent")[0, g, n]) for n in range(persistent)] + keys
                values = [w("persistent")[1, g, n] for n in range(persistent)] + values
            scores = torch.stack([(q_h * key.conj()).sum().real for key in keys]) / DIM**0.5
            weights = torch.exp(scores) / torch.exp(scores).sum()
            out.append(weights @ torch.stack(values))
        return w.map("out", torch.cat(out))

    return step


@pytest.mark.parametrize(("recipe", "paper", "window", "persistent"), [
    ("transformer", "1706.03762, 2104.09864", None, 0),
    ("sliding-window", "2004.05150", 11, 0),
    ("sliding-window", "2004.05150 (3 persistent keys)", 11, 3),
])
def test_attention(record_proof, recipe, paper, window, persistent):
    sizes = {"query": QUERIES, "key_value": KEYS, "dim": DIM}
    heads = [f"model.mixers.attention.heads.{k}={v}" for k, v in sizes.items()]
    more = [f"model.mixers.attention.persistent={persistent}"] if persistent else []
    more += [] if window is None else [f"model.mixers.attention.window={window}"]
    prove(record_proof, recipe, paper, model_of(recipe, heads + more),
          lambda w, tokens: model_loop(w, tokens, [[attention(window, persistent), swiglu]] * 2, rms_norm()))
