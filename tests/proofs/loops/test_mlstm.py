"""mLSTM (2405.04517, in the block of 2503.13427) without a stabiliser.

exp(i) stands as it is, which float64 holds for moderate gates.
"""

from __future__ import annotations

import torch
from loops_plain import Here, Weights, model_loop, model_of, prove, rms_norm, sigmoid, standard, swiglu
from torch import Tensor

H, DK, DV = 2, 6, 10


def mlstm(w: Weights, x: Tensor, here: Here) -> Tensor:
    """C_t = f C + i v k^T, n_t = f n + i k, h = C q / max(|n.q|, 1), out = o . norm(h); gates soft-capped at 15.

    The division adds 1e-6 in units of the largest weight so far (1 before the first token): a constant of the released
    kernels, through which no gradient is taken.
    """
    q, k, v = (w.map(f"params.{n}", x) for n in "qkv")
    write = torch.exp(15 * torch.tanh(w.map("params.i", x) / 15))
    keep = sigmoid(15 * torch.tanh(w.map("params.f", x) / 15))
    out = []
    for h in range(H):
        q_h, k_h, v_h = q[DK * h : DK * (h + 1)], k[DK * h : DK * (h + 1)] / DK**0.5, v[DV * h : DV * (h + 1)]
        c = keep[h] * here.memory.get(("c", h), torch.zeros(DV, DK, dtype=x.dtype)) + write[h] * torch.outer(v_h, k_h)
        n = keep[h] * here.memory.get(("n", h), torch.zeros(DK, dtype=x.dtype)) + write[h] * k_h
        most = here.memory.get(("most", h), torch.ones((), dtype=x.dtype))
        most = torch.maximum(keep[h].detach() * most, write[h].detach())
        here.memory["c", h], here.memory["n", h], here.memory["most", h] = c, n, most
        below = torch.maximum((n @ q_h).abs(), torch.ones((), dtype=x.dtype))
        out.append(standard(c @ q_h / (below + 1e-6 * most), 1e-6))
    return w.map("out", sigmoid(w.map("gate", x)) * torch.cat(out) * w("norm.weight"))


def test_mlstm(record_proof):
    heads = [f"model.mixers.memory.heads.{k}={v}" for k, v in (("value", H), ("dim_key", DK), ("dim_value", DV))]
    prove(record_proof, "mlstm", "2405.04517, 2503.13427", model_of("mlstm", heads), lambda w, tokens: model_loop(
        w, tokens, [[mlstm, swiglu]] * 2, rms_norm(), logits=lambda y: 30 * torch.tanh(y / 30)))
