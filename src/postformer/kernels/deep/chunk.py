"""Deep memories a chunk at a time.

With (L_a)_ti = prod_{i < l <= t} a_l, which is lower triangular, and Omega_ti = theta_t weight_i inside the window:

    Z_t = (prod eta) Z_0 - sum_i (L_eta Omega)_ti grad_i
    A_t = (prod gamma) A_0 + f_t Z_0 - sum_i G_ti grad_i      G = L_gamma Diag(m) L_eta Omega,  f = L_gamma (m prod eta)

With grad_i = a_i r_i^T, x_t^T A_t needs only x_t^T A_0, x_t^T Z_0 and the products x_t . a_i.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import DeepState, Gates, Rule, Window, choose_rows, clipped, joined, settled, spread
from .grid import Grid


class Sums(NamedTuple):
    """How a row's tokens add up, with leading dims [B, H]; None: not at all, or a factor of one."""

    kept: Tensor | None
    """[..., S, 1], prod gamma"""
    pushed: Tensor | None
    """[..., S, 1], f"""
    g: Tensor | None
    """G [..., S, c - 1 + S], or its last row only"""
    eta: Tensor | None
    """[..., 1, 1], prod eta over the row"""
    z: Tensor | None
    """[..., c - 1 + S], the last row of L_eta Omega"""
    far: Tensor | None
    """[...]: what the row adds to the step (Muon)"""


def ltri(log_a: Tensor) -> Tensor:
    """[..., S] -> [..., S, S]: prod_{i < l <= t} a_l for i <= t, else 0. Only sums of logs, no differences."""
    S = log_a.shape[-1]
    low = torch.ones(S, S, dtype=torch.bool, device=log_a.device).tril()
    sums = log_a[..., :, None].expand(*log_a.shape, S).masked_fill(~low.tril(-1), 0).cumsum(-2)
    return sums.masked_fill(~low, float("-inf")).exp()


def sums_of(gates: Gates, rule: Rule, taken: Tensor | None) -> Sums:
    """Gates [..., S] (write [..., S]) of rows -> how their tokens add up. taken: [..., S] bool, None: all."""
    theta, m = gates.theta, gates.m
    S, c = theta.shape[-1], rule.window
    lg = gates.log_gamma
    kept = None if lg is None else lg.cumsum(-1).exp()[..., None]
    rate = theta
    if rule.orthogonal:
        rate = gates.write if gates.write is not None else torch.ones_like(theta)
        if gates.write is None and taken is not None:
            rate = taken.to(theta.dtype).expand_as(theta)
    one = torch.ones_like(theta) if gates.weight is None else gates.weight
    if c == 1:
        omega: Tensor | None = None
        scale = rate * one
    else:
        takes = torch.ones_like(theta, dtype=torch.bool) if taken is None else taken.expand_as(theta)
        rank = takes.long().cumsum(-1)
        before = torch.arange(2 - c, 1, device=rank.device).expand(*rank.shape[:-1], c - 1)
        columns = torch.cat([before, rank], -1)[..., None, :]
        # A token that does not take part would be the next one.
        rows = (rank + (~takes).long())[..., None]
        own = torch.eye(S, dtype=torch.bool, device=theta.device)
        earlier = F.pad(takes[..., None, :] & own.logical_not().tril(), (c - 1, 0), value=True)
        inside = earlier & (columns <= rows) & (columns > rows - c) | F.pad(own, (c - 1, 0))
        later = one if gates.write is None else one * gates.write
        weight = torch.where(own, one[..., None, :], later[..., None, :])
        # The window's own weights stand in the state; they are multiplied in where the gradients are taken.
        weight = F.pad(weight, (c - 1, 0), value=1.0)
        omega, scale = torch.where(inside, weight, 0) * rate[..., None], rate

    if gates.log_eta is None:
        lz, eta, z = omega, None, None
    else:
        le = ltri(gates.log_eta)
        lz = le * scale[..., None, :] if omega is None else le @ omega
        eta = gates.log_eta.cumsum(-1).exp()
        z = lz[..., -1, :]
    if rule.visible == "chunk":
        lgm = (torch.ones_like(theta) if lg is None else _after(lg).exp())[..., None, :]
    else:
        lgm = ltri(torch.zeros_like(theta) if lg is None else lg)
    far = (lgm[..., -1, :] * theta).sum(-1) if rule.orthogonal else None
    pushed = None
    if m is not None:
        lgm = lgm * m[..., None, :]
        assert eta is not None
        pushed = lgm @ eta[..., None]
        eta = eta[..., -1, None, None]
    if rule.orthogonal:
        return Sums(kept, None, None, eta, z, far)
    g = lgm * scale[..., None, :] if lz is None else lgm @ lz
    return Sums(kept, pushed, g, eta, z, far)


