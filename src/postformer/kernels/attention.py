"""K6, softmax attention (arXiv 1706.03762) over an explicit list of keys and values, windowed or not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import settings
from .tape import fused

SMALLEST_BLOCK = 64
"""Rows per block of a banded read: narrower windows are masked inside it, since tiny products waste more."""


def _check(q, k, v, window, always, own, fields) -> None:
    B, _, T = q.shape[:3]
    S = k.shape[2]
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or k.shape[0] != B or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; "
            "give [B, Hq, T, d], [B, Hk, S, d] and [B, Hk, S, dv]"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"attention: k {tuple(k.shape)} and v {tuple(v.shape)} differ in batch, heads or keys")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: {q.shape[1]} query heads do not divide among {k.shape[1]} key heads")
    if always < 0 or (own and S - always < T):
        raise ValueError(f"attention: {S} keys for {T} queries and always={always}; the last T keys are the queries' "
                         "own tokens, and `always` counts keys before them")
    if not own and (always or fields["key_position"][0] is None or fields["query_position"][0] is None):
        raise ValueError("attention: own=False needs key_position and query_position, and has no `always`")
    if window is not None and window < 1:
        raise ValueError(f"attention: window={window}; give at least 1 (the token itself) or None")
    for name, (x, length) in fields.items():
        if x is not None and x.shape != (B, length):
            raise ValueError(f"attention: {name} has shape {tuple(x.shape)}; it must be {(B, length)}")


def visibility(
    T: int,
    S: int,
    device: torch.device,
    causal: bool,
    window: int | None,
    key_position: Tensor | None,
    query_position: Tensor | None,
    key_segment: Tensor | None,
    query_segment: Tensor | None,
    key_valid: Tensor | None,
    always: int = 0,
    own: bool = True,
) -> Tensor | None:
    """[1 or B, T, S] bool, which keys a query sees; None where it sees all."""
    seen: Tensor | None = None
    if causal or window is not None:
        kp = torch.arange(S, device=device)[None] if key_position is None else key_position
        qp = torch.arange(S - T, S, device=device)[None] if query_position is None else query_position
        age = qp[:, :, None] - kp[:, None, :]
        if causal:
            seen = age >= 0 if window is None else (age >= 0) & (age < window)
            if own and (key_position is not None or query_position is not None):
                seen = seen & torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
        elif window is not None:
            seen = age.abs() < window
    if key_segment is not None and query_segment is not None:
        same = query_segment[:, :, None] == key_segment[:, None, :]
        seen = same if seen is None else seen & same
    if always and seen is not None:
        seen = torch.cat([seen.new_ones(seen.shape[0], T, always), seen[:, :, always:]], 2)
    if key_valid is not None:
        seen = key_valid[:, None, :].expand(-1, T, -1) if seen is None else seen & key_valid[:, None, :]
    return seen


def _reference(q, k, v, seen: Tensor | None, key_bias: Tensor | None, scale: float) -> Tensor:
    """Query by query over its visible keys alone, so that a FLOP counter sees 2 (d + dv) per head and visible key."""
    (B, Hq, T, _), Hk = q.shape, k.shape[1]
    q = q.unflatten(1, (Hk, Hq // Hk)) * scale
    rows = []
    for t in range(T):
        parts = []
        # Rows of the batch are read together where they see the same keys.
        same = seen is None or seen.shape[0] == 1 or bool((seen[:, t] == seen[:1, t]).all())
        for b in [slice(None)] if same else [slice(i, i + 1) for i in range(B)]:
            keys = slice(None) if seen is None else seen[b, t][0].nonzero().squeeze(-1)
            k_b, v_b = k[b][:, :, keys], v[b][:, :, keys]
            logits = q[b, :, :, t] @ k_b.mT
            if key_bias is not None:
                logits = logits + key_bias[b][:, None, None, keys]
            parts.append(logits.softmax(-1) @ v_b)
        rows.append(torch.cat(parts, 0))
    return torch.stack(rows, 3).flatten(1, 2)


def _banded(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, always: int = 0) -> Tensor:
    """Causal attention to the last `window` tokens in O(T * window): each block of queries reads two blocks of keys
    and the first `always` keys, which precede the T tokens."""
    B, _, T, _ = q.shape
    block = max(window, min(SMALLEST_BLOCK, T))
    pad = (-T) % block
    fixed = [x[:, :, None, :always] for x in (k, v)]
    q, k, v = (F.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, block)) for x in (q, k[:, :, always:], v[:, :, always:]))
    N = q.shape[2]
    row, col = torch.arange(block, 2 * block, device=q.device), torch.arange(2 * block, device=q.device)
    age = row[:, None] - col
    band = (age >= 0) & (age < window)
    shown = band.new_ones(block, always)

    def seen(keys: Tensor, which: int) -> Tensor:
        return torch.cat([fixed[which].expand(-1, -1, keys.shape[2], -1, -1), keys], 3) if always else keys

    def blocks(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)

    grouped = q.shape[1] != k.shape[1]
    first = F.scaled_dot_product_attention(
        q[:, :, 0], seen(k[:, :, :1], 0)[:, :, 0], seen(v[:, :, :1], 1)[:, :, 0],
        attn_mask=torch.cat([shown, band[:, block:]], 1), scale=scale, enable_gqa=grouped
    )
    if N == 1:
        return first[:, :, :T]
    k, v = (seen(torch.cat([x[:, :, :-1], x[:, :, 1:]], 3), i) for i, x in enumerate((k, v)))
    rest = F.scaled_dot_product_attention(
        blocks(q[:, :, 1:]), blocks(k), blocks(v), attn_mask=torch.cat([shown, band], 1), scale=scale,
        enable_gqa=grouped
    )
    rest = rest.unflatten(0, (B, N - 1)).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, rest], 2)[:, :, :T]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    key_position: Tensor | None = None,
    query_position: Tensor | None = None,
    key_segment: Tensor | None = None,
    query_segment: Tensor | None = None,
    key_valid: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    always: int = 0,
    own: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention: o_t = sum_s softmax_s(scale q_t . k_s + bias_s) v_s over the keys that the query may see.

    Args:
        q: [B, Hq, T, d]. k, v: [B, Hk, S, d] and [B, Hk, S, dv] with Hq a multiple of Hk (grouped heads,
            arXiv 2305.13245) and S >= T. The last T keys are the queries' own tokens, the first S - T the past.
        causal: a query sees keys of its own and earlier positions, and never a token that comes after it in the list,
            whatever the positions say. False: all keys.
        window: a query sees only keys less than this many positions back (and forward, where causal is False).
        key_position, query_position: [B, S] and [B, T] integers; None: index order, the queries last.
        key_segment, query_segment: [B, S] and [B, T] integers, given together; only equal segments see each other.
        key_valid: [B, S] bool; False: nobody sees the key.
        key_bias: [B, S], added to the logits of a key; -inf hides it.
        scale: factor on q . k; None is d ** -0.5.
        always: the first so many of the S keys stand outside time: no position, segment or window hides them.
        own: False where the keys are a list in which the queries' tokens stand anywhere, or not at all: the positions
            alone say what is seen, and S may be less than T.
        backend: "auto" and "parallel" (scaled_dot_product_attention; in bands where there is a window and no mask),
            or "reference" (query by query).

    Returns:
        [B, Hq, T, dv]; exactly zero, with zero gradient, for a query that sees no key.

    Raises:
        ValueError: shapes do not fit.
    """
    _, Hq, T, d = q.shape
    S = k.shape[2]
    _check(q, k, v, window, always, own, {
        "key_position": (key_position, S), "query_position": (query_position, T), "key_segment": (key_segment, S),
        "query_segment": (query_segment, T), "key_valid": (key_valid, S), "key_bias": (key_bias, S),
    })
    if (key_segment is None) != (query_segment is None):
        raise ValueError("attention: key_segment and query_segment come together")
    scale = float(d**-0.5) if scale is None else scale
    grouped = Hq != k.shape[1]
    masks = (key_position, query_position, key_segment, query_segment, key_valid)
    plain = key_bias is None and all(m is None for m in masks)
    reference = settings.choose(backend) == "reference"
    if plain and not reference:
        if window is not None and window >= S - always:
            window = None
        if window is None and (not causal or T == 1):
            return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
        if causal and S - always == T:
            if window is not None:
                return _banded(q, k, v, window, scale, always)
            if not always:
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        if T == 1 and causal and window is not None:
            k, v = (torch.cat([x[:, :, :always], x[:, :, -window:]], 2) if always else x[:, :, -window:]
                    for x in (k, v))
            return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
    if key_bias is not None:
        shown = key_bias > float("-inf")
        key_valid = shown if key_valid is None else key_valid & shown
        key_bias = key_bias.masked_fill(~shown, 0.0)
    seen = visibility(
        T, S, q.device, causal, window, key_position, query_position, key_segment, query_segment, key_valid, always,
        own
    )
    if reference:
        return _reference(q, k, v, seen, key_bias, scale)
    if seen is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
    # A softmax over nothing is 0/0: such a query reads everything, and its output is put to zero.
    some = seen.any(-1, keepdim=True)
    mask = (seen | ~some)[:, None]
    if key_bias is not None:
        mask = key_bias.to(q.dtype)[:, None, None].expand(-1, 1, T, -1).masked_fill(~mask, float("-inf"))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return torch.where(some[:, None], o, 0.0)


