"""Memories that are trained while they are read: TTT, Titans, Moneta, Yaad, Memora, OmegaNet, ATLAS.

Every inner gradient is taken by autograd, token by token, of the inner loss as the papers write it; weights are held
one head at a time. `chunk` tokens share the weights at which their gradients are taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from loops_plain import (
    Here,
    Weights,
    gelu,
    gelu_tanh,
    model_loop,
    model_of,
    projected,
    prove,
    rms,
    rms_norm,
    sigmoid,
    silu,
    softplus,
    standard,
    swiglu,
    unit,
)
from torch import Tensor

H = 2


@dataclass
class Paper:
    """A paper's memory: f(weights, x), loss(prediction, target, huber's bound), and what is done with gradients."""

    net: Callable[[list[Tensor], Tensor], Tensor]
    maps: int
    chunk: int
    rate: float
    loss: Callable[[Tensor, Tensor, Any], Tensor]
    features: Callable[[Tensor], Tensor] = unit
    conv: bool = True
    residual: float | None = None
    """epsilon of the norm in x + LN(f(x))"""
    decay: bool = False
    momentum: bool = False
    window: int = 1
    clip: float | None = None
    weights_of: Callable[[Tensor], Tensor] | None = None
    muon: bool = False
    lagged: bool = False
    read: str = "rms"
    dims: tuple[int, int] = (6, 6)


@dataclass
class Memory:
    frozen: list[Tensor]
    sums: list[Tensor]
    momentum: list[Tensor]
    past: list[tuple[Tensor, Tensor, Tensor, Any]]
    far: Any = 0.0
    age: int = 0


def square(prediction: Tensor, target: Tensor, bound: Any) -> Tensor:
    return ((prediction - target) ** 2).sum() / 2


def cube(prediction: Tensor, target: Tensor, bound: Any) -> Tensor:
    return (((prediction - target) ** 2 + 1e-6) ** 1.5).sum() / 3


def huber(prediction: Tensor, target: Tensor, bound: Any) -> Tensor:
    n = ((prediction - target) ** 2).sum().sqrt()
    return n**2 / 2 if n <= bound else bound * (n - bound / 2)


def linear_with_bias(w: list[Tensor], x: Tensor) -> Tensor:
    return x @ w[0][:-1] + w[0][-1]


def mlp_with_bias(w: list[Tensor], x: Tensor) -> Tensor:
    return gelu_tanh(x @ w[0][:-1] + w[0][-1]) @ w[1][:-1] + w[1][-1]


def mlp(w: list[Tensor], x: Tensor) -> Tensor:
    return gelu(x @ w[0]) @ w[1]


def products(x: Tensor) -> Tensor:
    """The key, normed, and the products of its channels: dot products are k.q + (k.q)^2 / 2."""
    x, d = unit(x), len(x)
    pairs = [x[i] * x[j] * (0.5**0.5 if i == j else 1) for i in range(d) for j in range(i, d)]
    return torch.cat([x, torch.stack(pairs)])


def fourth_powers(a: Tensor) -> Tensor:
    return a / (1 + (a**4).sum()) ** 0.5


def on_a_simplex(a: Tensor) -> Tensor:
    e = torch.exp(a - a.max())
    return 4 * a.shape[1] * e / e.sum()


def orthogonalised(z: Tensor) -> Tensor:
    x = z / ((z**2).sum() + 1e-14).sqrt()
    if x.shape[0] > x.shape[1]:
        return orthogonalised(z.T).T
    for _ in range(5):
        s = x @ x.T
        x = 3.4445 * x - 4.7750 * s @ x + 2.0315 * s @ (s @ x)
    return x


def slope(p: Paper, m: list[Tensor], predict: Any, k: Tensor, v: Tensor, bound: Any) -> list[Tensor]:
    """The gradient of one token's loss with respect to every weight, by autograd."""
    outer = torch.is_grad_enabled()
    with torch.enable_grad():
        at = m if outer else [w.detach().requires_grad_() for w in m]
        found = list(torch.autograd.grad(p.loss(predict(at, k), v, bound), at, create_graph=outer))
    if p.clip is not None:
        norm = sum((g**2).sum() for g in found) ** 0.5
        found = [g / (1 + (norm / p.clip) ** 2) ** 0.5 for g in found]
    return found


