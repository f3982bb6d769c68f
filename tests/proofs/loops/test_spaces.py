"""S4D and S5: the continuous system with its input held for one step, by the matrix exponential of the real system."""

from __future__ import annotations

import torch
from loops_plain import VOCAB, Here, Weights, gelu, model_loop, model_of, prove, rms_norm, sigmoid
from torch import Tensor

STATES = 3


def small(kind: str) -> dict:
    return {"name": "proof", "model": {
        "width": 12, "vocab": VOCAB, "stack": ["memory"] * 2,
        "mixers": {"memory": {"kind": "vector", "parameterisation": kind, "dim_state": 2 * STATES}}}}


def held(decay: Tensor, turn: Tensor, step: Tensor, inputs: int) -> tuple[Tensor, Tensor]:
    """Of h' = A h + u with A = -decay + i turn: (A-bar [2, 2], B-bar [2, inputs]) on (Re h, Im h), u held for `step`.

    exp(step [[A, I], [0, 0]]) = [[A-bar, B-bar], [0, I]]; with one input, u is real.
    """
    zero = torch.zeros_like(decay)
    a = torch.stack([torch.stack([-decay, -turn]), torch.stack([turn, -decay])])
    b = torch.eye(2, dtype=decay.dtype)[:, :inputs]
    whole = torch.cat([torch.cat([a, b], 1), zero.expand(inputs, 2 + inputs)])
    whole = torch.linalg.matrix_exp(step * whole)
    return whole[:2, :2], whole[:2, 2:]


def finish(w: Weights, y: Tensor) -> Tensor:
    """GELU, then a map to twice the width and the gated linear unit."""
    first, second = w.map("params.out", gelu(y)).chunk(2)
    return first * sigmoid(second)


def loop_of(layer, layers: int = 2):
    """The discretisation is made once per layer: it does not depend on the token."""
    def loop(w: Weights, tokens):
        made: dict[int, list] = {}

        def branch(s: Weights, x: Tensor, here: Here) -> Tensor:
            if here.layer not in made:
                made[here.layer] = layer[0](s.at("params"))
            return finish(s, layer[1](s.at("params"), x, here, made[here.layer]))

        return model_loop(w, tokens, [[branch]] * layers, rms_norm())

    return loop


def s4d_systems(p: Weights) -> list:
    decay, turn, step = torch.exp(p("log_decay")), p("turn"), torch.exp(p("log_dt"))
    return [[held(decay[d, n], turn[d, n], step[d, 0], 1) for n in range(STATES)] for d in range(decay.shape[0])]


def s4d(p: Weights, x: Tensor, here: Here, systems: list) -> Tensor:
    """2206.11893: every channel its own system with B = 1, y = 2 Re(C h) + D u."""
    out = []
    for d in range(len(x)):
        y = p("D")[d] * x[d]
        for n in range(STATES):
            a, b = systems[d][n]
            h = a @ here.memory.get((d, n), torch.zeros(2, dtype=x.dtype)) + b[:, 0] * x[d]
            here.memory[d, n] = h
            y = y + 2 * (p("C")[d, n, 0] * h[0] - p("C")[d, n, 1] * h[1])
        out.append(y)
    return torch.stack(out)


def s5_systems(p: Weights) -> list:
    decay, turn, step = torch.exp(p("log_decay")), p("turn"), torch.exp(p("log_dt"))
    return [held(decay[0, n], turn[0, n], step[0, n], 2) for n in range(STATES)]


def s5(p: Weights, x: Tensor, here: Here, systems: list) -> Tensor:
    """2208.04933: one system for all channels, B and C complex matrices, a step size per state."""
    y = p("D") * x
    for n in range(STATES):
        a, b = systems[n]
        h = a @ here.memory.get(n, torch.zeros(2, dtype=x.dtype)) + b @ (x @ p("B")[n])
        here.memory[n] = h
        y = y + 2 * (p("C")[:, n, 0] * h[0] - p("C")[:, n, 1] * h[1])
    return y


def test_s4d(record_proof):
    prove(record_proof, "vector: s4d", "2206.11893", model_of(small("s4d")), loop_of((s4d_systems, s4d)),
          by="matrix exponential and token loop")


def test_s5(record_proof):
    prove(record_proof, "vector: s5", "2208.04933", model_of(small("s5")), loop_of((s5_systems, s5)),
          by="matrix exponential and token loop")
