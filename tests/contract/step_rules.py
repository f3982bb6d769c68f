"""Rules written as one step: some affine in their state, some nearly so."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from postformer.contract.mixer import StepMemory

WIDTH, HEADS, DK, DV = 12, 2, 4, 6


class Matrix(StepMemory):
    """Projections of a matrix memory; its state is [B, HEADS, DK, DV]."""

    shape: tuple[int, ...] = (HEADS, DK, DV)

    def __init__(self, width=WIDTH, heads=HEADS, dk=DK, dv=DV):
        super().__init__()
        self.dim_in, self.heads, self.dk, self.dv = width, heads, dk, dv
        self.shape = (heads, dk, dv)
        self.q, self.k = nn.Linear(width, heads * dk), nn.Linear(width, heads * dk)
        self.v, self.out = nn.Linear(width, heads * dv), nn.Linear(heads * dv, width)
        self.decay, self.rate = nn.Linear(width, heads * dk), nn.Linear(width, heads)
        self.start = nn.Parameter(torch.randn(heads, dk, dv) * 0.1)

    def initial(self, batch, condition=None):
        return self.start.expand(batch, *self.shape)

    def parts(self, x):
        q, k = (f(x).unflatten(-1, (self.heads, self.dk)) for f in (self.q, self.k))
        return q, F.normalize(k, dim=-1), self.v(x).unflatten(-1, (self.heads, self.dv))

    def forgets(self, x):
        """[B, H, dk, 1] in (0, 1)"""
        return torch.sigmoid(self.decay(x) + 2).unflatten(-1, (self.heads, self.dk, 1))

    def read(self, S, q):
        return self.out(torch.tanh(read(S, q)).flatten(1))


def read(S: Tensor, q: Tensor) -> Tensor:
    return torch.einsum("bhkv,bhk->bhv", S, q)


def outer(k: Tensor, v: Tensor) -> Tensor:
    return k[..., None] * v[..., None, :]


class GatedDelta(Matrix):
    def step(self, x, S):
        q, k, v = self.parts(x)
        S = self.forgets(x).mean(2, keepdim=True) * S
        S = S + torch.sigmoid(self.rate(x))[..., None, None] * outer(k, v - read(S, k))
        return self.read(S, q), S


class GatedLinear(Matrix):
    def step(self, x, S):
        q, k, v = self.parts(x)
        S = self.forgets(x) * S + outer(k, v)
        return self.read(S, q), S


class Shifted(NamedTuple):
    memory: Tensor
    before: Tensor


class Rwkv7(Matrix):
    """Token shift, decay per channel, erasing what stood there before the decay (arXiv 2503.14456)."""

    def __init__(self):
        super().__init__()
        self.shift, self.a = nn.Parameter(torch.rand(WIDTH)), nn.Linear(WIDTH, HEADS * DK)

    def initial(self, batch, condition=None):
        return Shifted(super().initial(batch), self.shift.new_zeros(batch, WIDTH))

    def step(self, x, state):
        S, before = state
        mixed = x + self.shift * (before - x)
        r, k, v = self.parts(mixed)
        a = torch.sigmoid(self.a(mixed)).unflatten(-1, (HEADS, DK))
        S = self.forgets(mixed) * S - outer(a * k, read(S, k)) + outer(k, v)
        return self.read(S, r), Shifted(S, x)


class Odd(Matrix):
    """No paper's: two matrices that rotate into each other, a delta step in the first, the second's key channels
    permuted, a normaliser of their sum and a counter."""

    def initial(self, batch, condition=None):
        S = super().initial(batch)
        return {"first": S, "second": 0.5 * S, "norm": S.new_zeros(batch, HEADS, DK),
                "seen": torch.zeros(batch, dtype=torch.long, device=S.device)}

    def step(self, x, state):
        q, k, v = self.parts(x)
        angle = self.rate(x)[..., None, None]
        a, b = state["first"], state["second"]
        a, b = angle.cos() * a + angle.sin() * b, (angle.cos() * b - angle.sin() * a)[:, :, [2, 0, 3, 1]]
        a = self.forgets(x) * a
        a = a + 0.7 * outer(k, v - read(a, k))
        b = 0.9 * b
        norm = 0.95 * state["norm"] + k
        y = self.read(a + b, q / (1 + (norm * q).sum(-1, keepdim=True).abs())) / (1 + state["seen"])[:, None].sqrt()
        return y, {"first": a, "second": b, "norm": norm, "seen": state["seen"] + 1}


class Mixing(Matrix):
    """Keys from the left, values from the right: affine, but not the same for every value column."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.right = nn.Parameter(torch.randn(self.dv, self.dv) / self.dv**0.5)

    def step(self, x, S):
        q, k, v = self.parts(x)
        S = S - 0.5 * outer(k, read(S, k))
        S = 0.9 * S @ self.right + outer(k, v)
        return self.read(S, q), S


