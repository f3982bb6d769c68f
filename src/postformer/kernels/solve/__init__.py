"""K4, second-order memories: gains, precisions and solutions, which depend on keys alone; values come after, in K1."""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import settings
from ..gdr import RECURRENT_UP_TO
from .kalman import gains_chunked, gains_recurrent
from .moebius import precision_blocked, precision_recurrent
from .ridge import SOLVERS, solve_chunked, solve_recurrent


def _fail(name: str, message: str) -> NoReturn:
    raise ValueError(f"{name}: {message}")


def _shape(name: str, what: str, x: Tensor | None, shape: tuple[int, ...]) -> None:
    if x is not None and tuple(x.shape) != shape:
        _fail(name, f"{what} has shape {tuple(x.shape)}; it must be {shape}")


def _reset(name: str, reset: Tensor | None, shape: tuple[int, ...]) -> None:
    if reset is not None and (tuple(reset.shape) != shape or reset.dtype != torch.bool):
        _fail(name, f"reset is {reset.dtype} of shape {tuple(reset.shape)}; give bool {shape}")


def _chunk(name: str, chunk: int, T: int) -> int:
    if chunk < 1 or chunk & (chunk - 1):
        _fail(name, f"chunk={chunk} is not a power of two; use 16, 32 or 64")
    while chunk > 1 and chunk // 2 >= T:
        chunk //= 2
    return chunk


def _token_by_token(backend: str, T: int) -> bool:
    backend = settings.choose(backend)
    return backend == "reference" or (backend == "auto" and T <= RECURRENT_UP_TO)


