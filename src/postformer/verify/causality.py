"""Checks that nothing looks ahead, and that documents and padding are what they say."""

from __future__ import annotations

import math

import torch

from postformer.contract import state as states
from postformer.contract.context import Context
from postformer.kernels import use
from postformer.verify.check import FP64, Found, check, ends, not_causal, packed_at
from postformer.verify.compare import error, state_error
from postformer.verify.subject import Subject


@check("causal: a later token changes nothing before it", not_causal)
def perturbed(s: Subject) -> Found:
    x, worst = s.input(2, 37, 3), 0.0
    with torch.no_grad():
        y = s(x)[0].y
        for t in (1, 16, 36):
            changed = x.clone()
            changed[:, t:] = s.input(2, 37 - t, 4) * 3
            worst = max(worst, error(s(changed)[0].y[:, :t], y[:, :t]))
    return worst, 1e-12, ""


@check("causal: no gradient from an output to a later token", not_causal)
def causal_gradient(s: Subject) -> Found:
    x, worst = s.input(2, 37, 3).requires_grad_(), 0.0
    y = s(x)[0].y
    for t in (1, 16, 36):
        (g,) = torch.autograd.grad(y[:, :t].square().sum(), x, retain_graph=True)
        largest, later = g.abs().max().item(), g[:, t:].abs().max().item()
        if not math.isfinite(largest):
            return math.inf, 1e-14, "a gradient is not finite"
        worst = max(worst, later / largest if largest else 0.0)
    return worst, 1e-14, "an FFT rounds" if worst else ""


@check("packed documents = separate documents", not_causal)
def packed(s: Subject) -> Found:
    lengths = [7, 30, 1, 19]
    x, boundary = s.input(2, sum(lengths), 10), packed_at(s, lengths, 2)
    with torch.no_grad():
        out, after = s(x, None, Context(boundary=boundary))
        worst, at = 0.0, 0
        for i, n in enumerate(lengths):
            alone, state = s(x[:, at : at + n])
            worst = max(worst, error(out.y[:, at : at + n], alone.y))
            if i == len(lengths) - 1:
                worst = max(worst, state_error(after, state))
            at += n
        # a boundary at the first token of a call ends what the state holds; rows may differ
        boundary = torch.zeros(2, 11, dtype=torch.int8)
        boundary[0, 0] = ends(s)[0]
        y = s(x[:, 20:31], s(x[:, :20])[1], Context(boundary=boundary))[0].y
        worst = max(worst, error(y[:1], s(x[:1, 20:31])[0].y), error(y[1:], s(x[1:, :31])[0].y[:, 20:]))
    return worst, FP64, ""


@check("a boundary below the level at which a memory forgets changes nothing", not_causal)
def levels(s: Subject) -> Found:
    x, below = s.input(2, 37, 10), ends(s)[1]
    boundary = torch.zeros(2, 37, dtype=torch.int8)
    boundary[0, 11] = boundary[1, 20] = below
    with torch.no_grad():
        out, after = s(x)
        ended, ended_after = s(x, None, Context(boundary=boundary))
    note = "" if below else "a memory forgets at every boundary"
    return max(error(ended.y, out.y), state_error(ended_after, after)), FP64, note


@check("nothing of a finished document is left: outputs and gradients, decay x 0.1, 60", not_causal)
def forgotten(s: Subject) -> Found:
    lengths, worst = [23, 14], 0.0
    boundary = packed_at(s, lengths, 2)
    for scale in (0.1, 60.0):
        x = s.input(2, 37, 11).requires_grad_()
        with use(decay_scale=scale):
            y = s(x, None, Context(boundary=boundary))[0].y[:, 23:]
            (g,) = torch.autograd.grad(y.square().sum(), x)
            with torch.no_grad():
                other = torch.cat([s.input(2, 23, 12) * 10, x[:, 23:]], 1)
                changed = s(other, None, Context(boundary=boundary))[0].y[:, 23:]
        worst = max(worst, g[:, :23].abs().max().item(), error(changed, y))
    return worst, 1e-13, ""


@check("garbage at tokens that do not exist changes nothing; they count as removed", not_causal)
def padding(s: Subject) -> Found:
    x = s.input(2, 37, 15)
    valid = torch.rand(2, 37, generator=torch.Generator().manual_seed(16)) > 0.4
    valid[0, :6], valid[1, -5:], valid[:, 20] = False, False, True
    junk = torch.where(valid[..., None], x, 1e3 * s.input(2, 37, 17))
    with torch.no_grad():
        start = s(s.input(2, 6, 18))[1]
        out, after = s(x, start, Context(valid=valid))
        out2, after2 = s(junk, start, Context(valid=valid))
        worst = max(error(out2.y, out.y), state_error(after2, after))
        if bool(out.y[~valid].any()):
            return math.inf, FP64, "y is not zero at an invalid token"
        for i in range(2):
            alone, state = s(x[i : i + 1, valid[i]], states.select(start, [i]))
            worst = max(worst, error(out.y[i : i + 1, valid[i]], alone.y),
                        state_error(states.select(after, [i]), state))
        # packing and padding together: a document that starts at a token that does not exist still starts
        boundary = torch.zeros(2, 37, dtype=torch.int8)
        boundary[0, 3] = boundary[1, 20] = ends(s)[0]
        y = s(x, start, Context(valid=valid, boundary=boundary))[0].y
        for i, cut in enumerate((3, 20)):
            keep = valid[i].clone()
            keep[:cut] = False
            worst = max(worst, error(y[i : i + 1, keep], s(x[i : i + 1, keep])[0].y))
    return worst, FP64, ""
