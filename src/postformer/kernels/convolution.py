"""Short causal depthwise convolution over the tokens of a document, an activation after it.

    y_t = f(bias + sum_k weight[:, K - 1 - k] * x_{t-k}),  k = 0..K-1 over tokens of t's document only

One pass of compiled code (native/conv.h) each way, keeping nothing but x, or else PyTorch operations.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .native import call, pointers, rows, strides
from .rows import ACTIVATIONS, BLOCKS, KINDS, again, compiled
from .settings import recorded

MOST_TAPS = 64
"""Of compiled code (native/conv.h)"""


def short_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None, past: Tensor | None = None,
                      reset: Tensor | None = None, activation: str = "none", *, backend: str = "auto") -> Any:
    """Depthwise causal convolution of a few taps (Mamba, arXiv 2312.00752; H3, arXiv 2212.14052).

    Args:
        x: [B, T, D].
        weight: [D, K], the last tap on the token itself; or [n, D, K], n filters on the same x.
        bias: [D], or None; with one filter only.
        past: [B, K - 1, D], the tokens before x; None for zeros.
        reset: [B, T] bool; nothing before such a token is seen from it on.
        activation: a name of `ACTIVATIONS`.

    Returns y [B, T, D], or a tuple of n of them. Raises ValueError where shapes do not fit.
    """
    B, T, D = x.shape
    K = weight.shape[-1]
    if weight.ndim not in (2, 3) or weight.shape[-2] != D or K < 1:
        raise ValueError(f"short_convolution: weight has shape {tuple(weight.shape)} for {D} channels; give [D, K]")
    if bias is not None and (bias.shape != (D,) or weight.ndim == 3):
        raise ValueError(f"short_convolution: bias has shape {tuple(bias.shape)}; give [{D}], with one filter")
    if past is not None and past.shape != (B, K - 1, D):
        raise ValueError(f"short_convolution: past has shape {tuple(past.shape)}; it must be {(B, K - 1, D)}")
    if reset is not None and (reset.shape != (B, T) or reset.dtype != torch.bool):
        raise ValueError(f"short_convolution: reset is {reset.dtype} of {tuple(reset.shape)}; give bool {(B, T)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"short_convolution: no activation {activation!r}; use one of {', '.join(ACTIVATIONS)}")
    inputs = (x, past, weight, bias)
    if K > MOST_TAPS or not compiled(backend, "short_convolution", activation, *inputs):
        out = _form(*inputs, reset, activation)
    elif recorded(*inputs):
        out = _Convolution.apply(*inputs, reset, activation)
    else:
        out = _run(*inputs, reset, activation)
    return out if weight.ndim == 3 else out[0]


def delayed(x: Tensor, past: Tensor | None, reset: Tensor | None, n: int) -> list[Tensor]:
    """x [B, T, D] and, for k = 1..n, the token k before each in its document, zero where there is none; past [B, n, D]
    or None."""
    T = x.shape[1]
    extended = F.pad(x, (0, 0, n, 0)) if past is None else torch.cat([past, x], 1)
    shifted = [extended[:, n - k : n - k + T] for k in range(1, n + 1)]
    if reset is not None:
        segment = F.pad(reset.long().cumsum(1), (n, 0))
        shifted = [y * (segment[:, n - k : n - k + T] == segment[:, n:])[..., None] for k, y in enumerate(shifted, 1)]
    return [x, *shifted]


def _form(x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor | None, reset: Tensor | None,
          activation: str) -> tuple[Tensor, ...]:
    K = weight.shape[-1]
    seen, out = delayed(x, past, reset, K - 1), []
    for w in weight.unsqueeze(0) if weight.ndim == 2 else weight:
        y = seen[0] * w[:, -1]
        if bias is not None:
            y = y + bias
        for k in range(1, K):
            y = torch.addcmul(y, seen[k], w[:, -1 - k])
        out.append(ACTIVATIONS[activation](y))
    return tuple(out)


def _taps(weight: Tensor) -> Tensor:
    """[D, K] or [n, D, K] -> [n, K, D], the token's own first"""
    return weight.detach().view(-1, *weight.shape[-2:]).flip(-1).mT.contiguous()


def _run(x, past, weight, bias, reset, activation: str) -> tuple[Tensor, ...]:
    x, past, taps = rows(x), rows(past), _taps(weight)
    bias, reset = (None if p is None else p.contiguous() for p in (bias, reset))
    sizes, out = [*x.shape, weight.shape[-1], KINDS[activation]], []
    for w in taps:
        y = x.new_empty(x.shape)
        call("conv_forward", x.dtype, sizes, pointers(x, past, w, bias, reset, y), strides(2, x, past, y))
        out.append(y)
    return tuple(out)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, past, weight, bias, reset, activation: str) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, past, weight, bias, reset)
        ctx.activation = activation
        ctx.set_materialize_grads(False)
        return _run(x, past, weight, bias, reset, activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        *inputs, reset = ctx.saved_tensors
        if all(g is None for g in grads):
            return (None,) * 6
        if torch.is_grad_enabled():
            given = [g for g in grads if g is not None]

            def form(x, past, weight, bias) -> list[Tensor]:
                out = _form(x, past, weight, bias, reset, ctx.activation)
                return [y for y, g in zip(out, grads) if g is not None]

            return *again(form, inputs, given), None, None
        x, past, weight, bias = inputs
        x, past, taps = rows(x), rows(past), _taps(weight)
        bias, reset = (None if p is None else p.contiguous() for p in (bias, reset))
        gx, gw, gb = torch.empty_like(x), torch.zeros_like(taps), None if bias is None else torch.empty_like(bias)
        gpast = x.new_zeros(past.shape) if past is not None and ctx.needs_input_grad[1] else None
        parts = x.new_empty(BLOCKS, weight.shape[-1] + 1, x.shape[-1])
        sizes, first = [*x.shape, weight.shape[-1], KINDS[ctx.activation]], True
        for i, g in enumerate(grads):
            if g is None:
                continue
            g = rows(g)
            call("conv_backward", x.dtype, [*sizes, not first],
                 pointers(x, past, taps[i], bias, reset, g, gx, gpast, gw[i], gb, parts),
                 strides(2, x, past, g, gx))
            first = False
        return gx, gpast, gw.mT.flip(-1).view(weight.shape), gb, None, None
