"""Positions as sines and cosines: rotary (RoPE, 2104.09864) and added (1706.03762), from per-row positions in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from postformer.kernels.rows import turned


def angles(position: Tensor, dim: int, dtype: torch.dtype, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """(cosines, sines) [B, 1, T, dim / 2] of position [B, T] times base^(-2i / dim); for `rotary`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    freq = base ** (-torch.arange(0, dim, 2, dtype=wide, device=position.device) / dim)
    angle = position.to(wide)[:, None, :, None] * freq
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotary(x: Tensor, turn: tuple[Tensor, Tensor], interleaved: bool = False) -> Tensor:
    """Rotate the first channels of x [B, H, T, d], as many as `turn` (from `angles`) is for; the others stay.

    Halves are paired (channel i with i + dim/2) as in Llama; interleaved pairs neighbours (2i, 2i + 1) as in RetNet.
    """
    return turned(x, *turn, interleaved)


def sinusoidal(position: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """position [B, T] -> [B, T, width]: channel 2i holds sin(p / 10000^(2i / width)), channel 2i + 1 its cosine."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    freq = 10000.0 ** (-torch.arange(0, width, 2, dtype=wide, device=position.device) / width)
    angle = position.to(wide)[..., None] * freq
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)[..., :width].to(dtype)
