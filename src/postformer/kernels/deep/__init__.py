"""K3, deep memories: weights of a small network that learn at every token, with gradients taken at the weights that
stood at the start of the token's chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor

from .. import settings
from .grid import grid

Weights = tuple[Tensor, ...]
"""One [B, H, d_in, d_out] per linear map of the network"""
Pairs = list[tuple[Tensor, Tensor]]


class Learner(Protocol):
    """A network made of linear maps, and the loss that its weights are to lower."""

    def predict(self, x: Tensor, apply: Callable[[int, Tensor], Tensor]) -> Tensor:
        """x [B, H, S, dk] -> [B, H, S, dv]; `apply(i, h)` is the i-th linear map of h [B, H, S * P, d_in]."""
        ...

    def gradients(self, k: Tensor, v: Tensor, weights: Weights, extra: Tensor | None) -> Pairs:
        """Per map (a [B, H, S * P, d_in], r [B, H, S * P, d_out]): the loss of token s has the gradient
        sum_p a_sp r_sp^T, rows s * P .. s * P + P - 1 being token s's. P is 1 but where a map's weights are shared."""
        ...


class Window(NamedTuple):
    """The last tokens of the document, whose losses are part of the next tokens' steps."""

    k: Tensor
    """[B, H, c - 1, dk]"""
    v: Tensor
    weight: Tensor
    """[B, H, c - 1], 0 where there was no token"""
    extra: Tensor | None


def joined(before: Window, now: Window) -> Window:
    """One window after the other."""
    extra = None if before.extra is None or now.extra is None else torch.cat([before.extra, now.extra], 2)
    k, v, weight = (torch.cat([a, b], 2) for a, b in zip(before[:3], now[:3]))
    return Window(k, v, weight, extra)


class DeepState(NamedTuple):
    frozen: Weights
    """Where gradients are taken: the weights at the start of the chunk"""
    running: Weights
    """What the updates add up to; the weights themselves, or what a mirror map makes weights of"""
    momentum: Weights | None
    step: Tensor | None
    """[B, H]: how far along the orthogonalised momentum this chunk goes (Muon)"""
    window: Window | None
    phase: Tensor
    """[B] int64: tokens that the chunk has taken"""


class Rule(NamedTuple):
    """What is fixed about a deep memory."""

    chunk: int
    window: int = 1
    visible: Literal["token", "chunk"] = "token"
    """token: a token reads the weights as they are after it; chunk: as they were when the last chunk was complete"""
    orthogonal: bool = False
    """The step is the momentum made orthogonal (Muon), at chunk ends"""
    mirror: Callable[[Weights], Weights] | None = None
    """running -> weights, at chunk ends"""
    clip: float | None = None
    """Gradients of norm n are scaled by 1 / sqrt(1 + (n / clip)^2), token by token"""


class Gates(NamedTuple):
    """Per token and head [B, H, T]; None where nothing of the kind happens."""

    theta: Tensor
    log_gamma: Tensor | None
    log_eta: Tensor | None
    m: Tensor | None
    """How far the momentum moves the weights"""
    weight: Tensor | None
    """Of the token's loss, where losses are summed over a window"""
    write: Tensor | None
    """Of tokens that are later seen through the window, or whose gradients have no theta (Muon)"""

    def map(self, fn: Callable[[Tensor], Tensor]) -> Gates:
        theta, *others = self
        return Gates(fn(theta), *(None if x is None else fn(x) for x in others))


def start(running: Weights, rule: Rule, *, momentum: bool, dims: tuple[int, int], extra: int = 0) -> DeepState:
    """The state of a memory that begins with these running weights [B, H, d_in, d_out]; dims: (dk, dv).

    extra: columns of per-token numbers that the loss takes.
    """
    B, H = running[0].shape[:2]
    first, n = running[0], rule.window - 1
    window = None if not n else Window(
        first.new_zeros(B, H, n, dims[0]), first.new_zeros(B, H, n, dims[1]), first.new_zeros(B, H, n),
        first.new_ones(B, H, n, extra) if extra else None)
    return DeepState(
        weights_of(running, rule), running,
        tuple(torch.zeros_like(w) for w in running) if momentum else None,
        first.new_zeros(B, H) if rule.orthogonal else None,
        window, torch.zeros(B, dtype=torch.long, device=first.device))


def weights_of(running: Weights, rule: Rule) -> Weights:
    return running if rule.mirror is None else rule.mirror(running)