def _dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def kalman_gains(
    k: Tensor, r: Tensor, *, state: Tensor, start: Tensor, factor: Tensor | None = None, drift: Tensor | None = None,
    write: Tensor | None = None, reset: Tensor | None = None, query: Tensor | None = None, chunk: int = 32,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Kalman gains for a covariance over keys that all value channels share.

        P- = exp(factor_t) P + drift_t I,   K_t = P- k_t / (k_t^T P- k_t + r_t),   P = P- - K_t k_t^T P-

    With the gains, the posterior mean is `gdr(q, g, w=K, e=k, u=v)`, g the log-decay of the mean. factor = -log gamma
    and drift = 0 is recursive least squares with forgetting, whose P grows without bound where no key points; factor =
    log gamma and drift = (1 - gamma) p_0 returns to the prior p_0 I and never exceeds it.

    Args:
        k: keys [B, H, T, dk].
        r: variance of the observation noise [B, H, T], > 0; in float32 at least 1e-5 times the largest k^T P k.
        state: covariance [B, H, dk, dk] before the first token; its symmetric part is taken.
        start: [H], the covariance is start I at a reset (and for whoever builds the first state).
        factor: logarithm of what P is multiplied by, [B, H, T], of either sign; None is 0.
        drift: variance added in every direction, [B, H, T], >= 0; None is 0.
        write: [B, H, T] in [0, 1] multiplies the precision 1 / r of a token's observation: 0 observes nothing
            (and has derivative 0).
        reset: [B, T] bool; the covariance is start I before these tokens, exactly.
        query: [B, H, T, dk]; also return query_t^T P_t query_t.
        chunk: tokens per chunk, a power of two. Changes speed, not results.
        backend: "auto", "reference" (token by token) or "parallel" (chunks).

    Returns:
        (gains [B, H, T, dk], variances [B, H, T] or None, state), in float32 (float64 for float64 k).

    Raises:
        ValueError: shapes do not fit. torch.linalg.LinAlgError: r is lost to rounding beside k^T P k.
    """
    name = "kalman_gains"
    if k.ndim != 4 or k.shape[2] < 1:
        _fail(name, f"k has shape {tuple(k.shape)}; give [B, H, T, dk] with T >= 1")
    B, H, T, dk = k.shape
    for what, x in (("r", r), ("factor", factor), ("drift", drift), ("write", write)):
        _shape(name, what, x, (B, H, T))
    _shape(name, "state", state, (B, H, dk, dk))
    _shape(name, "start", start, (H,))
    _shape(name, "query", query, (B, H, T, dk))
    _reset(name, reset, (B, T))
    C, dtype = _chunk(name, chunk, T), _dtype(k)
    with torch.autocast(k.device.type, enabled=False):
        none = k.new_zeros((), dtype=dtype).expand(B, H, T)
        args = (
            k.to(dtype), r.to(dtype), none if factor is None else factor.to(dtype),
            none if drift is None else drift.to(dtype), None if write is None else write.to(dtype), state.to(dtype),
            start.to(dtype).expand(B, H), reset, None if query is None else query.to(dtype),
        )
        run: Any = gains_recurrent if _token_by_token(backend, T) else partial(gains_chunked, C=C)
        return run(*args)


def precision(
    phi: Tensor, *, state: Tensor, start: Tensor, factor: Tensor | None = None, drift: Tensor | None = None,
    reset: Tensor | None = None, backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Precisions of scalar filters, a channel each (arXiv 2602.10743 calls it the Moebius scan).

        lambda-_t = 1 / (exp(factor_t) / lambda_{t-1} + drift_t),        lambda_t = lambda-_t + phi_t

    Args:
        phi: precision that each token's observation adds, [B, H, T, d], >= 0.
        state: [B, H, d], > 0, the precision before the first token.
        start: [H] or [H, d], > 0, the precision before a token with a reset.
        factor: logarithm of what the variance is multiplied by, [B, H, T, d] or [B, H, T, 1]; None is 0.
        drift: variance added, likewise, >= 0; None is 0.
        reset: [B, T] bool. backend: "auto", "reference" (token by token) or "parallel" (about 3 sqrt(T) steps).

    Returns:
        (lambda-, lambda), both [B, H, T, d], at least float32; lambda[:, :, -1] is the final state. First-order
        gradients.

    Raises:
        ValueError: shapes do not fit.
    """
    name = "precision"
    if phi.ndim != 4 or phi.shape[2] < 1:
        _fail(name, f"phi has shape {tuple(phi.shape)}; give [B, H, T, d] with T >= 1")
    B, H, T, d = phi.shape
    for what, x in (("factor", factor), ("drift", drift)):
        if x is not None and (x.shape[:3] != (B, H, T) or x.shape[3:] not in ((1,), (d,))):
            _fail(name, f"{what} has shape {tuple(x.shape)}; give {(B, H, T, 1)} or {(B, H, T, d)}")
    _shape(name, "state", state, (B, H, d))
    if tuple(start.shape) not in ((H,), (H, d)):
        _fail(name, f"start has shape {tuple(start.shape)}; give {(H,)} or {(H, d)}")
    _reset(name, reset, (B, T))
    dtype = _dtype(phi)
    with torch.autocast(phi.device.type, enabled=False):
        one = phi.new_ones((), dtype=dtype).expand(B, T, H, 1)
        begin = start.to(dtype).unsqueeze(-1) if start.ndim == 1 else start.to(dtype)
        args = (
            one if factor is None else factor.to(dtype).exp().transpose(1, 2),
            one * 0 if drift is None else drift.to(dtype).transpose(1, 2), phi.to(dtype).transpose(1, 2),
            state.to(dtype), begin.expand(B, H, d), reset,
        )
        run: Any = precision_recurrent if _token_by_token(backend, T) else precision_blocked
        before, after = run(*args)
        return before.transpose(1, 2), after.transpose(1, 2)


def ridge_solve(
    q: Tensor, k: Tensor, g: Tensor | None, *, w: Tensor, ridge: Tensor, state: Tensor, ratio: Tensor | None = None,
    reset: Tensor | None = None, solver: str = "conjugate-gradient", iterations: int = 30, chunk: int = 32,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Solve (H_t + Lambda_t) x_t = q_t for every token, with H_t = exp(g_t) H_{t-1} + w_t k_t^T.

    MesaNet (arXiv 2506.05233) reads its values with x by conjugate gradients; Gated KalmaNet (arXiv 2511.21016) takes
    Chebyshev iteration and a ridge in proportion to the norm of H.

    Args:
        q: [B, H, T, dk].
        k, w: [B, H, T, dk]; w = beta k with beta >= 0, so that H is symmetric.
        g: log-decay <= 0, [B, H, T, 1], float32 or float64; None for none.
        ridge: Lambda's diagonal [B, H, T, dk] (or broadcastable to it), > 0: at least 0.25 for unit keys, or the
            solver needs more iterations than it has.
        state: H [B, H, dk, dk] before the first token; its symmetric part is taken.
        ratio: adds ratio ||H_t||_F to the diagonal, [B, H, T, 1] or broadcastable to it; None adds nothing.
        reset: [B, T] bool; H is zero before these tokens, exactly.
        solver: "conjugate-gradient" (exact after dk steps, but for rounding) or "chebyshev" (error falls by a factor
            (s - 1) / (s + 1) per step, s the root of (max Lambda + ||H||) / min Lambda).
        iterations: steps >= 1.
        backend: "auto", "reference" (the same steps with H written out, token by token) or "parallel".

    Returns:
        (x [B, H, T, dk], state), at least float32. Gradients are implicit: exact as far as the solver has converged.

    Raises:
        ValueError: shapes or arguments do not fit.
    """
    name = "ridge_solve"
    if q.ndim != 4 or q.shape[2] < 1:
        _fail(name, f"q has shape {tuple(q.shape)}; give [B, H, T, dk] with T >= 1")
    B, H, T, dk = q.shape
    for what, x in (("k", k), ("w", w)):
        _shape(name, what, x, (B, H, T, dk))
    _shape(name, "g", g, (B, H, T, 1))
    _shape(name, "state", state, (B, H, dk, dk))
    _reset(name, reset, (B, T))
    if solver not in SOLVERS:
        _fail(name, f"solver={solver!r} does not exist; use one of {', '.join(map(repr, SOLVERS))}")
    if iterations < 1:
        _fail(name, f"iterations={iterations}; give a number >= 1")
    C, dtype = _chunk(name, chunk, T), _dtype(q)
    with torch.autocast(q.device.type, enabled=False):
        decay = None if g is None else g.to(dtype) * settings.current().decay_scale
        args = (
            q.to(dtype), k.to(dtype), w.to(dtype), decay, ridge.to(dtype).expand(B, H, T, dk),
            None if ratio is None else ratio.to(dtype).expand(B, H, T, 1), state.to(dtype), reset, SOLVERS[solver],
            iterations,
        )
        run: Any = solve_recurrent if _token_by_token(backend, T) else partial(solve_chunked, C=C)
        return run(*args)
