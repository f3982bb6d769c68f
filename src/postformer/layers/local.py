"""Local mixing before a memory: short causal convolution and token shift, with the same law as every mixer.

Both look at the last few tokens that exist: invalid tokens are skipped (their taps are the valid tokens before them)
and nothing is seen across a document's start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from postformer.contract.context import Context
from postformer.design.cost import Cost
from postformer.kernels.convolution import delayed, short_convolution


class Taps:
    """The valid tokens of x side by side, and what each sees of its past: tokens before it in its document.

    x [B, T, D], past [B, n, D] (the last n tokens of the document so far; zeros where there were none).
    `x`, `before`, `reset`: the arguments of `short_convolution`; `delayed(k)`: the token k before, k = 0..n; `past`:
    what to carry on; `scatter`: results back to their tokens.
    """

    def __init__(self, x: Tensor, past: Tensor, ctx: Context, forget_at: str = "document") -> None:
        self.n, self.length = past.shape[1], x.shape[1]
        segments = ctx.segments(forget_at)
        last = None if segments is None else segments[:, -1:]
        self.order: Tensor | None = None
        self.reset = ctx.reset(forget_at)
        count: Tensor | None = None
        if ctx.valid is not None:
            self.order = torch.argsort((~ctx.valid).to(torch.uint8), dim=1, stable=True)
            count = ctx.valid.sum(1)
            x = x.gather(1, self.order[..., None].expand_as(x))
            if segments is not None:
                segments = segments.gather(1, self.order)
                self.reset = segments != F.pad(segments[:, :-1], (1, 0))
        self.x, self.before = x, past.to(x.dtype)
        kept = None if segments is None else F.pad(segments, (self.n, 0))
        if count is None:
            self.past = x[:, self.length - self.n :] if self.n <= self.length else \
                torch.cat([self.before[:, self.length :], x], 1)
            kept = None if kept is None else kept[:, self.length :]
        else:
            index = count[:, None] + torch.arange(self.n, device=x.device)
            both = torch.cat([self.before, x], 1)
            self.past = both.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
            kept = None if kept is None else kept.gather(1, index)
        if kept is not None:
            assert last is not None
            self.past = self.past * (kept == last)[..., None]

    def delayed(self, k: int) -> Tensor:
        return delayed(self.x, self.before[:, self.n - k :], self.reset, k)[k]

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
        (y,), past = self.parts([x], past, ctx, forget_at)
        return y, past

    def parts(self, xs: Sequence[Tensor], past: Tensor, ctx: Context,
              forget_at: str = "document") -> tuple[list[Tensor], Tensor]:
        """The same of channels that lie in several tensors [B, T, d], d summing to `width`, as in their results."""
        widths, out, after = [x.shape[-1] for x in xs], [], []
        split = (past.split(widths, -1), self.weight.split(widths), None if self.bias is None else
                 self.bias.split(widths))
        for i, x in enumerate(xs):
            taps = Taps(x, split[0][i], ctx, forget_at)
            bias = None if split[2] is None else split[2][i].to(x.dtype)
            y = short_convolution(taps.x, split[1][i].to(x.dtype), bias, taps.before, taps.reset,
                                  self.activation or "none")
            out.append(taps.scatter(y))
            after.append(taps.past.to(past.dtype))
        return out, after[0] if len(after) == 1 else torch.cat(after, -1)


def shift_mixes(x: Tensor, past: Tensor, shares: Sequence[Tensor], ctx: Context,
                forget_at: str = "document") -> tuple[tuple[Tensor, ...], Tensor]:
    """For each share [D], x + share * (the previous token of the document - x), zero before the first (RWKV,
    2305.13048): a convolution of two taps. x [B, T, D], past [B, 1, D] -> as many [B, T, D] as shares, past."""
    taps = Taps(x, past, ctx, forget_at)
    share = torch.stack([s.to(x.dtype) for s in shares])
    mixed = short_convolution(taps.x, torch.stack([share, 1 - share], -1), None, taps.before, taps.reset)
    return tuple(taps.scatter(y) for y in mixed), taps.past.to(past.dtype)
