"""K1, the general diagonal + rank-one recurrence: one kernel for linear attention, gated linear attention, the delta
rule and all their gated, multi-step and lagged forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import settings
from . import fla, gpu
from .chunk import gdr_chunked
from .operators import gdr_chunks
from .reference import gdr_recurrent

RECURRENT_UP_TO = 3
"""Below this many tokens one chunk costs more than its tokens taken one by one."""


def _fail(message: str) -> NoReturn:
    raise ValueError(f"gdr: {message}")


def _check(q, g, rate, w, e, u, k_add, v_add, state, reset, chunk, emit) -> tuple[int, int]:
    """(micro-steps per token, dv); ValueError where shapes do not fit."""
    if rate is not None:
        if w is not None or e is None:
            _fail("rate is for writes of rate * e: give e and no w with it")
        if rate.shape != (*e.shape[:3], 1):
            _fail(f"rate has shape {tuple(rate.shape)}; give {(*e.shape[:3], 1)}, one per row of e")
        w = e
    if q.ndim != 4:
        _fail(f"q has shape {tuple(q.shape)}; give [B, H, T, dk]")
    B, H, T, dk = q.shape
    if T < 1:
        _fail("q has no tokens; call it with T >= 1")
    first = w if w is not None else k_add
    if first is None:
        _fail("nothing is ever written; give w and e (delta rule), or k_add and v_add (additive write), or both")
    if (w is None) != (e is None):
        _fail("w and e come together; to write without erasing use k_add and v_add")
    if u is not None and w is None:
        _fail("u is the target of the erase and needs w and e; to write it additively pass it as v_add")
    if (k_add is None) != (v_add is None):
        _fail("k_add and v_add come together")
    rows = first.shape[2] if first.ndim == 4 else 0
    if rows == 0 or rows % T:
        _fail(f"writes of shape {tuple(first.shape)} for {T} tokens; give [B, H, R*T, dk] with R >= 1 rows per token")
    values = u if u is not None else v_add if v_add is not None else state
    if values is None:
        _fail("the width of the values is unknown; give u, v_add or state")
    dv = values.shape[-1]
    for name, x, width in (("w", w, dk), ("e", e, dk), ("u", u, dv), ("k_add", k_add, dk), ("v_add", v_add, dv)):
        if x is not None and x.shape != (B, H, rows, width):
            _fail(f"{name} has shape {tuple(x.shape)}; it must be {(B, H, rows, width)}, like the other writes")
    if g is not None:
        if g.shape[:3] != (B, H, T) or g.ndim != 4 or g.shape[3] not in (1, dk):
            _fail(f"g has shape {tuple(g.shape)}; give {(B, H, T, 1)} (per head) or {(B, H, T, dk)} (per channel)")
        if g.dtype not in (torch.float32, torch.float64):
            _fail(f"g is {g.dtype}, too coarse for sums of log-decays; compute it in float32")
    if state is not None and state.shape != (B, H, dk, dv):
        _fail(f"state has shape {tuple(state.shape)}; it must be {(B, H, dk, dv)}")
    if reset is not None and (reset.shape != (B, T) or reset.dtype != torch.bool):
        _fail(f"reset is {reset.dtype} of shape {tuple(reset.shape)}; give bool {(B, T)}")
    if chunk < 1 or chunk & (chunk - 1):
        _fail(f"chunk={chunk} is not a power of two; use 16, 32 or 64")
    if emit is not None and emit < 1:
        _fail(f"emit={emit}; give a number of tokens >= 1 or None")
    return rows // T, dv


Writes = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""w, e, u, k_add and v_add."""

Compiled = Callable[..., Any] | None
"""The operator that runs chunks as compiled code, or None for PyTorch operations."""


