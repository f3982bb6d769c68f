"""Elementwise and row-wise work around the memories: gated activations, norms with gates, turned pairs.

Each is one pass of compiled code (native/rows.h) each way where there is some, keeping nothing but its inputs, and
PyTorch operations elsewhere: other devices, half precision, torch.func, torch.compile, gradients of gradients.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack  # pyright: ignore[reportMissingModuleSource]
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from . import settings
from .native import call, pointers, rows, strides
from .settings import recorded

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "sigmoid": Tensor.sigmoid,
    "gelu": F.gelu,
    "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "none": lambda x: x,
}
KINDS = {"none": 0, "silu": 1, "sigmoid": 2, "gelu-tanh": 3, "relu": 4, "relu2": 5}
"""Activations that compiled code has; the numbers of native/rows.h"""
MODES = {"norm-gate": 1, "gate-norm": 2}
NORMS = ("rms", "layer", "l2")
BLOCKS = 64
"""Sums over rows are taken in as many parts (native/rows.h)"""


def _eager() -> bool:
    """Whether nothing looks at each operation (vmap, forward derivatives, compilers): compiled code shows it none."""
    return not torch.compiler.is_compiling() and peek_interpreter_stack() is None and forward_ad._current_level < 0


def compiled(backend: str, kernel: str, activation: str, *tensors: Tensor | None) -> bool:
    """Whether compiled code runs a kernel on these tensors, which must all be of one kind."""
    first, *others = (x for x in tensors if x is not None)
    fits = activation in KINDS and all(x.dtype == first.dtype and x.device == first.device for x in others)
    return fits and _eager() and first.numel() > 0 and settings.native(settings.choose(backend), first, kernel)


def again(form: Callable[..., Any], inputs: Sequence[Tensor | None], grads: Any) -> list[Tensor | None]:
    """The gradients of form(*inputs), by PyTorch operations, so that they have gradients themselves."""
    with torch.enable_grad():
        own = [x if x is None else x.view_as(x) for x in inputs]  # else what one input owes to another would count
        wanted = [x for x in own if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad(form(*own), wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if x is not None and x.requires_grad else None for x in own]


def _four(x: Tensor | None, grouped: bool = False) -> Any:
    """The same rows as [A, B, C, d], the last dimension dense; grouped: the last but one stays C."""
    if x is None:
        return None
    if x.ndim > 4:
        x = x.reshape(-1, *x.shape[-3:])
    before = max(min(x.ndim - 1, 3) - grouped, 0)  # threads share A * B
    x = x[(slice(None),) * before + (None,) * (4 - x.ndim)]
    return rows(x)


def _result(x: Tensor) -> Tensor:
    """Memory for what a function of x returns, in a layout that `_four` takes; no view: it may be overwritten."""
    return torch.empty_like(x) if x.ndim <= 4 and x.stride(-1) == 1 else x.new_empty(x.shape)


@lru_cache(256)
def _bits(x: float) -> int:
    return struct.unpack("q", struct.pack("d", x))[0]


def gated(x: Tensor, by: Tensor | None = None, activation: str = "silu", *, backend: str = "auto") -> Tensor:
    """activation(x) * by, elementwise: the inside of SwiGLU and GeGLU (arXiv 2002.05202).

    x, by: [..., d] of one shape; without `by` the activation alone. activation: a name of `ACTIVATIONS`.
    Raises ValueError for other shapes or names.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"gated: no activation {activation!r}; use one of {', '.join(ACTIVATIONS)}")
    if by is not None and by.shape != x.shape:
        raise ValueError(f"gated: by has shape {tuple(by.shape)}; it must be x's, {tuple(x.shape)}")
    if not compiled(backend, "gated", activation, x, by):
        return _gated_form(x, by, activation)
    if recorded(x, by):
        return _Gated.apply(x, by, activation)
    return _gated(x, by, activation)


def _gated_form(x: Tensor, by: Tensor | None, activation: str) -> Tensor:
    y = ACTIVATIONS[activation](x)
    return y if by is None else y * by


