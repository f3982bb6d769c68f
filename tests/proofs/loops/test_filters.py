"""Filters from their textbook equations: covariances by inverses, precisions by variances, regressions by solving."""

from __future__ import annotations

import math

import pytest
import torch
from loops_plain import (
    TOLERANCE,
    VOCAB,
    Here,
    Weights,
    model_loop,
    model_of,
    projected,
    prove,
    relative,
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


def by_heads(w: Weights, x: Tensor, here: Here) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k, v of each head; q and k of unit length."""
    all_heads = projected(w.at("params"), x, here, (H * DK, H * DK, H * DV))
    return [(unit(q) / DK**0.5, unit(k), v) for q, k, v in zip(*(u.unflatten(0, (H, -1)) for u in all_heads))]


def mamba_decay(w: Weights, x: Tensor) -> Tensor:
    """exp(-exp(A) softplus(W x + b)): [H], or [H, DK] where there is one for each key channel"""
    step = softplus(w.map("params.decay.map", x) + w("params.decay.dt_bias")).unflatten(0, (H, -1))
    return torch.exp(-torch.exp(w("params.decay.A_log"))[:, None] * step)


def noise_and_prior(w: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    """(variance of the observation [H], variance before anything was seen [H])"""
    return softplus(w.map("noise", x)) + 0.01, torch.exp(4 * torch.tanh(w("prior") / 4))


def read(w: Weights, x: Tensor, heads: list[Tensor], gated: bool = True) -> Tensor:
    normed = torch.cat([rms(o, 1e-5) * w("norm.weight") for o in heads])
    return w.map("out", normed * silu(w.map("gate", x)) if gated else normed)


def kalman(w: Weights, x: Tensor, here: Here) -> Tensor:
    """The filter of S_t = a S_{t-1} + sqrt(1 - a^2) sqrt(p_0) change, v = S k + noise in R^{dv}, by inverses:

    P- = a^2 P + (1 - a^2) p_0 I,  P = (P-^{-1} + k k^T / r)^{-1},  S = S P-^{-1} P + v k^T P / r
    """
    a, (r, p_0), out = mamba_decay(w, x)[:, 0], noise_and_prior(w, x), []
    eye = torch.eye(DK, dtype=x.dtype)
    for h, (q, k, v) in enumerate(by_heads(w, x, here)):
        p, s = here.memory.get(("p", h), p_0[h] * eye), here.memory.get(("s", h), torch.zeros(DV, DK, dtype=x.dtype))
        surer = torch.linalg.inv(a[h] ** 2 * p + (1 - a[h] ** 2) * p_0[h] * eye)
        p = torch.linalg.inv(surer + torch.outer(k, k) / r[h])
        s = a[h] * s @ surer @ p + torch.outer(v, k) @ p / r[h]
        here.memory["p", h], here.memory["s", h] = p, s
        out.append(s @ q)
    return read(w, x, out)


def approximate(isotropic: bool):
    def step(w: Weights, x: Tensor, here: Here) -> Tensor:
        """A variance p for every key channel, or one for all (each token then adds the mean of k^2 / r):

        p- = a^2 p + (1 - a^2) p_0,  gain = p- k / (sum p- k^2 + r),  p = p- / (1 + p- k^2 / r)
        """
        a, (r, p_0), out = mamba_decay(w, x)[:, 0], noise_and_prior(w, x), []
        for h, (q, k, v) in enumerate(by_heads(w, x, here)):
            one = torch.ones((), dtype=x.dtype) if isotropic else torch.ones(DK, dtype=x.dtype)
            p = here.memory.get(("p", h), p_0[h] * one)
            s = here.memory.get(("s", h), torch.zeros(DV, DK, dtype=x.dtype))
            p, s = a[h] ** 2 * p + (1 - a[h] ** 2) * p_0[h], a[h] * s
            s = s + torch.outer(v - s @ k, p * k / ((p * k * k).sum() + r[h]))
            p = p / (1 + p * ((k * k).sum() / DK if isotropic else k * k) / r[h])
            here.memory["p", h], here.memory["s", h] = p, s
            out.append(s @ q)
        return read(w, x, out)

    return step


def kalman_linear_attention(w: Weights, x: Tensor, here: Here) -> Tensor:
    """2602.10743 in information form: precision lam and eta = lam * mean of every entry of the state,

    rho = 1 / (a^2 / lam + p),  eta = rho a (eta / lam) + k v / r,  lam = rho + k^2 / r,  y = sum_n q_n eta_n / lam_n
    with p = (1 - a^2) p_0, the exactly discretised Ornstein-Uhlenbeck process.
    """
    a, (r, p_0), out = mamba_decay(w, x), noise_and_prior(w, x), []
    for h, (q, k, v) in enumerate(by_heads(w, x, here)):
        lam = here.memory.get(("lam", h), torch.ones(DK, dtype=x.dtype) / p_0[h])
        eta = here.memory.get(("eta", h), torch.zeros(DK, DV, dtype=x.dtype))
        rho = 1 / (a[h] ** 2 / lam + (1 - a[h] ** 2) * p_0[h])
        eta = (rho * a[h] / lam)[:, None] * eta + torch.outer(k, v) / r[h]
        lam = rho + k * k / r[h]
        here.memory["lam", h], here.memory["eta", h] = lam, eta
        out.append((q / lam) @ eta)
    return read(w, x, out)


def remembered(here: Here, h: int, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of k k^T, sum of k v^T) over the past, every term with the product of the decays since."""
    here.memory[h, here.t] = torch.cat([k, v, decay[None], beta[None]])
    kk, kv, left = torch.zeros(DK, DK, dtype=k.dtype), torch.zeros(DK, DV, dtype=k.dtype), torch.ones((), dtype=k.dtype)
    for s in range(here.t, -1, -1):
        k_s, v_s, decay_s, beta_s = here.memory[h, s].split([DK, DV, 1, 1])
        kk, kv = kk + left * beta_s * torch.outer(k_s, k_s), kv + left * beta_s * torch.outer(k_s, v_s)
        left = left * decay_s
    return kk, kv


def mesa_net(w: Weights, x: Tensor, here: Here) -> Tensor:
    """2506.05233: o = G (H + Lambda)^{-1} q with H = sum beta k k^T, G = sum beta v k^T over the decayed past."""
    beta, gamma, out = sigmoid(w.map("params.rate", x)), sigmoid(w.map("params.decay.map", x)), []
    for h, (q, k, v) in enumerate(by_heads(w, x, here)):
        kk, kv = remembered(here, h, k, v, gamma[h], beta[h])
        ridge = torch.diag(0.25 + softplus(w("ridge")[h]))
        out.append(torch.linalg.solve(kk + ridge, q) @ kv)
    return read(w, x, out, gated=False)


def gated_kalma_net(solve):
    def step(w: Weights, x: Tensor, here: Here) -> Tensor:
        """2511.21016: ridge 0.02 |H|_F (and 1e-4, so that an empty past has a solution), query q + c (x - q)."""
        beta, gamma = sigmoid(w.map("params.rate", x)), mamba_decay(w, x)[:, 0]
        share, out = sigmoid(w.map("mix_query", x)), []
        for h, (q, k, v) in enumerate(by_heads(w, x, here)):
            kk, kv = remembered(here, h, k, v, gamma[h], beta[h])
            size = (kk * kk).sum().sqrt()
            found = solve(kk, 1e-4 + 0.02 * size, size, q)
            out.append((q + share[h] * (found - q)) @ kv)
        return read(w, x, out)

    return step


def exactly(kk: Tensor, ridge: Tensor, size: Tensor, q: Tensor) -> Tensor:
    return torch.linalg.solve(kk + ridge * torch.eye(DK, dtype=q.dtype), q)


def by_polynomial(degree: int):
    def solve(kk: Tensor, ridge: Tensor, size: Tensor, q: Tensor) -> Tensor:
        """The residual's polynomial is Chebyshev's, T_n((2 ridge + size - 2 l) / size) scaled to 1 at l = 0."""
        values, vectors = torch.linalg.eigh(kk)
        scaled = (-2 * values / size + 1).clamp(-1, 1)  # of the spectrum without the ridge, [0, size]
        at_zero = math.cosh(degree * math.acosh(float(1 + 2 * ridge / size)))
        residual = torch.cos(degree * torch.arccos(scaled)) / at_zero
        return vectors @ ((1 - residual) / (values + ridge) * (vectors.T @ q))

    return solve


@pytest.mark.parametrize(("recipe", "paper", "memory", "more"), [
    ("kalman", "2511.21016 (the filter it starts from)", kalman, []),
    ("kalman-diagonal", "2511.21016 (the filter, one precision per key channel)", approximate(False), []),
    ("kalman-isotropic", "2511.21016 (the filter, one variance)", approximate(True), []),
    ("kla", "2602.10743", kalman_linear_attention, []),
    ("mesanet", "2506.05233", mesa_net, []),
    ("gated-kalmanet", "2511.21016 (200 iterations: converged)", gated_kalma_net(exactly),
     ["model.mixers.memory.solver.iterations=200"]),
], ids=lambda v: v if isinstance(v, str) else "")
def test_filters(record_proof, recipe, paper, memory, more):
    prove(record_proof, recipe, paper, model_of(recipe, HEADS + more),
          lambda w, tokens: model_loop(w, tokens, [[memory, swiglu]] * 2, rms_norm()))


def test_gated_kalmanet_stops_where_thirty_chebyshev_steps_do(record_proof):
    """Its gradients are those of the solution, which at 30 iterations is not quite what is returned: logits only."""
    model = model_of("gated-kalmanet", HEADS)
    weights = Weights({n: p.detach() for n, p in model.named_parameters()})
    tokens = torch.randint(VOCAB, (1, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours = model(tokens).logits[0]

        def loop(solve):
            return model_loop(weights, tokens[0].tolist(), [[gated_kalma_net(solve), swiglu]] * 2, rms_norm())

        error, short = relative(ours, loop(by_polynomial(31))), relative(ours, loop(exactly))
    assert 1e-8 < short < 1e-2  # thirty steps are neither all nor nothing
    record_proof("gated-kalmanet", "Chebyshev polynomials of the eigenvalues (arXiv 2511.21016)", "logits, 40 tokens",
                 error, dtype="float64", tolerance=TOLERANCE)