class Right(Matrix):
    """Acts on the values alone."""

    def __init__(self):
        super().__init__()
        self.right = nn.Parameter(torch.randn(DV, DV) / DV**0.5)

    def step(self, x, S):
        q, k, v = self.parts(x)
        S = 0.8 * S @ self.right + outer(k, v)
        return self.read(S, q), S


class Turning(StepMemory):
    """A complex vector, turned and shrunk."""

    def __init__(self):
        super().__init__()
        self.dim_in = WIDTH
        self.gate, self.inp, self.out = (nn.Linear(WIDTH, 8) for _ in range(3))
        self.out = nn.Linear(8, WIDTH)

    def initial(self, batch, condition=None):
        dtype = torch.complex128 if self.gate.weight.dtype == torch.float64 else torch.complex64
        return torch.zeros(batch, 8, dtype=dtype, device=self.gate.weight.device)

    def step(self, x, h):
        angle = self.gate(x)
        h = torch.polar(0.9 * torch.sigmoid(angle + 2), angle).to(h.dtype) * h + self.inp(x)
        return self.out(h.real.tanh() + h.imag), h


class Window(StepMemory):
    """The last three tokens and a small dense recurrence over their mean."""

    def __init__(self):
        super().__init__()
        self.dim_in = WIDTH
        self.inp, self.out = nn.Linear(WIDTH, 5), nn.Linear(5, WIDTH)
        self.dense = nn.Parameter(torch.randn(5, 5) * 0.3)

    def initial(self, batch, condition=None):
        zero = self.dense.new_zeros
        return (zero(batch, 3, WIDTH), [zero(batch, 5), None])

    def step(self, x, state):
        taps, (h, nothing) = state
        taps = torch.cat([taps[:, 1:], x[:, None]], 1)
        h = (h @ self.dense) * torch.sigmoid(self.inp(taps.prod(1))) + self.inp(taps.mean(1))
        return self.out(h) + taps[:, 0], (taps, [h, nothing])


AFFINE = [GatedDelta, GatedLinear, Rwkv7, Odd, Mixing, Right, Turning, Window]


class Spoilt(GatedDelta):
    """A gated delta step with something done to its new state."""

    def __init__(self, fault):
        super().__init__()
        self.fault, self.gain, self.count = fault, nn.Parameter(torch.zeros(())), 0

    def step(self, x, S):
        if self.fault == "in place":
            S.mul_(0.9)
        y, new = super().step(x, S)
        self.count += 1
        return y, {
            "small tanh": lambda: new + 1e-4 * torch.tanh(S),
            "tiny tanh": lambda: new + 1e-8 * torch.tanh(S),
            "hidden by a zero": lambda: new + self.gain * torch.tanh(S),
            "clamp": lambda: new.clamp(-300, 300),
            "clamp of the row": lambda: new / (new.flatten(1).norm(dim=1) / 1e5).clamp_min(1)[:, None, None, None],
            "normalised": lambda: new / (1 + 1e-3 * new.square().sum((2, 3), keepdim=True)).sqrt(),
            "where": lambda: torch.where(S > 0, new, 0.5 * new),
            "rounded": lambda: new.to(torch.bfloat16).to(new.dtype),
            "single": lambda: new.float().to(new.dtype),
            "noise": lambda: new + 1e-3 * torch.randn_like(new),
            "company": lambda: new + 0.1 * new.mean(0),
            "memory of its own": lambda: new + self.count,
            "own gradient": lambda: new + 0.1 * S - 0.1 * S.detach(),
            "far away": lambda: torch.where(S.abs() > 1e9, 0.5 * new, new),
        }.get(self.fault, lambda: new)()