def _gated(x: Tensor, by: Tensor | None, activation: str) -> Tensor:
    x4, m, y = _four(x), _four(by), _result(x)
    y4 = _four(y)
    call("gated_forward", x.dtype, [*x4.shape, KINDS[activation]], pointers(x4, m, y4), strides(3, x4, m, y4))
    return y


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, by: Tensor | None, activation: str) -> Tensor:
        ctx.save_for_backward(x, by)
        ctx.activation = activation
        return _gated(x, by, activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, by = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *again(lambda x, by: _gated_form(x, by, ctx.activation), (x, by), grads), None
        x4, m, g = _four(x), _four(by), _four(grads[0])
        gx, gm = torch.empty_like(x4), None if m is None else torch.empty_like(m)
        call("gated_backward", x.dtype, [*x4.shape, KINDS[ctx.activation]], pointers(x4, m, g, gx, gm),
             strides(3, x4, m, g, gx, gm))
        return gx.reshape(x.shape), None if gm is None else gm.reshape(x.shape), None


def norm(x: Tensor, kind: str = "rms", weight: Tensor | None = None, bias: Tensor | None = None,
         gate: Tensor | None = None, *, eps: float, activation: str = "none", order: str = "norm-gate",
         scale: float = 1.0, backend: str = "auto") -> Tensor:
    """scale * x / size(x) over the last dim, with a weight, a bias and a gate.

    kind: "rms", size = sqrt(mean x^2 + eps) (arXiv 1910.07467); "layer", the same of x - mean(x); "l2",
    sqrt(sum x^2 + eps), which is smooth at zero.

    Args:
        x: [..., d].
        weight, bias: [d], or [G, d] for x [..., G, d]: y = scale * n * weight + bias.
        gate: like x; y is multiplied by activation(gate), or x is before it is normed (order "gate-norm").

    Raises ValueError for other shapes or names.
    """
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and p.shape not in {x.shape[-1:], x.shape[-2:], (1, x.shape[-1])}:
            raise ValueError(f"norm: {name} has shape {tuple(p.shape)} for x of {tuple(x.shape)}; give [d] or [G, d]")
    if weight is not None and bias is not None and weight.shape != bias.shape:
        raise ValueError(f"norm: weight {tuple(weight.shape)} and bias {tuple(bias.shape)} must be of one shape")
    if gate is not None and gate.shape != x.shape:
        raise ValueError(f"norm: the gate has shape {tuple(gate.shape)}; it must be x's, {tuple(x.shape)}")
    if kind not in NORMS or order not in MODES or activation not in ACTIVATIONS:
        raise ValueError(f"norm: kind {kind!r}, order {order!r} or activation {activation!r} does not exist; use "
                         f"{', '.join(NORMS)}; {', '.join(MODES)}; {', '.join(ACTIVATIONS)}")
    options = (kind, eps, activation, order, scale)
    if not compiled(backend, "norm", activation, x, weight, bias, gate):
        return _norm_form(x, weight, bias, gate, options)
    if recorded(x, weight, bias, gate):
        return _Norm.apply(x, weight, bias, gate, options)
    return _norm(x, weight, bias, gate, options)


Options = tuple[str, float, str, str, float]


def _norm_form(x, weight, bias, gate, options: Options, twice: bool = False) -> Tensor:
    """twice: gradients of gradients are wanted."""
    kind, eps, activation, order, scale = options
    factor = None if gate is None else ACTIVATIONS[activation](gate)
    if factor is not None and order == "gate-norm":
        x, factor = x * factor, None
    if kind == "l2":
        y = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)
    elif kind == "layer":
        y = F.layer_norm(x, x.shape[-1:], None, None, eps)
    elif weight is not None and weight.ndim == 1 and _eager() and not twice:
        y, weight = _Rms.apply(x, weight, eps), None
    else:
        y = F.rms_norm(x, x.shape[-1:], None, eps)
    if scale != 1:
        y = y * scale
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y if factor is None else y * factor


def _norm_sizes(x: Tensor, gate: Tensor | None, own: bool, options: Options) -> list[int]:
    kind, eps, activation, order, scale = options
    return [*x.shape, 0 if gate is None else MODES[order], KINDS[activation], kind == "layer", kind != "l2", own,
            _bits(eps), _bits(scale)]


def _grouped(p: Tensor | None) -> bool:
    return p is not None and p.ndim == 2 and p.shape[0] > 1


