"""AffineMemory: a matrix memory whose update is affine in its state, written as the arguments of kernel K1.

    S_t = Diag(exp g_t) S_{t-1} + w_t (u_t - X_t^T e_t)^T + k_add_t v_add_t^T,    o_t = S_t^T q_t
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from postformer.contract import fallback
from postformer.contract.context import EMPTY, Context, gates
from postformer.contract.mixer import Mixer, Out
from postformer.contract.state import State
from postformer.kernels import gdr


class GDR(NamedTuple):
    """Arguments of K1, all [B, H, T, d] ([B, H, R*T, d] for w, e, u, k_add, v_add with R micro-steps per token).

    A delta rule gives `rate` [B, H, R*T, 1] instead of w where it writes along the erased direction, w = rate * e.
    """

    q: Tensor
    g: Tensor | None = None
    """log-decay <= 0, [B, H, T, 1] or [B, H, T, dk], fp32"""
    rate: Tensor | None = None
    w: Tensor | None = None
    e: Tensor | None = None
    u: Tensor | None = None
    k_add: Tensor | None = None
    v_add: Tensor | None = None
    erase_before_decay: bool = False
    read_before_update: bool = False
    aux: Mapping[str, Tensor] = EMPTY
    """What the read needs besides o (output gate, skip term, normaliser floor); not seen by the kernel."""


class AffineState(NamedTuple):
    memory: Tensor
    """[B, H, dk, dv], fp32"""
    local: Any = None
    """State of whatever stands before the kernel (short convolution, token shift, stabiliser)."""


def gated(rule: GDR, ctx: Context) -> GDR:
    """The rule with tick and write gates applied: g * tick; rate, w and k_add * write. Invalid tokens: identity."""
    tick, write = gates(ctx)

    def spread(gate: Tensor, like: Tensor) -> Tensor:
        gate = gate.to(like.dtype)[:, None, :, None]
        steps = like.shape[2] // gate.shape[2]
        return gate.repeat_interleave(steps, 2) if steps > 1 else gate

    if tick is not None and rule.g is not None:
        rule = rule._replace(g=rule.g * spread(tick, rule.g))
    if write is not None:
        rule = rule._replace(
            rate=None if rule.rate is None else rule.rate * spread(write, rule.rate),
            w=None if rule.w is None else rule.w * spread(write, rule.w),
            k_add=None if rule.k_add is None else rule.k_add * spread(write, rule.k_add),
        )
    return rule


class AffineMemory(Mixer):
    """The author writes `rule` (and `read`); the base applies gates and resets, chooses the backend and emits.

    `shape` is (heads, dim_key, dim_value) of the state.
    """

    shape: tuple[int, int, int]
    forget_at: str = "document"

    def rule(self, x: Tensor, state: State, ctx: Context) -> tuple[GDR, State]:
        raise NotImplementedError(f"{type(self).__name__} does not define rule")

    def read(self, o: Tensor, x: Tensor, rule: GDR) -> Tensor:
        """o [B, H, T, dv] -> y [B, T, D_out]"""
        raise NotImplementedError(f"{type(self).__name__} does not define read")

    def publish(self, rule: GDR, o: Tensor) -> Mapping[str, Any]:
        return EMPTY

    def initial_local(self, batch: int) -> State:
        return None

    def initial(self, batch: int, condition: Tensor | None = None) -> AffineState:
        like = next(self.parameters(), torch.empty(0))
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        memory = torch.zeros(batch, *self.shape, dtype=dtype, device=like.device)
        return AffineState(memory, self.initial_local(batch))

    def mix(self, x: Tensor, state: AffineState, ctx: Context) -> Out:
        if ctx.emit and state.local is not None:
            return fallback.by_pieces(self, x, state, ctx, replace(self.traits(self.design), native_emit=False))
        rule, local = self.rule(x, state.local, ctx)
        rule = gated(rule, ctx)
        o, memory, *emitted = gdr(
            rule.q, rule.g, rate=rule.rate, w=rule.w, e=rule.e, u=rule.u, k_add=rule.k_add, v_add=rule.v_add,
            state=state.memory, reset=ctx.reset(self.forget_at), erase_before_decay=rule.erase_before_decay,
            read_before_update=rule.read_before_update, emit=ctx.emit,
        )
        y = self.read(o, x, rule)
        return Out(y, AffineState(memory, local), self.publish(rule, o),
                   emitted=AffineState(emitted[0]) if emitted else None)
