"""The delta rule's family in the papers' orientations: DeltaNet, rates up to 2, Gated DeltaNet, KDA, DeltaProduct."""

from __future__ import annotations

import pytest
import torch
from loops_plain import (
    Here,
    Weights,
    model_loop,
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

H, DK, DV = 2, 6, 10
HEADS = [f"model.mixers.memory.heads.value={H}", f"model.mixers.memory.heads.dim_key={DK}",
         f"model.mixers.memory.heads.dim_value={DV}"]


def delta_net(most: float):
    def step(w: Weights, x: Tensor, here: Here) -> Tensor:
        """2406.06484: S_t = S_{t-1} - beta (S_{t-1} k - v) k^T in R^{dv x dk}, o = S q."""
        q, k, v = projected(w.at("params"), x, here, (H * DK, H * DK, H * DV))
        beta = most * sigmoid(w.map("params.rate", x))
        out = []
        for h in range(H):
            q_h, k_h = (unit(u[DK * h : DK * (h + 1)]) for u in (q, k))
            s = here.memory.get(h, torch.zeros(DV, DK, dtype=x.dtype))
            s = s - beta[h] * torch.outer(s @ k_h - v[DV * h : DV * (h + 1)], k_h)
            here.memory[h] = s
            out.append(rms(s @ q_h / DK**0.5, 1e-5) * w("norm.weight"))
        return w.map("out", torch.cat(out))

    return step


def gated_delta_net(w: Weights, x: Tensor, here: Here) -> Tensor:
    """2412.06464: S_t = S_{t-1} (alpha (I - beta k k^T)) + beta v k^T, o = S q."""
    q, k, v = projected(w.at("params"), x, here, (H * DK, H * DK, H * DV))
    beta = sigmoid(w.map("params.rate", x))
    step = softplus(w.map("params.decay.map", x) + w("params.decay.dt_bias"))
    alpha = torch.exp(-torch.exp(w("params.decay.A_log")) * step)
    out = []
    for h in range(H):
        q_h, k_h = (unit(u[DK * h : DK * (h + 1)]) for u in (q, k))
        s = here.memory.get(h, torch.zeros(DV, DK, dtype=x.dtype))
        s = s @ (alpha[h] * (torch.eye(DK, dtype=x.dtype) - beta[h] * torch.outer(k_h, k_h)))
        here.memory[h] = s = s + beta[h] * torch.outer(v[DV * h : DV * (h + 1)], k_h)
        out.append(rms(s @ q_h / DK**0.5, 1e-5) * w("norm.weight"))
    return w.map("out", torch.cat(out) * silu(w.map("gate", x)))


def kimi_delta_attention(w: Weights, x: Tensor, here: Here) -> Tensor:
    """2510.26692: S_t = (I - beta k k^T) Diag(alpha) S_{t-1} + beta k v^T in R^{dk x dv}, o = S^T q.

    alpha and the sigmoid gate of the output through a bottleneck as wide as a head.
    """
    q, k, v = projected(w.at("params"), x, here, (H * DK, H * DK, H * DV))
    beta = sigmoid(w.map("params.rate", x))
    raw = w.map("params.decay.map.b", w.map("params.decay.map.a", x)) + w("params.decay.dt_bias")
    out = []
    for h in range(H):
        keys = slice(DK * h, DK * (h + 1))
        alpha = torch.exp(-torch.exp(w("params.decay.A_log")[h]) * softplus(raw[keys]))
        q_h, k_h = unit(q[keys]), unit(k[keys])
        s = here.memory.get(h, torch.zeros(DK, DV, dtype=x.dtype))
        erase = torch.eye(DK, dtype=x.dtype) - beta[h] * torch.outer(k_h, k_h)
        here.memory[h] = s = erase @ torch.diag(alpha) @ s + beta[h] * torch.outer(k_h, v[DV * h : DV * (h + 1)])
        out.append(rms(s.T @ q_h / DK**0.5, 1e-5) * w("norm.weight"))
    return w.map("out", torch.cat(out) * sigmoid(w.map("gate.b", w.map("gate.a", x))))


def delta_product(steps: int):
    def step(w: Weights, x: Tensor, here: Here) -> Tensor:
        """2502.10297: H_t = A(x_t) H_{t-1} + B(x_t) with the product of generalised Householder matrices

        A = (I - beta_n k_n k_n^T) ... (I - beta_1 k_1 k_1^T),
        B = sum_j (I - beta_n k_n k_n^T) ... (I - beta_{j+1} k_{j+1} k_{j+1}^T) beta_j k_j v_j^T.
        """
        q, k, v = projected(w.at("params"), x, here, (H * DK, steps * H * DK, steps * H * DV))
        beta = 2 * sigmoid(w.map("params.rate", x))
        out = []
        for h in range(H):
            a, b = torch.eye(DK, dtype=x.dtype), torch.zeros(DK, DV, dtype=x.dtype)
            for j in reversed(range(steps)):
                at = j * H + h
                k_j, v_j = unit(k[DK * at : DK * (at + 1)]), v[DV * at : DV * (at + 1)]
                b = b + beta[at] * a @ torch.outer(k_j, v_j)
                a = a @ (torch.eye(DK, dtype=x.dtype) - beta[at] * torch.outer(k_j, k_j))
            s = here.memory.get(h, torch.zeros(DK, DV, dtype=x.dtype))
            here.memory[h] = s = a @ s + b
            out.append(rms(unit(q[DK * h : DK * (h + 1)]) @ s / DK**0.5, 1e-5) * w("norm.weight"))
        return w.map("out", torch.cat(out))

    return step


@pytest.mark.parametrize(("recipe", "paper", "memory", "more"), [
    ("deltanet", "2406.06484", delta_net(1), []),
    ("deltanet-negative", "2411.12537", delta_net(2), []),
    ("gated-deltanet", "2412.06464", gated_delta_net, []),
    ("kda", "2510.26692", kimi_delta_attention, []),
    ("deltaproduct", "2502.10297", delta_product(2), []),
    ("deltaproduct", "2502.10297 (three steps)", delta_product(3), ["model.mixers.memory.update.steps=3"]),
], ids=lambda v: v if isinstance(v, str) else "")
def test_delta_rules(record_proof, recipe, paper, memory, more):
    prove(record_proof, recipe, paper, model_of(recipe, HEADS + more),
          lambda w, tokens: model_loop(w, tokens, [[memory, swiglu]] * 2, rms_norm()))