def _tokens_per_chunk(T: int, micro: int, chunk: int, q: Tensor, dv: int, compiled: Compiled) -> int:
    """The largest power of two with at most `chunk` rows that is worth its C^2 work, no longer than T tokens need."""
    C = chunk
    if compiled is not None:
        if compiled is gpu.gdr_triton:
            return gpu.tokens_per_chunk(micro, chunk, q.shape[-1])
        C = min(C, 16 if max(q.shape[-1], dv) <= 32 or micro > 1 else 32)
        while C > 1 and C // 2 >= T:
            C //= 2
        return C
    if q.device.type == "cpu":
        while C > 16 and max(q.shape[-1], dv) // 2 < C:
            C //= 2
    while C > 1 and C * micro > max(chunk, 16):
        C //= 2
    while C > 1 and C // 2 >= T:
        C //= 2
    while C > 16 and (-T) % C > T // 4:
        C //= 2
    return C


def gdr(
    q: Tensor,
    g: Tensor | None,
    *,
    rate: Tensor | None = None,
    w: Tensor | None = None,
    e: Tensor | None = None,
    u: Tensor | None = None,
    k_add: Tensor | None = None,
    v_add: Tensor | None = None,
    state: Tensor | None = None,
    reset: Tensor | None = None,
    erase_before_decay: bool = False,
    read_before_update: bool = False,
    chunk: int = 64,
    backend: str = "auto",
    emit: int | None = None,
) -> Any:
    """Run a matrix memory that decays, erases along one direction, writes along another, and is read at every token.

        S_t = D_t S_{t-1} + w_t (u_t - X_t^T e_t)^T + k_t v_t^T      D_t = Diag(exp g_t),  X_t = D_t S_{t-1}
        o_t = S_t^T q_t

    With `erase_before_decay` X_t = S_{t-1} (RWKV-7, arXiv 2503.14456); with `read_before_update` o_t = S_{t-1}^T q_t
    (RWKV-6, arXiv 2404.05892). The delta rule (arXiv 2406.06484, gated 2412.06464) is e = k, rate = beta, u = v; linear
    attention with decay (arXiv 2312.06635, 2405.21060) is the additive pair alone.

    Args:
        q: [B, H, T, dk], already scaled.
        g: log-decay per token, <= 0 (not checked: a positive value grows the state), [B, H, T, 1] per head or
            [B, H, T, dk] per channel, float32 or float64; None for no decay.
        w, e: write and erase directions [B, H, R*T, dk]; come together. w carries the learning rate.
        rate: [B, H, R*T, 1], in the place of w where w = rate * e.
        u: target [B, H, R*T, dv]; None is a target of zero (erase only).
        k_add, v_add: additive write [B, H, R*T, dk] and [B, H, R*T, dv]; come together.
            R >= 1 micro-steps per token are inferred: rows R*t .. R*t+R-1 belong to token t, one after the other. The
            token decays before its first and is read after its last (with `read_before_update`, before decay and all).
        state: [B, H, dk, dv], the memory before the first token; None is zero.
        reset: [B, T] bool; the memory is zero before these tokens, exactly, whatever the flags.
        chunk: upper bound of tokens per parallel chunk, a power of two. Changes speed, not results.
        backend: "auto" (the fastest here), "reference" (token by token), "parallel" (chunks of PyTorch operations),
            "native" (chunks by compiled code, on a CPU with a compiler or a GPU with Triton) or "fla" (kernels of
            flash-linear-attention, on a GPU, for the forms it has).
        emit: also return the memory before tokens 0, emit, 2*emit, ... (before a reset at that token).

    Returns:
        (o, state), or (o, state, emitted) where emit is given: o [B, H, T, dv] in q's dtype; state [B, H, dk, dv] in
        float32 (float64 for float64 q); emitted [B, ceil(T / emit), H, dk, dv] in the state's dtype.

    Raises:
        ValueError: shapes or arguments do not fit together.
        RuntimeError: the backend named in the call cannot run it.

    Half-precision inputs are computed in float32. A token with g = 0, w = 0, k_add = 0 leaves the state as it is.
    Gradients are first-order only in the parallel form.
    """
    micro, dv = _check(q, g, rate, w, e, u, k_add, v_add, state, reset, chunk, emit)
    if torch.is_autocast_enabled(q.device.type):
        with torch.autocast(q.device.type, enabled=False):
            return gdr(
                q, g, rate=rate, w=w, e=e, u=u, k_add=k_add, v_add=v_add, state=state, reset=reset, chunk=chunk,
                backend=backend, erase_before_decay=erase_before_decay, read_before_update=read_before_update,
                emit=emit,
            )
    B, H, T, dk = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out_dtype = q.dtype
    scale = settings.current().decay_scale
    if g is not None and scale != 1.0:
        g = g * scale
    if backend != "fla":
        backend = settings.choose(backend)
    flags = (micro, erase_before_decay, read_before_update)
    recurrent = backend == "reference" or (backend == "auto" and T <= RECURRENT_UP_TO)
    theirs = fla.Call(q, g, rate, w, e, u, k_add, v_add)
    if emit is None and (form := fla.chosen(backend, theirs, state, *flags, reset)):
        return fla.run(form, theirs, q.new_zeros(B, H, dk, dv, dtype=dtype) if state is None else state.to(dtype))
    if rate is not None and e is not None:
        w = e * rate.to(e.dtype)
    writes: Writes = (w, e, u, k_add, v_add)
    compiled: Compiled = None
    size = gpu.tokens_per_chunk(micro, chunk, dk)
    if not recurrent and gpu.runs(backend, q, g, writes, dv, size, *flags):
        compiled = gpu.gdr_triton  # which takes half precision as it is
    else:
        q = q.to(dtype)
        w, e, u, k_add, v_add = (None if x is None else x.to(dtype) for x in writes)
        writes = (w, e, u, k_add, v_add)
    g = None if g is None else g.to(dtype)
    S = q.new_zeros(B, H, dk, dv, dtype=dtype) if state is None else state.to(dtype)
    if recurrent:
        o, S, emitted = gdr_recurrent(q, g, w, e, u, k_add, v_add, S, reset, *flags, emit)
    else:
        if compiled is None and settings.native(backend, q, "gdr"):
            compiled = gdr_chunks
        o, S, emitted = _parallel(q, g, writes, S, reset, flags, chunk, emit, compiled)
    o = o.to(out_dtype)
    return (o, S) if emit is None else (o, S, emitted)


