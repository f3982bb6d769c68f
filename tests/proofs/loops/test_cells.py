"""Cells: LSTM and GRU by PyTorch's own, sLSTM without a stabiliser, spiking neurons by their equations."""

from __future__ import annotations

import pytest
import torch
from loops_plain import (
    TOLERANCE,
    Here,
    Weights,
    convolve,
    gelu_tanh,
    model_loop,
    model_of,
    prove,
    relative,
    rms_norm,
    sigmoid,
    silu,
    standard,
    swiglu,
)
from torch import Tensor, nn

HEADS = 4


def blocks(parts: Tensor, order: list[int], count: int) -> Tensor:
    """Rows in `count` blocks, taken in this order."""
    chunks = parts.chunk(count)
    return torch.cat([chunks[i] for i in order])


def lstm_weights(w: Weights) -> list[Tensor]:
    """PyTorch's W, R, b, b' with rows in its order i, f, g, o; ours are i, f, o, g and one bias."""
    made = torch.cat([w("params.gates.weight"), w("params.value.weight")])
    bias = torch.cat([w("params.gates.bias"), w("params.value.bias")])
    order = [blocks(m, [0, 1, 3, 2], 4) for m in (made, w("params.recurrent.weight"), bias)]
    return [*order, torch.zeros_like(bias)]


def gru_weights(w: Weights) -> list[Tensor]:
    """PyTorch's W, R, b, b': rows r, z, n as ours, which has no second bias for r and z."""
    made = torch.cat([w("params.gates.weight"), w("params.value.weight")])
    bias = torch.cat([w("params.gates.bias"), w("params.value.bias")])
    none = torch.zeros(2 * made.shape[1], dtype=made.dtype)
    return [made, w("params.recurrent.weight"), bias, torch.cat([none, w("params.recurrent_bias")])]


def lstm(w: Weights, x: Tensor, here: Here) -> Tensor:
    zero = torch.zeros(1, x.shape[0], dtype=x.dtype)
    past = here.memory.get("h", zero), here.memory.get("c", zero)
    here.memory["h"], here.memory["c"] = torch.lstm_cell(x[None], past, *lstm_weights(w))
    return here.memory["h"][0]


def gru(w: Weights, x: Tensor, here: Here) -> Tensor:
    past = here.memory.get("h", torch.zeros(1, x.shape[0], dtype=x.dtype))
    here.memory["h"] = torch.gru_cell(x[None], past, *gru_weights(w))
    return here.memory["h"][0]


@pytest.mark.parametrize(("recipe", "paper", "cell"), [("lstm", "1409.2329", lstm), ("gru", "1406.1078", gru)])
def test_whole_models_around_pytorchs_cells(record_proof, recipe, paper, cell):
    prove(record_proof, recipe, paper, model_of(recipe), lambda w, tokens: model_loop(
        w, tokens, [[cell, swiglu]] * 2, rms_norm()), by="token loop around PyTorch's cell")


@pytest.mark.parametrize(("name", "theirs", "weights"), [
    ("lstm", nn.LSTM, lstm_weights), ("gru", nn.GRU, gru_weights)])
def test_outputs_states_and_gradients_of_pytorchs_modules(record_proof, name, theirs, weights):
    cell = model_of(name).stack.layers[0].sublayers[0].mixer
    width = cell.params.inner
    other = theirs(width, width, batch_first=True, dtype=torch.float64)
    copies = {n: p.detach().clone().requires_grad_() for n, p in cell.named_parameters()}
    made = weights(Weights(copies))
    with torch.no_grad():
        for p, value in zip(other.parameters(), made, strict=True):
            p.copy_(value)
    draw = torch.Generator().manual_seed(7)
    x, *past = (torch.randn(s, generator=draw, dtype=torch.float64) for s in ((3, 41, width), (3, width), (3, width)))
    past = [s.requires_grad_() for s in past[: 2 if name == "lstm" else 1]]
    x.requires_grad_()
    taste = torch.randn(3, 41, width, generator=draw, dtype=torch.float64)

    out = cell(x, (tuple(past), None))
    after = out.state[0]
    y, end = other(x, tuple(s[None] for s in past) if name == "lstm" else past[0][None])
    end = end if name == "lstm" else (end,)
    errors = [relative(out.y, y), *(relative(a, b[0]) for a, b in zip(after, end, strict=True))]
    record_proof(name, f"torch.nn.{theirs.__name__}", "outputs and final states, 41 tokens from a given state",
                 max(errors), dtype="float64", tolerance=TOLERANCE)

    ours = torch.autograd.grad((out.y * taste).sum() + sum(s.square().sum() for s in after),
                               [x, *past, *cell.parameters()])
    found = torch.autograd.grad((y * taste).sum() + sum(s.square().sum() for s in end),
                                [x, *past, *other.parameters()])
    kept = 1 + len(past)
    # Their gradients, through the copying of the weights, as gradients of ours.
    copied = [(m, g) for m, g in zip(made, found[kept:], strict=True) if m.requires_grad]
    through = torch.autograd.grad([m for m, _ in copied], list(copies.values()), [g for _, g in copied])
    pairs = [*zip(ours[:kept], found[:kept]), *zip(ours[kept:], through, strict=True)]
    record_proof(name, f"torch.nn.{theirs.__name__}", "gradients of input, states and every parameter",
                 max(relative(a, b) for a, b in pairs), dtype="float64", tolerance=TOLERANCE)


