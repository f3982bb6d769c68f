"""The recurrence's chunks as Triton kernels, for GPUs, as operators that `torch.compile` and fake tensors know.

Triton is imported when they first run. Inputs may be half precision; states, gradients before they are handed out and
all that decays are fp32. What the backward pass needs besides the inputs is computed again.
"""

# Arguments that come together are None together, and kernels are launched by subscript: the checker follows neither.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..gpu import device as triton_device
from ..native import rows
from .reference import gdr_recurrent

Maybe = Tensor | None

MAX_KEYS = 256
"""A state's keys lie in one tile."""


def tokens_per_chunk(micro: int, chunk: int, dk: int) -> int:
    """The largest power of two up to `chunk` whose rows, micro-steps included, fit tiles."""
    most = 64 if dk <= 128 else 32
    while chunk > 1 and chunk * micro > most:
        chunk //= 2
    return chunk


def _power(n: int, least: int = 16) -> int:
    return max(least, 1 << (n - 1).bit_length())


def _strides(x: Maybe) -> tuple[int, ...] | None:
    return None if x is None else x.stride()[:3]


@dataclass(frozen=True)
class _Shape:
    """Sizes of a call, tiles and flags by the names the kernels have for them."""

    B: int
    H: int
    T: int
    dk: int
    dv: int
    C: int
    R: int
    head: bool
    early_erase: bool
    early_read: bool
    half: bool

    @property
    def chunks(self) -> int:
        return -(-self.T // self.C)

    @property
    def heads(self) -> int:
        return self.B * self.H

    @property
    def BL(self) -> int:
        return _power(self.C * self.R)

    @property
    def BK(self) -> int:
        return min(64, _power(self.dk))

    @property
    def BV(self) -> int:
        return min(64, _power(self.dv))

    @property
    def whole(self) -> dict[str, Any]:
        """Tiles of kernels that hold all keys of a state and few values."""
        # Several such tiles must fit the fast memory of small GPUs.
        values = 32 if self.dk <= 64 else 16
        return {"C": self.C, "R": self.R, "BL": self.BL, "BK": _power(self.dk), "BV": min(values, _power(self.dv))}

    @property
    def tiles(self) -> dict[str, Any]:
        return {"C": self.C, "R": self.R, "BL": self.BL, "BK": self.BK, "BV": self.BV}

    @property
    def precision(self) -> dict[str, Any]:
        return {"PRECISION": "tf32" if self.half else "ieee", "num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


HALF = (torch.bfloat16, torch.float16)


def _shape(q: Tensor, g: Tensor, writes: tuple[Maybe, ...], start: Tensor, C: int, R: int, early_erase: bool,
           early_read: bool) -> _Shape:  # fmt: skip
    half = all(x is None or x.dtype in HALF for x in (q, *writes))
    return _Shape(*q.shape, start.shape[-1], C, R, g.shape[-1] == 1, early_erase, early_read, half)


@dataclass
class _Inside:
    """What the kernels make of the inputs: see gdr_triton_forward_kernels. Matrices and ends are of w, then of k."""

    Mq: list[Maybe]
    Me: list[Maybe]
    end: list[Maybe]
    whole: Tensor
    Z: Maybe
    probe: Maybe
    delta: Maybe
    S: Tensor
    last: Tensor


def _given(g: Maybe, q: Tensor) -> Tensor:
    """No decay is a decay of exp(0)."""
    B, H, T, _ = q.shape
    return q.new_zeros(1, dtype=torch.float32).expand(B, H, T, 1) if g is None else rows(g)


def _inside(z: _Shape, q: Tensor, g: Tensor, w: Maybe, e: Maybe, u: Maybe, k: Maybe, v: Maybe,
            start: Tensor) -> _Inside:  # fmt: skip
    """All of the forward pass but its outputs."""
    from ..gpu.tiles import RUN
    from . import gpu_forward as kernels

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    N, G, L = z.chunks, z.heads, z.T * z.R
    flags = {"ERASES": e is not None, "EARLY_ERASE": z.early_erase, "EARLY_READ": z.early_read}
    whole = new(N, G, z.dk)
    Mq, Me, end = ([None, None] for _ in range(3))
    for f, x in enumerate((w, k)):
        if x is None:
            continue
        Mq[f], end[f] = new(N, G, z.BL, z.BL), new(G, L, z.dk)
        Me[f] = None if e is None else new(N, G, z.BL, z.BL)
        given = (q, _strides(q), e, _strides(e), x, _strides(x), g, _strides(g), Mq[f], Me[f])
        sizes = {"C": z.C, "R": z.R, "BL": z.BL, "BK": z.BK}
        if z.head:
            kernels.inside_head[(N, G)](*given, end[f], whole, z.H, z.T, N, z.dk, **sizes, **flags, **z.precision)
        else:
            kernels.inside_channel[(N, G)](*given, end[f], whole, z.H, z.T, N, z.dk, **sizes, RUN=RUN, **flags,
                                           **z.precision)
            kernels.inside_run[(N * z.BL // RUN, G)](*given, z.H, z.T, N, z.dk, **sizes, RUN=RUN, **flags, num_warps=1,
                                                     enable_fp_fusion=True)
    Z = probe = delta = None
    if e is not None:
        Z, probe, delta = new(N, G, z.BL, z.BL), new(G, L, z.dk), new(G, L, z.dv)
        kernels.solve[(N, G)](
            e, _strides(e), u, _strides(u), v, _strides(v), g, _strides(g), Me[0], Me[1], Z, probe, delta, z.H, z.T, N,
            z.dk, z.dv, **z.tiles, RUN=RUN, HEAD=z.head, TARGETS=u is not None, ADDS=k is not None,
            EARLY_ERASE=z.early_erase, **z.precision,
        )
    S, last = new(N, G, z.dk, z.dv), new(z.B, z.H, z.dk, z.dv)
    kernels.states[(-(-z.dv // z.whole["BV"]), G)](
        v, _strides(v), start, whole, probe, delta, *end, S, last, z.H, z.T, N, z.dk, z.dv, **z.whole,
        ERASES=e is not None, ADDS=k is not None, **z.precision,
    )
    return _Inside(Mq, Me, end, whole, Z, probe, delta, S, last)


def _output(q: Tensor, dv: int) -> Tensor:
    """Empty, in memory as q lies, tokens or heads first."""
    B, H, T, _ = q.shape
    return q.new_empty(B, H, T, dv) if q.is_contiguous() else q.new_empty(B, T, H, dv).transpose(1, 2)


@torch.library.custom_op("postformer::gdr_triton", mutates_args=())
def gdr_triton(q: Tensor, g: Maybe, w: Maybe, e: Maybe, u: Maybe, k: Maybe, v: Maybe, start: Tensor, C: int, R: int,
               early_erase: bool, early_read: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Shapes as in `gdr`, of any length; q and writes in half or single precision, the others fp32; C tokens per chunk.

    Returns (o [B, H, T, dv] in q's dtype, last [B, H, dk, dv], S [N, B, H, dk, dv] the state before each chunk), the
    last empty unless `keep`.
    """
    g, start = _given(g, q), start.contiguous()
    q, w, e, u, k, v = map(rows, (q, w, e, u, k, v))
    z = _shape(q, g, (w, e, u, k, v), start, C, R, early_erase, early_read)
    from . import gpu_forward as kernels

    made, o = _inside(z, q, g, w, e, u, k, v, start), _output(q, z.dv)
    kernels.outputs[(z.chunks, z.heads, -(-z.dv // z.BV))](
        q, _strides(q), v, _strides(v), g, _strides(g), *made.Mq, made.S, made.delta, o, _strides(o), z.H, z.T,
        z.chunks, z.dk, z.dv, **z.tiles, HEAD=z.head, ERASES=e is not None, ADDS=k is not None, EARLY_READ=early_read,
        **z.precision,
    )
    S = made.S.unflatten(1, (z.B, z.H)) if keep else start.new_empty(0, *start.shape)
    return o, made.last, S


@gdr_triton.register_fake
def _(q, g, w, e, u, k, v, start, C, R, early_erase, early_read, keep):
    N = -(-q.shape[2] // C) if keep else 0
    return _output(q, start.shape[-1]), start.new_empty(start.shape), start.new_empty(N, *start.shape)


@torch.library.custom_op("postformer::gdr_triton_backward", mutates_args=())
def gdr_triton_backward(
    q: Tensor, g: Maybe, w: Maybe, e: Maybe, u: Maybe, k: Maybe, v: Maybe, start: Tensor, grad_o: Maybe,
    grad_last: Maybe, grad_S: Maybe, C: int, R: int, early_erase: bool, early_read: bool,
) -> list[Tensor]:
    """Gradients of those of q, g, w, e, u, k, v that are given, and of start."""
    from ..gpu.tiles import RUN
    from . import gpu_backward as kernels

    decays, g, start = g is not None, _given(g, q), start.contiguous()
    q, w, e, u, k, v = map(rows, (q, w, e, u, k, v))
    z = _shape(q, g, (w, e, u, k, v), start, C, R, early_erase, early_read)
    B, H, T, N, G, dk, dv = z.B, z.H, z.T, z.chunks, z.heads, z.dk, z.dv
    erases, over_keys, over_values = e is not None, -(-dk // z.BK), -(-dv // z.BV)
    go = rows(q.new_zeros(()).expand(B, H, T, dv) if grad_o is None else grad_o)
    grad_last = torch.zeros_like(start) if grad_last is None else grad_last.contiguous()
    made = _inside(z, q, g, w, e, u, k, v, start)

    def like(x: Maybe) -> Maybe:
        return None if x is None else torch.empty(x.shape, dtype=torch.float32, device=q.device)

    gq, gw, ge, gk, gv = map(like, (q, w, e, k, v))
    gg = q.new_empty((over_keys, B, H, T, 1) if z.head else (1, B, H, T, dk), dtype=torch.float32)
    first, later, grad_start = torch.empty_like(made.S), torch.empty_like(made.S), torch.empty_like(start)
    grad_delta, rho = like(made.delta), like(made.delta)
    reads = {"ERASES": erases, "EARLY_READ": early_read}
    kernels.firsts[(N, G, over_values)](
        q, _strides(q), g, _strides(g), go, _strides(go), made.Mq[0], first, grad_delta, H, T, N, dk, dv, **z.tiles,
        HEAD=z.head, **reads, **z.precision,
    )
    if grad_S is not None and grad_S.numel():
        first += grad_S.flatten(1, 2)
    kernels.states_back[(-(-dv // z.whole["BV"]), G)](
        made.whole, made.probe, made.end[0], first, grad_delta, grad_last, later, grad_start, T, N, dk, dv, **z.whole,
        ERASES=erases, **z.precision,
    )
    rows_only = {"C": z.C, "R": z.R, "BL": z.BL, "BV": z.BV}
    if erases:
        kernels.targets[(N, G, over_values)](made.Z, grad_delta, rho, T, dv, **rows_only, **z.precision)
    if k is not None:
        kernels.values[(N, G, over_values)](
            go, _strides(go), made.Mq[1], made.Me[1], made.end[1], later, rho, gv, H, T, dk, dv, **z.tiles, **reads,
            **z.precision,
        )
    early = {"ERASES": erases, "EARLY_ERASE": early_erase, "EARLY_READ": early_read}
    rows_given = (q, _strides(q), e, _strides(e))
    decay = (g, _strides(g))
    kernels.starts_back[(N, G, over_keys)](
        *rows_given, *decay, go, _strides(go), rho, made.S, later, made.whole, gq, ge, gg, H, T, dk, dv, **z.tiles,
        HEAD=z.head, **early, **z.precision,
    )
    delta = None if made.delta is None else made.delta.view(B, H, T * R, dv)
    gMq = torch.empty_like(next(x for x in made.Mq if x is not None))
    gMe = torch.empty_like(gMq) if erases else None
    for f, (x, gx, written) in enumerate(((w, gw, delta), (k, gk, v))):
        if x is None:
            continue
        kernels.matrices[(N, G)](
            go, _strides(go), rho, written, _strides(written), gMq, gMe, H, T, dv, **rows_only, **reads, **z.precision
        )
        given = (*rows_given, x, _strides(x), *decay)
        ends, grads = (written, _strides(written), later), (gq, ge, gx, gg, H, T, dk)
        if z.head:
            kernels.head_back[(N, G, over_keys)](*given, *ends, made.Mq[f], made.Me[f], gMq, gMe, *grads, dv, **z.tiles,
                                                 **early, **z.precision)
        else:
            kernels.run_back[(N * z.BL // RUN, G, over_keys)](
                *given, gMq, gMe, *grads, C=C, R=R, BL=z.BL, BK=z.BK, RUN=RUN, **early, num_warps=1,
                enable_fp_fusion=True,
            )
            kernels.channel_back[(N, G, over_keys)](*given, *ends, gMq, gMe, *grads, dv, **z.tiles, RUN=RUN, **early,
                                                    **z.precision)
    gu = None if u is None or rho is None else rho.view(B, H, T * R, dv)
    found = (gq, gg.sum(0) if decays else None, gw, ge, gu, gk, gv)
    return [*(x.to(y.dtype) for x, y in zip(found, (q, g, w, e, u, k, v)) if x is not None), grad_start]


@gdr_triton_backward.register_fake
def _(q, g, w, e, u, k, v, start, *_):
    given = (q, g, w, e, u, k, v, start)
    return [x.new_empty(x.shape) for x in given if x is not None]


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, g, w, e, u, k, v, start, *flags, _ = inputs
    ctx.save_for_backward(q, g, w, e, u, k, v, start)
    ctx.flags = flags
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_o: Maybe, grad_last: Maybe, grad_S: Maybe) -> tuple:
    saved = ctx.saved_tensors
    found = iter(gdr_triton_backward(*saved, grad_o, grad_last, grad_S, *ctx.flags))
    return (*(None if x is None else next(found) for x in saved), *(None,) * 5)


gdr_triton.register_autograd(_backward, setup_context=_save)


def runs(backend: str, q: Tensor, g: Maybe, writes: tuple[Maybe, ...], dv: int, C: int, R: int, early_erase: bool,
         early_read: bool) -> bool:  # fmt: skip
    """Whether the kernels take this call: a GPU, no double precision, and they have been found right for its sizes."""
    if backend not in ("auto", "native") or not (q.is_cuda or triton_device.interpreted()):
        return False
    if q.shape[-1] > MAX_KEYS or any(x is not None and x.dtype not in (torch.float32, *HALF) for x in (q, *writes)):
        return False
    kinds = tuple(None if x is None else str(x.dtype)[6:] for x in (q, *writes))
    head = g is None or g.shape[-1] == 1
    device = str(q.device)
    return triton_device.trusted("gdr", device, kinds, q.shape[-1], dv, head, C, R, early_erase, early_read)


def self_test(device: torch.device, kinds: tuple[str | None, ...], dk: int, dv: int, head: bool, C: int, R: int,
              early_erase: bool, early_read: bool) -> None:  # fmt: skip
    """Raise ArithmeticError where results or gradients differ from those of the reference in double precision."""
    B, H, T = 1, 2, C + 3
    generator = torch.Generator().manual_seed(0)

    def new(rows: int, width: int, kind: str | None) -> Maybe:
        if kind is None:
            return None
        x = torch.randn(B, H, rows, width, generator=generator) / width**0.5
        return x.to(device, getattr(torch, kind)).requires_grad_()

    widths = (dk, dk, dk, dv, dk, dv)
    q, *writes = (new(T if i == 0 else T * R, width, kind) for i, (width, kind) in enumerate(zip(widths, kinds)))
    g = -torch.rand(B, H, T, 1 if head else dk, generator=generator)
    g[:, :, 2] = -60.0  # forgets
    g, start = g.to(device).requires_grad_(), torch.randn(B, H, dk, dv, generator=generator).to(device).requires_grad_()
    given = (q, g, *writes, start)
    exact = tuple(None if x is None else x.detach().double().requires_grad_() for x in given)
    o, last, _ = gdr_triton(*given, C, R, early_erase, early_read, False)
    o_, last_, _ = gdr_recurrent(*exact, None, R, early_erase, early_read, None)
    weights = [torch.randn(x.shape, generator=generator).to(device) for x in (o, last)]
    for outputs in ((o, last), (o_, last_)):
        sum(((x * y).sum() for x, y in zip(outputs, weights)), torch.zeros((), device=device)).backward()
    tolerance = 2e-2 if any(kind in ("bfloat16", "float16") for kind in kinds) else 1e-4
    for name, x, y in zip(("o", "state"), (o, last), (o_, last_)):
        triton_device.agree(x, y, tolerance, name)
    for name, x, y in zip(("q", "g", "w", "e", "u", "k_add", "v_add", "state"), given, exact):
        if x is not None and x.grad is not None and y is not None and y.grad is not None:
            triton_device.agree(x.grad, y.grad, tolerance, f"the gradient of {name}")


triton_device.CHECKS["gdr"] = self_test
