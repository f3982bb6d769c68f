"""Mamba-2 (2405.21060) twice: the recurrence, and the semiseparable matrix written out."""

from __future__ import annotations

import torch
from loops_plain import Here, Weights, convolve, model_loop, model_of, prove, rms, rms_norm, silu, softplus
from torch import Tensor

H, N, P = 4, 6, 10
HEADS = [f"model.mixers.mamba.heads.value={H}", f"model.mixers.mamba.heads.dim_key={N}",
         f"model.mixers.mamba.heads.dim_value={P}"]


def parts(w: Weights, x: Tensor, here: Here, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The convolved x, B, C, and Delta of this token."""
    p = w.at("params")
    xbc = silu(convolve(here, "xbc", p.map("xbc", x), p("conv.weight"), p("conv.bias")))
    u, b, c = xbc.split([H * P, groups * N, groups * N])
    return u, b, c, softplus(p.map("dt", x) + p("dt_bias"))


def leave(w: Weights, x: Tensor, y: Tensor, norm_groups: int) -> Tensor:
    """Gate, then norm, then the map out."""
    y = y * silu(w.map("gate", x))
    y = torch.cat([rms(part, 1e-5) for part in y.chunk(norm_groups)]) * w("norm.weight")
    return w.map("out", y)


def recurrence(groups: int, norm_groups: int):
    def step(w: Weights, x: Tensor, here: Here) -> Tensor:
        """h_t = exp(Delta_t A) h_{t-1} + B_t (Delta_t x_t)^T in R^{N x P} per head, y_t = h_t^T C_t + D x_t."""
        u, b, c, delta = parts(w, x, here, groups)
        out = []
        for h in range(H):
            g, u_h = h // (H // groups), u[P * h : P * (h + 1)]
            a = torch.exp(-torch.exp(w("params.A_log")[h]) * delta[h])
            s = a * here.memory.get(h, torch.zeros(N, P, dtype=x.dtype))
            here.memory[h] = s = s + torch.outer(b[N * g : N * (g + 1)], delta[h] * u_h)
            out.append(s.T @ c[N * g : N * (g + 1)] + w("params.D")[h] * u_h)
        return leave(w, x, torch.cat(out), norm_groups)

    return step


def quadratic(w: Weights, tokens) -> Tensor:
    """The dual form, for whole layers: y = (L . C B^T) (Delta x) with the 1-semiseparable L_ts = a_t ... a_{s+1}."""
    norm, length = rms_norm(1e-5), len(tokens)
    xs = [w("embedding.weight")[t] for t in tokens]
    for i in range(2):
        s, memory = w.at(f"stack.layers.{i}.sublayers.0"), {}
        m, inputs = s.at("mixer"), [norm(s.at("norm"), x) for x in xs]
        rows = [parts(m, x, Here(t, i, memory), 1) for t, x in enumerate(inputs)]
        u, b, c, delta = (torch.stack(r) for r in zip(*rows))
        heads = []
        for h in range(H):
            a = torch.exp(-torch.exp(m("params.A_log")[h]) * delta[:, h])
            mask = [[torch.prod(a[r + 1 : t + 1]) if r <= t else a.new_zeros(()) for r in range(length)]
                    for t in range(length)]
            matrix = torch.stack([torch.stack(row) for row in mask]) * (c @ b.T)
            u_h = u[:, P * h : P * (h + 1)]
            heads.append(matrix @ (delta[:, h : h + 1] * u_h) + m("params.D")[h] * u_h)
        y = torch.cat(heads, 1)
        xs = [x + leave(m, inputs[t], y[t], 1) for t, x in enumerate(xs)]
    return torch.stack([w("embedding.weight") @ norm(w.at("stack.norm"), x) for x in xs])


def test_mamba2(record_proof):
    prove(record_proof, "mamba2", "2405.21060", model_of("mamba2", [*HEADS, "model.mixers.mamba.heads.key=1"]),
          lambda w, tokens: model_loop(w, tokens, [[recurrence(1, 1)]] * 2, rms_norm(1e-5)))


def test_mamba2_with_groups(record_proof):
    """Two groups of B and C, each normed by itself, as Nemotron-H has it."""
    model = model_of("mamba2", [*HEADS, "model.mixers.mamba.heads.key=2", "model.mixers.mamba.read.per=group"])
    prove(record_proof, "mamba2", "2405.21060 (two groups)", model,
          lambda w, tokens: model_loop(w, tokens, [[recurrence(2, 2)]] * 2, rms_norm(1e-5)))


def test_mamba2_as_a_matrix(record_proof):
    prove(record_proof, "mamba2", "2405.21060", model_of("mamba2", [*HEADS, "model.mixers.mamba.heads.key=1"]),
          quadratic, by="semiseparable matrix")