def by_head(weight: Tensor, x: Tensor) -> Tensor:
    """x [D] by weight [heads, D / heads, n] -> [heads, n]"""
    return torch.stack([x_h @ w_h for x_h, w_h in zip(x.chunk(HEADS), weight, strict=True)])


def slstm(w: Weights, x: Tensor, here: Here) -> Tensor:
    """2405.04517, without a stabiliser: c = f c + exp(i) z, n = f n + exp(i), h = o c / n, then a norm of each head."""
    p = w.at("params")
    seen = silu(convolve(here, "x", x, p("conv.weight"), p("conv.bias")))
    zero = torch.zeros(HEADS, x.shape[0] // HEADS, dtype=x.dtype)
    h, c, n = (here.memory.get(k, zero) for k in "hcn")
    raw = torch.cat([by_head(p("gate_weight"), seen), by_head(p("value_weight"), x)], 1) + p("bias")
    i, f, z, o = (raw + by_head(p("recurrent_weight"), h.flatten())).chunk(4, 1)
    c = sigmoid(f) * c + torch.exp(i) * torch.tanh(z)
    n = sigmoid(f) * n + torch.exp(i)
    h = sigmoid(o) * c / n
    here.memory["h"], here.memory["c"], here.memory["n"] = h, c, n
    return torch.cat([standard(h_h, 1e-5) for h_h in h]) * w("norm.weight")


def geglu(w: Weights, x: Tensor, here: Here) -> Tensor:
    return w.map("out", gelu_tanh(w.map("gate", x)) * w.map("up", x))


def layer_norm(w: Weights, x: Tensor) -> Tensor:
    return standard(x, 1e-5) * w("weight")


def test_slstm(record_proof):
    prove(record_proof, "slstm", "2405.04517", model_of("slstm"), lambda w, tokens: model_loop(
        w, tokens, [[slstm, geglu]] * 2, layer_norm))


MATRICES = 2


def mlstm_block(w: Weights, x: Tensor, here: Here) -> Tensor:
    """2405.04517's mLSTM block, without a stabiliser: up to u and z, q and k from silu(conv(u)), v from u itself, in
    blocks of four channels; C = f C + exp(i) v k^T, n = f n + exp(i) k, h = C q / max(|n . q|, 1); norm, skip, gate.

    The authors' code divides by 1e-6 more, in units of the largest weight so far (1 before the first token).
    """
    u, z = w.map("up", x), w.map("gate", x)
    seen = silu(convolve(here, "u", u, w("conv.weight"), w("conv.bias")))
    p = w.at("of.params")
    q, k, v = (torch.cat([x_b @ w_b for x_b, w_b in zip(source.split(4), p(f"{n}_weight"), strict=True)])
               for n, source in (("q", seen), ("k", seen), ("v", u)))
    every = torch.cat([q, k, v])
    write, keep = torch.exp(p.map("i", every)), sigmoid(p.map("f", every))
    size, out = u.shape[0] // MATRICES, []
    for h in range(MATRICES):
        q_h, k_h, v_h = (m[size * h : size * (h + 1)] for m in (q, k, v))
        k_h = k_h / size**0.5
        zero = torch.zeros(size, dtype=x.dtype)
        c = keep[h] * here.memory.get(("c", h), torch.outer(zero, zero)) + write[h] * torch.outer(v_h, k_h)
        n = keep[h] * here.memory.get(("n", h), zero) + write[h] * k_h
        most = here.memory.get(("most", h), torch.ones((), dtype=x.dtype))
        most = torch.maximum(keep[h].detach() * most, write[h].detach())
        here.memory["c", h], here.memory["n", h], here.memory["most", h] = c, n, most
        below = torch.maximum((n @ q_h).abs(), torch.ones((), dtype=x.dtype))
        out.append(standard(c @ q_h / (below + 1e-6 * most), 1e-5))
    y = torch.cat(out) * w("of.norm.weight") + w("skip") * seen
    return w.map("out", y * silu(z))


def test_xlstm(record_proof):
    model = model_of("xlstm", [f"model.mixers.mlstm.of.heads.value={MATRICES}"], layers=4)
    layers = [[slstm, geglu] if len(layer.sublayers) == 2 else [mlstm_block] for layer in model.stack.layers]
    assert sorted(map(len, layers)) == [1, 1, 1, 2]
    prove(record_proof, "xlstm", "2405.04517", model, lambda w, tokens: model_loop(w, tokens, layers, layer_norm))


def fired(x: Tensor, surrogate: str) -> Tensor:
    """1 or 0, with the slope of an arc tangent or of a fast sigmoid at x."""
    soft = torch.atan(torch.pi * x) / torch.pi if surrogate == "atan" else x / (1 + 25 * x.abs())
    return (x > 0).to(x.dtype) + soft - soft.detach()


def neurons(reset: str, surrogate: str, threshold: float):
    def step(w: Weights, x: Tensor, here: Here) -> Tensor:
        """2109.12894: u_t = lambda u + W x - theta s (soft), or lambda u (1 - s) + W x (hard); s = [u > theta]."""
        u = here.memory.get("u", torch.zeros_like(x))
        before = here.memory.get("s", torch.zeros_like(x)).detach()
        decay, drive = sigmoid(w("params.decay")), w.map("params.input", x)
        u = decay * u * (1 - before) + drive if reset == "hard" else decay * u + drive - threshold * before
        here.memory["u"], here.memory["s"] = u, fired(u - threshold, surrogate)
        return w.map("out", here.memory["s"])

    return step


@pytest.mark.parametrize(("reset", "surrogate", "threshold"), [
    ("soft", "atan", 1.0), ("hard", "atan", 0.5), ("soft", "fast-sigmoid", 0.7)])
def test_spiking_neurons(record_proof, reset, surrogate, threshold):
    options = {"reset": reset, "surrogate": surrogate, "threshold": threshold}
    model = model_of("lif", [f"model.mixers.memory.{k}={v}" for k, v in options.items()])
    prove(record_proof, "lif", f"2109.12894 ({reset} reset, {surrogate})", model, lambda w, tokens: model_loop(
        w, tokens, [[neurons(reset, surrogate, threshold), swiglu]] * 2, rms_norm()))


def neurons_without_reset(surrogate: str, threshold: float):
    def step(w: Weights, x: Tensor, here: Here) -> Tensor:
        """2304.12760, the neuron before it is generalised: u_t = sum_s lambda^(t - s) W x_s, s_t = [u_t > theta]."""
        here.memory["i", here.t] = w.map("params.input", x)
        decay = sigmoid(w("params.decay"))
        u = sum(decay ** (here.t - s) * here.memory["i", s] for s in range(here.t + 1))
        return w.map("params.out", fired(torch.as_tensor(u) - threshold, surrogate))

    return step


@pytest.mark.parametrize(("surrogate", "threshold"), [("atan", 1.0), ("fast-sigmoid", 0.6)])
def test_spiking_neurons_without_a_reset(record_proof, surrogate, threshold):
    model = model_of("lif-parallel", [f"model.mixers.memory.surrogate={surrogate}",
                                      f"model.mixers.memory.threshold={threshold}"])
    prove(record_proof, "lif-parallel", f"2304.12760 ({surrogate})", model, lambda w, tokens: model_loop(
        w, tokens, [[neurons_without_reset(surrogate, threshold), swiglu]] * 2, rms_norm()))