def orthogonal(z: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Newton-Schulz iteration of Muon: z [..., m, n] with its singular values brought to about one (0.7 to 1.2)."""
    x = z * torch.rsqrt(z.square().sum((-2, -1), keepdim=True) + eps**2)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


def settled(state: DeepState, rule: Rule) -> DeepState:
    """The state after the last token of a chunk: the next chunk's gradients are taken at the weights of now."""
    running, step = state.running, state.step
    if rule.orthogonal:
        assert state.momentum is not None
        assert step is not None
        far = step[..., None, None]
        running = tuple(a + far * orthogonal(z) for a, z in zip(running, state.momentum))
        step = torch.zeros_like(step)
    return state._replace(frozen=weights_of(running, rule), running=running, step=step)


def choose_rows(rows: Tensor, new: Any, old: Any) -> Any:
    """Leaf by leaf: new where rows [B] is set, else old."""
    if old is None:
        return None
    if isinstance(old, Tensor):
        return torch.where(rows.view(-1, *(1,) * (old.ndim - 1)), new.to(old.dtype), old)
    parts = [choose_rows(rows, n, o) for n, o in zip(new, old)]
    return type(old)(*parts) if hasattr(old, "_fields") else type(old)(parts)


def clipped(pairs: Pairs, tokens: int, clip: float | None) -> Pairs:
    """Every token's gradient, over all maps, softly held below a norm of `clip`."""
    if clip is None:
        return pairs
    square = pairs[0][0].new_zeros(())
    for a, r in pairs:
        if a.shape[-2] == tokens:
            square = square + a.square().sum(-1) * r.square().sum(-1)
        else:
            gradient = a.unflatten(-2, (tokens, -1)).mT @ r.unflatten(-2, (tokens, -1))
            square = square + gradient.square().sum((-2, -1))
    scale = torch.rsqrt(1 + square / clip**2)
    return [(a, r * spread(scale, r)) for a, r in pairs]


def spread(per_token: Tensor, like: Tensor) -> Tensor:
    """[..., S] -> [..., S * P, 1], as a column for like [..., S * P, d]."""
    times = like.shape[-2] // per_token.shape[-1]
    return (per_token.repeat_interleave(times, -1) if times > 1 else per_token)[..., None]


def _fail(message: str) -> NoReturn:
    raise ValueError(f"deep: {message}")


def _check(q, k, v, theta, others, state: DeepState, rule: Rule, reset, valid, tick, write) -> None:
    if q.ndim != 4 or q.shape[2] < 1:
        _fail(f"q has shape {tuple(q.shape)}; give [B, H, T, dk] with T >= 1")
    for name, x in (("k", k), ("v", v)):
        if x.ndim != 4 or x.shape[:3] != q.shape[:3]:
            _fail(f"{name} has shape {tuple(x.shape)}; its first three sizes must be {tuple(q.shape[:3])}, like q's")
    for name, x in (("theta", theta), *others):
        if x is not None and x.shape != q.shape[:3]:
            _fail(f"{name} has shape {tuple(x.shape)}; give {tuple(q.shape[:3])}")
    tokens = (q.shape[0], q.shape[2])
    for name, x in (("reset", reset), ("valid", valid), ("tick", tick), ("write", write)):
        if x is not None and x.shape != tokens:
            _fail(f"{name} has shape {tuple(x.shape)}; give {tokens}")
    if rule.chunk < 1 or rule.window < 1:
        _fail(f"chunk={rule.chunk} and window={rule.window}; both must be >= 1")
    if rule.visible == "token" and (rule.orthogonal or rule.mirror is not None):
        _fail("weights that are made at chunk ends (Muon, mirror maps) can only be read there; use visible='chunk'")
    if rule.orthogonal and state.momentum is None:
        _fail("orthogonal steps are made of the momentum; give log_eta")
    if (rule.window > 1) != (state.window is not None):
        _fail(f"window={rule.window} does not fit the state; make it with start() and the same rule")


def _wanted(*gates: Tensor | None) -> bool:
    return any(gate is not None and gate.requires_grad for gate in gates)


def deep(
    learner: Learner,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    *,
    state: DeepState,
    rule: Rule,
    log_gamma: Tensor | None = None,
    log_eta: Tensor | None = None,
    weight: Tensor | None = None,
    extra: Tensor | None = None,
    tick: Tensor | None = None,
    write: Tensor | None = None,
    valid: Tensor | None = None,
    reset: Tensor | None = None,
    initial: DeepState | None = None,
    begins: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, DeepState]:
    """Let a network learn key -> value at every token, and read it.

        grad_i = d loss(M(W_n; k_i), v_i) / dW          W_n: the weights at the start of token i's chunk
        Z_t = eta_t Z_{t-1} - theta_t sum_{t - c < i <= t} weight_i grad_i
        A_t = gamma_t A_{t-1} + Z_t,   o_t = M(A_t; q_t)   or   o_t = M(W_n; q_t) (rule.visible = "chunk")

    The chunk is part of the model: it says at which weights gradients are taken (TTT, arXiv 2407.04620; Titans, arXiv
    2501.00663; the sum over c tokens: ATLAS, arXiv 2505.23735). Within it every sum is linear in the gradients, each of
    which is of rank one per map, so all tokens of a chunk are computed at once and read without forming their weights.

    Args:
        learner: the network and its loss.
        q, k: [B, H, T, dk]; v: [B, H, T, dv].
        theta: step size >= 0, [B, H, T].
        log_gamma: log of what is kept of A, <= 0, [B, H, T]; None keeps all.
        log_eta: log of what is kept of Z, <= 0, [B, H, T]; None: no momentum. It must be given exactly if the state
            has a momentum.
        weight: of each token's loss in the windows that it is in, [B, H, T]; None: one.
        extra: [B, H, T, n], per-token numbers for the loss.
        tick, write: [B, T] in [0, 1]; multiply the logs and theta. Where both are zero the token only reads.
        valid: [B, T] bool; a token that is not there changes nothing, and its output is zero.
        reset: [B, T] bool; before these tokens the memory starts afresh, from `initial` and with a new chunk.
        begins: the state is known to stand at the start of a chunk, which need not be asked then.
        backend: "auto", "reference" (token by token) or "parallel" (chunks); the same numbers.

    Returns:
        (o [B, H, T, dv] in q's dtype, state in float32, or float64 for float64 q).

    Raises:
        ValueError: shapes or arguments do not fit together.
    """
    if torch.is_autocast_enabled(q.device.type):
        with torch.autocast(q.device.type, enabled=False):
            return deep(learner, q, k, v, theta, state=state, rule=rule, log_gamma=log_gamma, log_eta=log_eta,
                        weight=weight, extra=extra, tick=tick, write=write, valid=valid, reset=reset, initial=initial,
                        begins=begins, backend=backend)
    _check(q, k, v, theta, (("log_gamma", log_gamma), ("log_eta", log_eta), ("weight", weight)), state, rule, reset,
           valid, tick, write)
    if (log_eta is None) != (state.momentum is None):
        _fail("log_eta and the state's momentum come together; make the state with start(..., momentum=...)")
    if reset is not None and initial is None:
        _fail("reset needs the state that a document begins with; give initial")
    dtype, out_dtype = (torch.float64 if q.dtype == torch.float64 else torch.float32), q.dtype
    q, k, v, theta = (x.to(dtype) for x in (q, k, v, theta))
    log_gamma, log_eta, weight, extra = (
        None if x is None else x.to(dtype) for x in (log_gamma, log_eta, weight, extra))
    scale = settings.current().decay_scale
    if scale != 1.0:
        log_gamma = None if log_gamma is None else log_gamma * scale
        log_eta = None if log_eta is None else log_eta * scale

    taking = None if tick is None or write is None else (tick > 0) | (write > 0)
    exists = None if valid is None else valid.to(dtype)
    tick = exists if tick is None else tick.to(dtype) if exists is None else tick.to(dtype) * exists
    write = exists if write is None else write.to(dtype) if exists is None else write.to(dtype) * exists
    m = None
    if log_eta is not None:
        m = torch.ones_like(theta[:, 0]) if tick is None or write is None else torch.maximum(tick, write)
        m = m[:, None].expand_as(theta)
    if tick is not None:
        log_gamma = None if log_gamma is None else log_gamma * tick[:, None]
        log_eta = None if log_eta is None else log_eta * tick[:, None]
    if write is not None:
        write = write[:, None].expand_as(theta)
        theta = theta * write
    gates = Gates(theta, log_gamma, log_eta, m, weight, write if rule.window > 1 or rule.orthogonal else None)

    backend = settings.choose(backend)
    if backend == "reference":
        from .reference import deep_recurrent

        o, state = deep_recurrent(learner, q, k, v, gates, extra, state, initial, rule, reset, valid, taking)
    elif taking is not None and reset is None and not _wanted(tick, write) and not bool(taking.any()):
        # Nobody learns, and nobody asks what learning would have changed: all tokens read the same weights.
        read = state.running if rule.visible == "token" else state.frozen
        o = learner.predict(q, lambda i, x: x @ read[i])
        o = o if valid is None else o.masked_fill(~valid[:, None, :, None], 0)
    else:
        from .chunk import deep_chunked

        layout = grid(q.shape[2], rule.chunk, state.phase, reset, valid, taking, begins)
        o, state = deep_chunked(learner, q, k, v, gates, extra, state, initial, rule, layout, taking, valid)
    return o.to(out_dtype), state
