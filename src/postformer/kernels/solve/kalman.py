"""Gains of a Kalman filter with a full covariance, token by token and in chunks.

    predict  P- = f_t P + q_t I          gain  K_t = P- k_t / (k_t^T P- k_t + r_t)          P = P- - K_t k_t^T P-

They do not depend on the values. So the tokens of a chunk are treated as what they are, noisy observations
y_t = k_t^T S_t + noise of one Gaussian process. With R_ti = prod_{i<j<=t} sqrt(f_j) and B_i the covariance that the
model alone would predict for token i from the chunk's start (B_i = f_i B_{i-1} + q_i I), the observations covary by

    G_ti = R_ti k_t^T B_i k_i  (i <= t)   + r_t on the diagonal,            L = chol(G)

The Cholesky factor of a leading block is the leading block of the factor, so row t of L knows nothing of later tokens:
L_tt^2 is token t's innovation variance, and the columns y_t = P- k_t / L_tt follow from (R . L) Y = [B_t k_t]_t.

Why the model has q and no cap on P. With f > 1 (recursive least squares with forgetting) P grows without bound along
directions in which no key points, and cutting it back to some trace would need the trace after every token. With
f = gamma <= 1 and q = (1 - gamma) p_0 the covariance returns to the prior at the rate at which f forgets, P <= p_0 I
holds by induction, and every token means the same wherever a chunk or a call begins.

Legend: G = batch * heads, N chunks, C tokens per chunk; tensors [G, N, C, d] inside chunks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RESET = -1e4
"""A log-factor whose square root's exponential is exactly zero in fp32 and fp64, and which can be added to others."""


def symmetric(P: Tensor) -> Tensor:
    return 0.5 * (P + P.mT)


def root(write: Tensor) -> Tensor:
    """sqrt(write) whose derivative is 0 where write is 0."""
    some = write > 0
    return torch.where(some, write, 1.0).sqrt().masked_fill(~some, 0.0)


def gains_recurrent(
    k: Tensor, r: Tensor, f: Tensor, q: Tensor, write: Tensor | None, P: Tensor, start: Tensor, reset: Tensor | None,
    query: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The filter's equations. k, query [B, H, T, dk]; r, log-factor f, q, write [B, H, T]; P [B, H, dk, dk]; start
    [B, H]; reset [B, T]. Returns (gains, query^T P query after each token or None, P)."""
    eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    fresh = start[..., None, None] * eye
    P, out, variance = symmetric(P), [], []
    factor_t, drift_t, noise_t = (x[..., None, None].unbind(2) for x in (f.exp(), q, r))
    key_t = k.unsqueeze(-2).unbind(2)
    query_t = None if query is None else query.unsqueeze(-2).unbind(2)
    write_t = None if write is None else (root(write) ** 2)[..., None, None].unbind(2)
    for t, key in enumerate(key_t):
        if reset is not None:
            P = torch.where(reset[:, t, None, None, None], fresh, P)
        P = factor_t[t] * P + drift_t[t] * eye
        pk = key @ P
        share = 1.0 if write_t is None else write_t[t]
        share = share / (share * (pk * key).sum(-1, keepdim=True) + noise_t[t])
        out.append((share * pk).squeeze(-2))
        P = symmetric(P - share * (pk.mT @ pk))
        if query_t is not None:
            variance.append(((query_t[t] @ P) * query_t[t]).sum((-1, -2)))
    return torch.stack(out, 2), torch.stack(variance, 2) if variance else None, P


def segment_sums(x: Tensor) -> Tensor:
    """[..., C] -> [..., C, C]: entry (t, i) is sum_{i < j <= t} x_j for i <= t, and -inf above. Only sums: no two
    cumulative sums are subtracted."""
    C = x.shape[-1]
    low = torch.ones(C, C, dtype=torch.bool, device=x.device).tril()
    sums = x[..., :, None].expand(*x.shape, C).masked_fill(~low.tril(-1), 0).cumsum(-2)
    return sums.masked_fill(~low, float("-inf"))


def gains_chunked(
    k: Tensor, r: Tensor, f: Tensor, q: Tensor, write: Tensor | None, P: Tensor, start: Tensor, reset: Tensor | None,
    query: Tensor | None, C: int,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """As gains_recurrent, C tokens at a time."""
    B, H, T, dk = k.shape
    if reset is not None:
        # The prior takes the place of f P: the old covariance is multiplied by an exact zero.
        cut = reset[:, None]
        q = torch.where(cut, f.exp() * start[..., None] + q, q)
        f = torch.where(cut, RESET, f)
    gate = None if write is None else root(write)
    if gate is not None:
        k = k * gate[..., None]
    pad = (-T) % C
    if pad:  # identity tokens
        k, f, q = F.pad(k, (0, 0, 0, pad)), F.pad(f, (0, pad)), F.pad(q, (0, pad))
        r = F.pad(r, (0, pad), value=1.0)
        query = None if query is None else F.pad(query, (0, 0, 0, pad))
    k, r, f, q = (x.flatten(0, 1).unflatten(1, (-1, C)) for x in (k, r, f, q))
    R = segment_sums(0.5 * f).exp()
    fall = (0.5 * f).cumsum(-1).exp()[..., None]
    Q = ((R * R) @ q[..., None])
    model = (R * (k @ k.mT) * Q.mT).tril(-1)
    model = model + model.mT + torch.diag_embed((k * k).sum(-1) * Q.squeeze(-1) + r)
    kd, kq, last = fall * k, Q * k, R[..., -1, :, None]
    eye = torch.eye(dk, dtype=k.dtype, device=k.device)
    P = symmetric(P.flatten(0, 1))
    rows, starts, diagonals = [], [], []
    end_t = (fall[:, :, -1:] ** 2, Q[:, :, -1:] * eye)
    # All chunks' views at once: the gradient of each alone would be as large as all.
    each = zip(*(x.unbind(1) for x in (kd, kq, model, R, fall, last, *end_t)), strict=True)
    for kd_n, kq_n, model_n, R_n, fall_n, last_n, kept_n, new_n in each:
        pk = kd_n @ P
        L = torch.linalg.cholesky(pk @ kd_n.mT + model_n)
        Y = torch.linalg.solve_triangular(R_n * L, fall_n * pk + kq_n, upper=False)
        rows.append(Y)
        starts.append(P)
        diagonals.append(L.diagonal(dim1=-2, dim2=-1))
        end = last_n * Y
        P = symmetric(kept_n * P + new_n - end.mT @ end)
    Y = torch.stack(rows, 1)
    gain = (Y / torch.stack(diagonals, 1)[..., None]).flatten(1, 2)[:, :T].unflatten(0, (B, H))
    if gate is not None:
        gain = gain * gate[..., None]
    variance = None
    if query is not None:
        query = query.flatten(0, 1).unflatten(1, (-1, C))
        far = fall * query
        known = (R * (query @ Y.mT)).square().sum(-1)
        variance = ((far @ torch.stack(starts, 1)) * far).sum(-1) + query.square().sum(-1) * Q.squeeze(-1) - known
        variance = variance.flatten(1, 2)[:, :T].unflatten(0, (B, H))
    return gain, variance, P.unflatten(0, (B, H))