@fused
def attend(q: Tensor, new: Tensor, data: Tensor, count: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention for one token with a list of fixed room: the token is written into place `count` of its row (the oldest
    where the room is used up) and sees what the list then holds.

    q: [B, Hq, d]; new: its key and value [B, 2, Hk, d]; data: [B, room, 2, Hk, d], overwritten; count: [B] int64,
    tokens written so far. Returns (o [B, Hq, d], data). No gradients.
    """
    data[torch.arange(len(q), device=q.device), count % data.shape[1]] = new.to(data.dtype)
    return _list_read(q, data, count + 1, scale), data


@fused
def recall(q: Tensor, data: Tensor, count: Tensor, scale: float) -> Tensor:
    """What one token sees of a list that it is not written into: q [B, Hq, d], data [B, room, 2, Hk, d], count [B]
    int64 entries there (one at least; from `room` on, all) -> [B, Hq, d]. No gradients."""
    return _list_read(q, data, count, scale)


def _list_read(q: Tensor, data: Tensor, count: Tensor, scale: float) -> Tensor:
    k, v = data.to(q.dtype).permute(2, 0, 3, 1, 4)
    seen = (torch.arange(data.shape[1], device=q.device) < count[:, None])[:, None, None]
    grouped = q.shape[1] != k.shape[1]
    o = F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=seen, scale=scale, enable_gqa=grouped)
    return o[:, :, 0].contiguous()
