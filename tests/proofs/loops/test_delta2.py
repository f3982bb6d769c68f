"""Later members of the delta rule's family in the papers' orientations, S in R^{dv x dk} unless a docstring says
otherwise: gated DeltaProduct, Longhorn, Comba, Gated DeltaNet-2, Preconditioned DeltaNet."""

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


def head(x: Tensor, h: int, dim: int) -> Tensor:
    return x[dim * h : dim * (h + 1)]


def decay_per_head(w: Weights, x: Tensor) -> Tensor:
    raw = w.map("params.decay.map", x) + w("params.decay.dt_bias")
    return torch.exp(-torch.exp(w("params.decay.A_log")) * softplus(raw))


def state(here: Here, h: int, rows: int, columns: int, x: Tensor) -> Tensor:
    return here.memory.get(h, torch.zeros(rows, columns, dtype=x.dtype))


def gated_delta_product(w: Weights, x: Tensor, here: Here) -> Tensor:
    """2502.10297, the gated variant: S_t = S_{t-1} alpha_t prod_j (I - beta_j k_j k_j^T) + ..., beta_j in (0, 2)."""
    steps = 2
    q, k, v = projected(w.at("params"), x, here, (H * DK, steps * H * DK, steps * H * DV))
    beta, alpha = 2 * sigmoid(w.map("params.rate", x)), decay_per_head(w, x)
    out = []
    for h in range(H):
        s = alpha[h] * state(here, h, DV, DK, x)
        for at in range(h, steps * H, H):
            k_j = unit(head(k, at, DK))
            s = s @ (torch.eye(DK, dtype=x.dtype) - beta[at] * torch.outer(k_j, k_j))
            s = s + beta[at] * torch.outer(head(v, at, DV), k_j)
        here.memory[h] = s
        out.append(rms(s @ unit(head(q, h, DK)) / DK**0.5, 1e-5) * w("norm.weight"))
    return w.map("out", torch.cat(out) * silu(w.map("gate", x)))


def longhorn(w: Weights, x: Tensor, here: Here) -> Tensor:
    """2407.14207: S_t = argmin_S |S - S_{t-1}|_F^2 + beta |S k - v|^2, from the normal equations of its rows:

    S (I + beta k k^T) = S_{t-1} + beta v k^T.
    """
    q, k, v = projected(w.at("params"), x, here, (H * DK, H * DK, H * DV))
    beta = sigmoid(w.map("params.rate", x))
    out = []
    for h in range(H):
        k_h, v_h = head(k, h, DK), head(v, h, DV)
        normal = torch.eye(DK, dtype=x.dtype) + beta[h] * torch.outer(k_h, k_h)
        right = state(here, h, DV, DK, x) + beta[h] * torch.outer(v_h, k_h)
        here.memory[h] = s = torch.linalg.solve(normal, right.T).T
        out.append(rms(s @ head(q, h, DK) / DK**0.5, 1e-5) * w("norm.weight"))
    return w.map("out", torch.cat(out) * silu(w.map("gate", x)))


def comba(w: Weights, x: Tensor, here: Here) -> Tensor:
    """2506.02475: S_t = S_{t-1} (alpha_t - b beta_t k_t k_t^T) + beta_t v_t k_t^T, o_t = S_t (q_t - d b k_t)."""
    q, k, v = projected(w.at("params"), x, here, (H * DK, H * DK, H * DV))
    beta, alpha = sigmoid(w.map("params.rate", x)), decay_per_head(w, x)
    b, d = sigmoid(w("params.feedback")), w("params.correction")
    out = []
    for h in range(H):
        q_h, k_h = unit(head(q, h, DK)), unit(head(k, h, DK))
        s = state(here, h, DV, DK, x)
        s = s @ (alpha[h] * torch.eye(DK, dtype=x.dtype) - b[h] * beta[h] * torch.outer(k_h, k_h))
        here.memory[h] = s = s + beta[h] * torch.outer(head(v, h, DV), k_h)
        out.append(rms(s @ (q_h - d[h] * b[h] * k_h) / DK**0.5, 1e-5) * w("norm.weight"))
    return w.map("out", torch.cat(out) * sigmoid(w.map("gate", x)))