def _parallel(q, g, writes: Writes, S, reset, flags: tuple[int, bool, bool], chunk: int, emit: int | None,
              compiled: Compiled):  # fmt: skip
    """Chunks that start wherever a state is to be emitted, or else one call for each emitted state."""
    T, micro = q.shape[2], flags[0]
    dv = S.shape[-1]
    C = _tokens_per_chunk(T, micro, chunk, q, dv, compiled)
    if emit is None:
        return (*gdr_chunked(q, g, *writes, S, reset, *flags, C, compiled, False)[:2], None)
    common = emit & -emit
    if emit >= T or common >= min(C, 16):
        C = C if emit >= T else min(C, common)
        o, last, states = gdr_chunked(q, g, *writes, S, reset, *flags, C, compiled, True)
        return o, last, states[:: max(1, emit // C)].transpose(0, 1) if emit < T else states[:1].transpose(0, 1)
    w, e, u, k, v = writes
    out, emitted = [], []
    for t in range(0, T, emit):
        stop = min(t + emit, T)
        emitted.append(S)

        def cut(x: Any, n: int = 1, t: int = t, stop: int = stop) -> Any:
            return None if x is None else x[:, :, t * n : stop * n]

        pieces = (cut(q), cut(g), cut(w, micro), cut(e, micro), cut(u, micro), cut(k, micro), cut(v, micro))
        C = _tokens_per_chunk(stop - t, micro, chunk, q, dv, compiled)
        restart = None if reset is None else reset[:, t:stop]
        o, S, _ = gdr_chunked(*pieces, S, restart, *flags, C, compiled, False)
        out.append(o)
    return torch.cat(out, 2), S, torch.stack(emitted, 1)