def _norm(x, weight, bias, gate, options: Options) -> Tensor:
    own = _grouped(weight) or _grouped(bias)
    x4, m, w, b = _four(x, own), _four(gate, own), _dense(weight), _dense(bias)
    y = _result(x)
    y4 = _four(y, own)
    call("norm_forward", x.dtype, _norm_sizes(x4, m, own, options), pointers(x4, w, b, m, y4), strides(3, x4, m, y4))
    return y


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight, bias, gate, options: Options) -> Tensor:
        ctx.save_for_backward(x, weight, bias, gate)
        ctx.options = options
        return _norm(x, weight, bias, gate, options)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, bias, gate = inputs = ctx.saved_tensors
        if torch.is_grad_enabled():

            def form(x, weight, bias, gate) -> Tensor:
                return _norm_form(x, weight, bias, gate, ctx.options, twice=True)

            return *again(form, inputs, grads), None
        own = _grouped(weight) or _grouped(bias)
        x4, m, g, w, b = *(_four(p, own) for p in (x, gate, grads[0])), _dense(weight), _dense(bias)
        gx, (gm, gw, gb) = torch.empty_like(x4), (None if p is None else torch.empty_like(p) for p in (m, w, b))
        p = w if w is not None else b
        parts = None if p is None else x.new_empty(BLOCKS, 2, p.numel())
        call("norm_backward", x.dtype, _norm_sizes(x4, m, own, ctx.options),
             pointers(x4, w, b, m, g, gx, gw, gb, gm, parts), strides(3, x4, m, g, gx, gm))
        return gx.reshape(x.shape), gw, gb, None if gm is None else gm.reshape(x.shape), None


class _Rms(torch.autograd.Function):
    """x / sqrt(mean x^2 + eps) * weight over the last dim, in few passes; the backward pass keeps x and one number a
    row. First-order gradients only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        unit = x * scale
        grad_weight = (grad * unit).flatten(0, -2).sum(0)
        grad = grad * weight
        inner = (grad * unit).mean(-1, keepdim=True)
        return torch.addcmul(grad, unit, inner, value=-1).mul_(scale), grad_weight, None


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, *, backend: str = "auto") -> Tensor:
    """Pairs of the first channels of each row turned by angles, the other channels as they are (RoPE, 2104.09864).

    x: [A, B, C, d]; cos, sin: [., ., ., n], which broadcast over the rows, 2 n <= d; they get no gradients in compiled
    code, and are left to PyTorch where they want them. Pairs are (i, n + i), or (2i, 2i + 1) with `interleaved`.
    Raises ValueError for other shapes.
    """
    if x.ndim != 4 or cos.ndim != 4 or cos.shape != sin.shape or 2 * cos.shape[-1] > x.shape[-1]:
        raise ValueError(f"turned: x {tuple(x.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)} do not fit; give "
                         "[A, B, C, d] and angles [., ., ., n] of one shape with 2 n <= d")
    if recorded(cos, sin) or not compiled(backend, "turned", "none", x, cos, sin):
        return _turned_form(x, cos, sin, interleaved)
    return _Turned.apply(x, cos, sin, interleaved) if recorded(x) else _turned(x, cos, sin, interleaved, False)


def _turned_form(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    dim = 2 * cos.shape[-1]
    first, kept = x[..., :dim], x[..., dim:]
    if interleaved:
        a, b = first[..., 0::2], first[..., 1::2]
        out = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = first.chunk(2, -1)
        out = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([out, kept], -1) if kept.shape[-1] else out


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool) -> Tensor:
    x = _four(x)
    cos, sin = (rows(p).expand(*x.shape[:3], -1) for p in (cos, sin))  # type: ignore[union-attr]
    y = torch.empty_like(x)
    call("turned", x.dtype, [*x.shape, cos.shape[-1], interleaved, back], pointers(x, cos, sin, y),
         strides(3, x, cos, sin, y))
    return y


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turned(x, cos, sin, interleaved, False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _turned_form(grads[0], cos, -sin, ctx.interleaved), None, None, None
        return _turned(grads[0], cos, sin, ctx.interleaved, True), None, None, None