def gated_deltanet_2(w: Weights, x: Tensor, here: Here) -> Tensor:
    """2605.22791, S in R^{dk x dv}: S_t = (I - k_t (b_t .* k_t)^T) Diag(alpha_t) S_{t-1} + k_t (w_t .* v_t)^T."""
    q, k, v = projected(w.at("params"), x, here, (H * DK, H * DK, H * DV))
    erase, write = sigmoid(w.map("params.erase", x)), sigmoid(w.map("params.write", x))
    raw = w.map("params.decay.map.b", w.map("params.decay.map.a", x)) + w("params.decay.dt_bias")
    out = []
    for h in range(H):
        k_h = unit(head(k, h, DK))
        alpha = torch.exp(-torch.exp(w("params.decay.A_log")[h]) * softplus(head(raw, h, DK)))
        change = torch.eye(DK, dtype=x.dtype) - torch.outer(k_h, head(erase, h, DK) * k_h)
        s = change @ torch.diag(alpha) @ state(here, h, DK, DV, x)
        here.memory[h] = s = s + torch.outer(k_h, head(write, h, DV) * head(v, h, DV))
        out.append(rms(s.T @ unit(head(q, h, DK)) / DK**0.5, 1e-5) * w("norm.weight"))
    return w.map("out", torch.cat(out) * sigmoid(w.map("gate.b", w.map("gate.a", x))))


def preconditioned(shared: bool):
    def step(w: Weights, x: Tensor, here: Here) -> Tensor:
        """2604.21100: A_t = alpha'_t A_{t-1} + beta'_t k_t^2, P_t = Diag((3/2)^(-r / (1 + |r|))) with
        r = log(A_t + 1e-6) - c, and S_t = alpha_t S_{t-1} - beta_t (alpha_t S_{t-1} k_t - v_t) (P_t k_t)^T.

        shared: both heads have the same key, and so the same A.
        """
        keys = 1 if shared else H
        q, k, v = projected(w.at("params"), x, here, (keys * DK, keys * DK, H * DV))
        beta, alpha = sigmoid(w.map("params.rate", x)), decay_per_head(w, x)
        raw = softplus(w.map("params.curvature_decay", x) + w("params.curvature_dt_bias"))
        alpha_a = torch.exp(-torch.exp(w("params.curvature_A_log")) * raw)
        beta_a = sigmoid(w.map("params.curvature_rate", x))
        units, directions = [], []
        for j in range(keys):
            k_j = unit(head(k, j, DK))
            a = alpha_a[j] * here.memory.get(("A", j), torch.zeros(DK, dtype=x.dtype)) + beta_a[j] * k_j * k_j
            here.memory["A", j] = a
            r = torch.log(a + 1e-6) - w("params.centre")[j]
            units.append(k_j)
            directions.append(torch.diag(1.5 ** (-r / (1 + abs(r)))) @ k_j)
        out = []
        for h in range(H):
            j = 0 if shared else h
            s = alpha[h] * state(here, h, DV, DK, x)
            s = s - beta[h] * torch.outer(s @ units[j] - head(v, h, DV), directions[j])
            here.memory[h] = s
            out.append(rms(s @ unit(head(q, j, DK)) / DK**0.5, 1e-5) * w("norm.weight"))
        return w.map("out", torch.cat(out) * silu(w.map("gate", x)))

    return step


@pytest.mark.parametrize(("recipe", "paper", "memory", "more"), [
    ("gated-deltaproduct", "2502.10297", gated_delta_product, []),
    ("longhorn", "2407.14207 (normal equations solved)", longhorn, []),
    ("comba", "2506.02475", comba, []),
    ("gated-deltanet-2", "2605.22791", gated_deltanet_2, []),
    ("preconditioned-deltanet", "2604.21100", preconditioned(False), []),
    ("preconditioned-deltanet", "2604.21100 (heads that share a key)", preconditioned(True),
     ["model.mixers.memory.heads.key=1"]),
], ids=lambda v: v if isinstance(v, str) else "")
def test_later_delta_rules(record_proof, recipe, paper, memory, more):
    prove(record_proof, recipe, paper, model_of(recipe, HEADS + more),
          lambda w, tokens: model_loop(w, tokens, [[memory, swiglu]] * 2, rms_norm()))
