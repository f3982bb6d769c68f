"""Local mixing before a memory: short causal convolution and token shift, with the same law as every mixer.

Both look at the last few tokens that exist: invalid tokens are skipped (their taps are the valid tokens before them)
and nothing is seen across a document's start.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from postformer.contract.context import Context
from postformer.design.cost import Cost


class Taps:
    """Views of x shifted into the past, over valid tokens of the same document only.

    x [B, T, D], past [B, n, D] (the last n tokens of the document so far; zeros where there were none).
    `delayed(k)`: the token k before, k = 0..n; `past`: what to carry on; `scatter`: results back to their tokens.
    """

    def __init__(self, x: Tensor, past: Tensor, ctx: Context, forget_at: str = "document") -> None:
        self.n, self.length = past.shape[1], x.shape[1]
        segments = ctx.segments(forget_at)
        last = None if segments is None else segments[:, -1:]
        self.order: Tensor | None = None
        count: Tensor | None = None
        if ctx.valid is not None:
            self.order = torch.argsort((~ctx.valid).to(torch.uint8), dim=1, stable=True)
            count = ctx.valid.sum(1)
            x = x.gather(1, self.order[..., None].expand_as(x))
            segments = None if segments is None else segments.gather(1, self.order)
        self.extended = torch.cat([past.to(x.dtype), x], 1)
        self.segments = None if segments is None else F.pad(segments, (self.n, 0))
        if count is None:
            self.past = self.extended[:, self.length:]
            kept = None if self.segments is None else self.segments[:, self.length:]
        else:
            index = count[:, None] + torch.arange(self.n, device=x.device)
            self.past = self.extended.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
            kept = None if self.segments is None else self.segments.gather(1, index)
        if kept is not None:
            assert last is not None
            self.past = self.past * (kept == last)[..., None]

    @property
    def plain(self) -> bool:
        """No document starts inside: the extended sequence is one document."""
        return self.segments is None

    def delayed(self, k: int) -> Tensor:
        start = self.n - k
        value = self.extended[:, start : start + self.length]
        if self.segments is None or k == 0:
            return value
        same = self.segments[:, start : start + self.length] == self.segments[:, self.n :]
        return value * same[..., None]

    def scatter(self, y: Tensor) -> Tensor:
        if self.order is None:
            return y
        return torch.zeros_like(y).scatter(1, self.order[..., None].expand_as(y), y)


class ShortConvolution(nn.Module):
    """Depthwise causal convolution of `size` taps, then an activation (Mamba, 2312.00752).

    forward(x [B, T, D], past [B, size - 1, D], ctx) -> (y [B, T, D], past)
    """

    def __init__(self, width: int, size: int = 4, bias: bool = False, activation: str | None = "silu") -> None:
        super().__init__()
        self.size, self.activation = size, activation
        self.weight = nn.Parameter(torch.empty(width, size).uniform_(-(size**-0.5), size**-0.5))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    @classmethod
    def of(cls, width: int, design: Any) -> ShortConvolution | None:
        """What a design's `local` makes in front of `width` channels: None unless it is a convolution."""
        return cls(width, design.size, design.bias, design.activation) if design.kind == "conv" else None

    @staticmethod
    def cost(width: int, design: Any) -> Cost:
        """Of what `of` makes."""
        if design.kind != "conv":
            return Cost()
        return Cost(params=width * (design.size + design.bias), state=4 * width * (design.size - 1))

    def initial(self, batch: int) -> Tensor:
        return self.weight.new_zeros(batch, self.size - 1, self.weight.shape[0])

    def forward(self, x: Tensor, past: Tensor, ctx: Context, forget_at: str = "document") -> tuple[Tensor, Tensor]:
        taps = Taps(x, past, ctx, forget_at)
        weight = self.weight.to(x.dtype)
        y = taps.delayed(0) * weight[:, -1]
        if self.bias is not None:
            y = y + self.bias.to(x.dtype)
        for k in range(1, self.size):
            y = torch.addcmul(y, taps.delayed(k), weight[:, -1 - k])
        if self.activation == "silu":
            y = F.silu(y)
        return taps.scatter(y), taps.past.to(past.dtype)


def token_shift(x: Tensor, past: Tensor, ctx: Context, forget_at: str = "document") -> tuple[Tensor, Tensor]:
    """The previous token of the document (zero for the first): x [B, T, D], past [B, 1, D] -> same shapes (RWKV)."""
    taps = Taps(x, past, ctx, forget_at)
    return taps.scatter(taps.delayed(1)), taps.past.to(past.dtype)
