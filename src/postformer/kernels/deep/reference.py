"""Deep memories token by token, every gradient and every weight written out: what chunks are checked against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tape import overwrite, recording
from . import DeepState, Gates, Rule, Window, choose_rows, clipped, joined, settled, spread


def deep_recurrent(
    learner: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    extra: Tensor | None,
    state: DeepState,
    initial: DeepState | None,
    rule: Rule,
    reset: Tensor | None,
    valid: Tensor | None,
    taking: Tensor | None,
) -> tuple[Tensor, DeepState]:
    """Arguments as in `deep`, gates applied."""
    B, T = q.shape[0], q.shape[2]
    out = []
    for t in range(T):
        if reset is not None:
            state = choose_rows(reset[:, t], initial, state)
        taken = torch.ones(B, dtype=torch.bool, device=q.device)
        for mask in (valid, taking):
            taken = taken if mask is None else taken & mask[:, t]
        at = slice(t, t + 1)
        g = gates.map(lambda x, at=at: x[:, :, at])

        # The tokens whose losses this token's step lowers, and how much each counts.
        one = torch.ones_like(g.theta) if g.weight is None else g.weight
        seen, counts = Window(k[:, :, at], v[:, :, at], one, None if extra is None else extra[:, :, at]), one
        later = seen._replace(weight=one if g.write is None else one * g.write)
        if state.window is not None:
            counts = torch.cat([state.window.weight, one], 2)
            seen, later = joined(state.window, seen), joined(state.window, later)
        pairs = learner.gradients(seen.k, seen.v, state.frozen, seen.extra)
        pairs = clipped(pairs, seen.k.shape[2], rule.clip)
        if rule.orthogonal:
            counts = counts * (taken[:, None, None] if g.write is None else g.write)
        else:
            counts = counts * g.theta
        gradient = [(a * spread(counts, a)).mT @ r for a, r in pairs]

        gamma = 1.0 if g.log_gamma is None else g.log_gamma.exp()[..., None]
        running, momentum, step = tuple(gamma * a for a in state.running), state.momentum, state.step
        if momentum is None:
            running = tuple(a - d for a, d in zip(running, gradient))
        else:
            assert g.log_eta is not None
            assert g.m is not None
            eta, m = g.log_eta.exp()[..., None], g.m[..., None]
            momentum = tuple(eta * z - d for z, d in zip(momentum, gradient))
            if rule.orthogonal:
                assert step is not None
                step = (step if g.log_gamma is None else step * g.log_gamma[..., 0].exp()) + g.theta[..., 0]
            else:
                running = tuple(a + m * z for a, z in zip(running, momentum))

        read = running if rule.visible == "token" else state.frozen
        out.append(learner.predict(q[:, :, at], lambda i, x, read=read: x @ read[i]))

        window = None if state.window is None else choose_rows(
            taken, tuple(None if x is None else x[:, :, 1:] for x in later), state.window)
        phase = state.phase + taken.long()
        full = phase == rule.chunk
        state = DeepState(state.frozen, running, momentum, step, window, phase % rule.chunk)
        if recording():  # what a token wrote is new memory, and the frozen weights are the caller's to give away
            overwrite(full, lambda state=state: _leaves(settled(state, rule)), _leaves(state))
        elif bool(full.any()):
            state = choose_rows(full, settled(state, rule), state)
    o = torch.cat(out, 2)
    return (o if valid is None else o.masked_fill(~valid[:, None, :, None], 0)), state


def _leaves(state: DeepState) -> list[Tensor]:
    return [x for part in state for x in ((part,) if isinstance(part, Tensor) else part or ()) if x is not None]