def branch(p: Paper) -> Callable[[Weights, Tensor, Here], Tensor]:
    dk, dv = p.dims

    def step(w: Weights, x: Tensor, here: Here) -> Tensor:
        q, k, v = (projected(w, x, here, (H * dk, H * dk, H * dv)) if p.conv else
                   [w.map(name, x) for name in "qkv"])

        def gate(name: str) -> Tensor:
            return w.map(f"gates.{name}", x) + w(f"biases.{name}")

        out = []
        for h in range(H):
            q_h, k_h = (p.features(u[dk * h : dk * (h + 1)]) for u in (q, k))
            v_h = v[dv * h : dv * (h + 1)]
            if h not in here.memory:
                first = [w(f"start.map{i + 1}_weight")[h] for i in range(p.maps)]
                made = first if p.weights_of is None else [p.weights_of(a) for a in first]
                here.memory[h] = Memory(made, first, [torch.zeros_like(a) for a in first], [])
            m: Memory = here.memory[h]

            def predict(weights: list[Tensor], key: Tensor, h: int = h) -> Tensor:
                if p.residual is None:
                    return p.net(weights, key)
                here_w, here_b = (w(f"inner_norm.{n}")[dv * h : dv * (h + 1)] for n in ("weight", "bias"))
                return key + standard(p.net(weights, key), p.residual) * here_w + here_b

            theta = p.rate * sigmoid(gate("rate")[h])
            bound = 1e-3 + softplus(gate("delta")[h]) if p.loss is huber else None
            worth = sigmoid(gate("window")[h]) if p.window > 1 else torch.ones(())
            m.past = [*m.past, (k_h, v_h, worth, bound)][-p.window:]
            total = [torch.zeros_like(a) for a in m.sums]
            for key, value, counts, its_bound in m.past:
                for i, g in enumerate(slope(p, m.frozen, predict, key, value, its_bound)):
                    total[i] = total[i] + counts * g
            keep = 1 - sigmoid(gate("decay")[h]) if p.decay else 1.0
            m.sums = [keep * a for a in m.sums]
            if p.momentum:
                eta = sigmoid(gate("momentum")[h])
                m.momentum = [eta * z - (1.0 if p.muon else theta) * g for z, g in zip(m.momentum, total)]
                m.far = keep * m.far + theta
                if not p.muon:
                    m.sums = [a + z for a, z in zip(m.sums, m.momentum)]
            else:
                m.sums = [a - theta * g for a, g in zip(m.sums, total)]
            out.append(predict(m.frozen if p.lagged else m.sums, q_h))
            m.age += 1
            if m.age % p.chunk == 0:
                if p.muon:
                    m.sums = [a + m.far * orthogonalised(z) for a, z in zip(m.sums, m.momentum)]
                    m.far = 0.0
                m.frozen = m.sums if p.weights_of is None else [p.weights_of(a) for a in m.sums]
        if p.read == "layer":
            return w.map("out", standard(torch.cat(out), 1e-6) * w("norm.weight") + w("norm.bias"))
        y = torch.cat([rms(o, 1e-5) * w("norm.weight") for o in out])
        return w.map("out", y * silu(w.map("gate", x)) if p.read == "gated" else y)

    return step


def same(x: Tensor) -> Tensor:
    return x


C = 7
PAPERS = {
    "ttt-linear": ("2407.04620", Paper(linear_with_bias, 1, C, 1.0 / 6, square, same, conv=False, residual=1e-6,
                                       read="layer")),
    "ttt-mlp": ("2407.04620", Paper(mlp_with_bias, 2, C, 0.1 / 6, square, same, conv=False, residual=1e-6,
                                    read="layer")),
    "titans-lmm": ("2501.00663", Paper(mlp, 2, C, 1.0 / C, square, decay=True, momentum=True, clip=1.0, read="gated")),
    "yaad": ("2504.13173", Paper(mlp, 2, C, 1.0 / C, huber, residual=1e-3, decay=True, clip=1.0)),
    "moneta": ("2504.13173", Paper(mlp, 2, C, 1.0 / C, cube, residual=1e-3, decay=True, clip=1.0,
                                   weights_of=fourth_powers, lagged=True)),
    "memora": ("2504.13173", Paper(mlp, 2, C, 1.0 / C, square, residual=1e-3, decay=True, weights_of=on_a_simplex,
                                   lagged=True)),
    "omeganet": ("2505.23735", Paper(mlp, 2, C, 1.0 / C, square, products, decay=True, clip=1.0, window=3,
                                     read="gated", dims=(3, 6))),
    "atlas": ("2505.23735", Paper(mlp, 2, C, 0.1 / C, square, products, decay=True, momentum=True, clip=1.0, window=3,
                                  muon=True, lagged=True, read="gated", dims=(3, 6))),
}


@pytest.mark.parametrize("recipe", PAPERS)
def test_learns_at_test_time(record_proof, recipe):
    paper, p = PAPERS[recipe]
    sizes = [f"model.mixers.memory.heads.{name}={n}" for name, n in
             (("value", H), ("dim_key", p.dims[0]), ("dim_value", p.dims[1]))]
    more = [f"model.mixers.memory.update.chunk={C}"]
    if p.window > 1:
        more.append(f"model.mixers.memory.update.window={p.window}")
    prove(record_proof, recipe, paper, model_of(recipe, sizes + more),
          lambda w, tokens: model_loop(w, tokens, [[branch(p), swiglu]] * 2, rms_norm()),
          by="token loop with inner gradients by autograd")
