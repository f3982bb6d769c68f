"""Linear maps that are not dense.

Ternary (BitNet b1.58, 2402.17764): with beta = mean |W| and, for each token, gamma = max |x|,

    y = beta gamma / 127  W_q x_q,      W_q = clip(round(W / beta), -1, 1),   x_q = round(127 x / gamma)

Halves are rounded towards zero, with a margin (MARGIN).

LoRA (2106.09685): y = W x + alpha / r  B A x, with W frozen and B = 0 at the start.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from postformer.design.linear import Linear as Design
from postformer.design.linear import Lora, Ternary
from postformer.kernels import current

SMALLEST = 1e-5
"""Of beta and gamma, so that zeros can be divided by them"""
MARGIN = {torch.float32: 6.18034e-7, torch.float64: 6.18034e-10}
"""Outputs of a ternary map are whole numbers times a unit. Where a token's channels are still in such ratios (a memory
that kept one value, a squared ReLU), 127 x / gamma is often a half exactly, and the last bit of x, which depends on the
order of sums, would decide. Made smaller by this share, such halves stand clearly on one side. No ratio of small whole
numbers lies as near to the edge that moves with them."""


class _Rounded(torch.autograd.Function):
    """round(x * scale * (1 - margin)) cut to +- limit, with the gradient of x * scale; the scale gets none."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, margin: float, limit: int) -> Tensor:
        return (x * (scale * (1 - margin))).round_().clamp_(-limit, limit)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float, int], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return grad * ctx.saved_tensors[0], None, None, None


def rounded(x: Tensor, scale: Tensor, limit: int, margin: float = 0.0) -> Tensor:
    """x * scale as whole numbers within +- limit, straight through; not rounded under kernels.use(rounding=False)."""
    return _Rounded.apply(x, scale, margin, limit) if current().rounding else x * scale


def ternary_weight(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [...] -> (W_q [...] in {-1, 0, 1}, straight through; beta [])"""
    w = w if w.dtype == torch.float64 else w.float()
    scale = 1 / w.detach().abs().mean().clamp_min(SMALLEST)
    return rounded(w, scale, 1), 1 / scale


def integer_tokens(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """x [..., d] -> (integers [..., d] of at most 2^(bits - 1) - 1, straight through; their unit [..., 1])"""
    x = x if x.dtype == torch.float64 else x.float()
    limit = 2 ** (bits - 1) - 1
    scale = limit / x.detach().abs().amax(-1, keepdim=True).clamp_min(SMALLEST)
    return rounded(x, scale, limit, MARGIN[x.dtype]), 1 / scale


class TernaryLinear(nn.Linear):
    """x [..., d_in] -> [..., d_out]. The product itself is one of integers and therefore exact, in whatever order it
    is summed (in fp32 up to d_in of 130,000)."""

    def __init__(self, design: Ternary, d_in: int, d_out: int, bias: bool) -> None:
        super().__init__(d_in, d_out, bias=bias)
        self.design = design

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        if self.design.norm == "rms":
            x = F.rms_norm(x if dtype == torch.float64 else x.float(), (self.in_features,), None, self.design.eps)
        w, unit = ternary_weight(self.weight)
        if self.design.activations != "none":
            x, of_token = integer_tokens(x, self.design.activations)
            unit = unit * of_token
        y = F.linear(x.to(dtype), w.to(dtype)).mul_(unit)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class LoraLinear(nn.Linear):
    """x [..., d_in] -> [..., d_out]"""

    def __init__(self, design: Lora, d_in: int, d_out: int, bias: bool) -> None:
        super().__init__(d_in, d_out, bias=bias)
        rank = design.inner(d_in, d_out)
        self.lora_a = nn.Parameter(torch.randn(rank, d_in) * d_in**-0.5)
        self.lora_b = nn.Parameter(torch.zeros(d_out, rank))
        self.scale = (design.alpha or design.rank) / design.rank
        self.weight.requires_grad_(design.train_base)
        if self.bias is not None:
            self.bias.requires_grad_(design.train_base)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)

    def merged(self) -> Tensor:
        """The weight [d_out, d_in] of the dense map that does the same."""
        return self.weight + self.scale * self.lora_b @ self.lora_a


def silent_at_zero(made: nn.Linear) -> list[str]:
    """The names of the parameters that make y = 0 for every x when they are zero. A low-rank update is silent by B
    alone, so that B still has a gradient."""
    bias, low_rank = made.bias is not None, isinstance(made, LoraLinear)
    return ["weight", *(["bias"] if bias else []), *(["lora_b"] if low_rank else [])]


def make_linear(design: Design, d_in: int, d_out: int, bias: bool = False) -> nn.Linear:
    """The map a design names, as torch initialises it."""
    if isinstance(design, Ternary):
        return TernaryLinear(design, d_in, d_out, bias)
    if isinstance(design, Lora):
        return LoraLinear(design, d_in, d_out, bias)
    return nn.Linear(d_in, d_out, bias=bias)