def _after(log_a: Tensor) -> Tensor:
    """Sum over the tokens after each, [..., S]; sums only."""
    return F.pad(log_a[..., 1:].flip(-1).cumsum(-1).flip(-1), (0, 1))


def deep_chunked(
    learner: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    extra: Tensor | None,
    state: DeepState,
    initial: DeepState | None,
    rule: Rule,
    grid: Grid,
    taking: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, DeepState]:
    """Arguments as in `deep`, gates applied."""
    length, c = q.shape[2], rule.window
    lay = grid.lay
    # Which slots hold a token that takes part: empty ones and those that only read do not.
    takes: Tensor | None = None
    if c > 1 or rule.orthogonal:
        here = torch.ones_like(gates.theta[:, :1])
        for mask in (valid, taking):
            here = here if mask is None else here * mask[:, None].to(here.dtype)
        takes = torch.stack(lay(here)) > 0
    sums = sums_of(gates.map(lambda x: torch.stack(lay(x))), rule, takes)
    rows = [Sums(*(None if x is None else x[n] for x in sums)) for n in range(grid.rows)]
    qs, ks, vs = lay(q), lay(k), lay(v)
    extras = None if extra is None else lay(extra)
    laters = None
    if c > 1:
        one = torch.ones_like(gates.theta) if gates.weight is None else gates.weight
        laters = lay(one if gates.write is None else one * gates.write)

    out = []
    for n, s in enumerate(rows):
        if grid.some_fresh[n]:
            assert grid.fresh is not None
            state = choose_rows(grid.fresh[:, n], initial, state)
        seen = Window(ks[n], vs[n], ks[n][..., 0], None if extras is None else extras[n])
        window = state.window
        counts = None
        if window is not None and laters is not None:
            seen = joined(window, seen._replace(weight=laters[n]))
            counts = torch.cat([window.weight, torch.ones_like(laters[n])], 2)
            assert takes is not None
            window = _last(seen, takes[n], c - 1)
        pairs = clipped(learner.gradients(seen.k, seen.v, state.frozen, seen.extra), seen.k.shape[2], rule.clip)
        if counts is not None:
            pairs = [(a, r * spread(counts, r)) for a, r in pairs]

        if rule.visible == "token":
            out.append(learner.predict(qs[n], _reader(state, s, pairs)))
        else:
            out.append(learner.predict(qs[n], lambda i, x, frozen=state.frozen: x @ frozen[i]))

        running = state.running if s.kept is None else tuple(s.kept[..., -1:, :] * a for a in state.running)
        if s.pushed is not None and state.momentum is not None:
            running = tuple(a + s.pushed[..., -1:, :] * z for a, z in zip(running, state.momentum))
        if s.g is not None:
            running = tuple(w - (a * spread(s.g[..., -1, :], a)).mT @ r for w, (a, r) in zip(running, pairs))
        momentum, step = state.momentum, state.step
        if momentum is not None and s.z is not None and s.eta is not None:
            eta, last = s.eta, s.z
            momentum = tuple(eta * z - (a * spread(last, a)).mT @ r for z, (a, r) in zip(momentum, pairs))
        if step is not None and s.far is not None:
            step = (step if s.kept is None else step * s.kept[..., -1, 0]) + s.far
        state = DeepState(state.frozen, running, momentum, step, window, state.phase)
        if grid.all_full[n]:
            state = settled(state, rule)
        elif grid.some_full[n]:
            state = choose_rows(grid.full[:, n], settled(state, rule), state)
    if grid.ended is not None and initial is not None:
        state = choose_rows(grid.ended, initial, state)
    return grid.collect(out, length), state._replace(phase=grid.phase)


def _reader(state: DeepState, s: Sums, pairs: list[tuple[Tensor, Tensor]]) -> Any:
    """x [B, H, S, d_in] -> x_t^T A_t, without forming A_t."""

    def apply(i: int, x: Tensor) -> Tensor:
        a, r = pairs[i]
        assert s.g is not None
        y = x @ state.running[i]
        if s.kept is not None:
            y = s.kept * y
        if s.pushed is not None and state.momentum is not None:
            y = y + s.pushed * (x @ state.momentum[i])
        return y - (s.g * (x @ a.mT)) @ r

    return apply


def _last(seen: Window, taken: Tensor, n: int) -> Window:
    """The last n of the window's tokens and the row's taking ones (taken [B, 1, S])."""
    taken = F.pad(taken[:, 0], (n, 0), value=True)
    order = torch.argsort(taken.to(torch.uint8), dim=1, stable=True)[:, -n:]

    def pick(x: Tensor) -> Tensor:
        index = order.view(order.shape[0], 1, n, *(1,) * (x.ndim - 3))
        return x.gather(2, index.expand(-1, x.shape[1], -1, *x.shape[3:]))

    return Window(pick(seen.k), pick(seen.v), pick(seen.weight), None if seen.extra is None else pick(seen.extra))
