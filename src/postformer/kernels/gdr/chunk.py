"""The general diagonal + rank-one recurrence in chunks.

Inside a chunk, with delta_t = u_t - X_t^T e_t the error of each erase,

    (I + A) Delta = U - A' V - (e . decay from the chunk's start) S_0,    A_ti = sum_d e_td w_id exp(E_d(i, t)), i < t
    O = (q . decay from the start) S_0 + B Delta + B' V,                  B_ti likewise with q for e
    S_C = (decay of the chunk) S_0 + (w . decay to the end)^T Delta + (k . decay to the end)^T V

where E(i, t) is the sum of log-decays after i up to t. Each E is formed by adding non-positive numbers only: no two
cumulative sums are subtracted and nothing is divided by a decay, so that every exponent is <= 0 whatever the gates.

Legend: N chunks, G = batch * heads, C tokens per chunk, R micro-steps per token; tensors are [N, G, C * R, d].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..settings import recorded
from .channel import ChannelChunks
from .head import HeadChunks

RESET = -1e4
"""A log-decay whose exponential is exactly zero in fp32 and fp64, and which can still be added to others."""


def gdr_chunked(
    q: Tensor,
    g: Tensor | None,
    w: Tensor | None,
    e: Tensor | None,
    u: Tensor | None,
    k_add: Tensor | None,
    v_add: Tensor | None,
    state: Tensor,
    reset: Tensor | None,
    micro: int,
    erase_before_decay: bool,
    read_before_update: bool,
    C: int,
    compiled: Callable[..., Any] | None,
    emits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes as in `gdr`, all floating tensors already in the state's dtype, C tokens per chunk (a power of two).

    compiled: the operator that runs the chunks, or None for PyTorch operations. Returns (o, state, the state before
    every C-th token [N, B, H, dk, dv]); the last is empty where it was neither asked for (`emits`) nor needed for
    gradients.
    """
    (B, H, T, _), R = q.shape, micro
    if reset is not None:
        cut = reset[:, None, :, None]
        if g is None:
            g = state.new_zeros(()).expand(B, H, T, 1)
        g = torch.where(cut, RESET, g)
        # A zero decay does not hide the old state from a row that looks before the decay.
        if read_before_update:
            q = q.masked_fill(cut, 0.0)
        if erase_before_decay and e is not None:
            e = e.unflatten(2, (T, R))
            first = torch.arange(R, device=q.device) == 0
            e = e.masked_fill(cut[..., None] & first[:, None], 0.0).flatten(2, 3)
    pad, flags = (-T) % C, (R, erase_before_decay, read_before_update)
    if compiled is not None:
        inputs = (q, g, w, e, u, k_add, v_add, state)
        keep = emits or recorded(*inputs)
        return compiled(*inputs, C, *flags, keep)[:3]
    if pad:  # with identity tokens
        q, g = F.pad(q, (0, 0, 0, pad)), None if g is None else F.pad(g, (0, 0, 0, pad))
        w, e, u, k_add, v_add = (None if x is None else F.pad(x, (0, 0, 0, pad * R)) for x in (w, e, u, k_add, v_add))
    chunks = HeadChunks if g is None or g.shape[-1] == 1 else ChannelChunks
    o, last, S = chunks.apply(q, g, w, e, u, k_add, v_add, state, C, *flags)
    return o[:, :, :T], last.unflatten(0, (B, H)), S.unflatten(1, (B, H))
