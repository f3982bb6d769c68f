"""K2 for a transition fixed in time: a bank of complex one-input systems, run as one FFT convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import settings
from . import fft_convolution, scan

STEP_UP_TO = 1
"""Tokens for which stepping is cheaper than making the convolution's kernel."""


def diagonal_system(u: Tensor, log_a: Tensor, b: Tensor, c: Tensor, h0: Tensor, backend: str = "auto"
                    ) -> tuple[Tensor, Tensor]:
    """h_t = exp(log_a) h_{t-1} + b u_t,  y_t = 2 Re(sum_n c_n h_{t,n})   for every channel (S4D, 2206.11893).

    Args:
        u: [B, T, D], real.
        log_a, b, c: [D, N], complex, real part of log_a <= 0.
        h0: [B, D, N], complex: the state before the first token.

    Returns:
        (y [B, T, D], h [B, D, N]) with the state after the last token. It cannot restart inside a row: use `scan`.
    """
    backend = settings.choose(backend)
    log_a, length = log_a * settings.current().decay_scale, u.shape[1]
    if backend == "reference" or (backend == "auto" and length <= STEP_UP_TO):
        a = log_a.exp().expand(u.shape[0], length, -1, -1)
        h = scan(a, u[..., None] * b, h0, backend="reference")
        return 2 * (h * c).sum(-1).real, h[:, -1]
    steps = torch.arange(length + 1, device=u.device, dtype=u.dtype)
    power = (log_a[..., None] * steps).exp()
    kernel = 2 * ((c * b)[..., None] * power[..., :-1]).sum(1).real
    y = fft_convolution(u, kernel) + 2 * torch.einsum("bds,dst->btd", h0 * c, power[..., 1:]).real
    h = power[..., -1] * h0 + b * torch.einsum("btd,dst->bds", u.to(b.dtype), power[..., :-1].flip(-1))
    return y, h
