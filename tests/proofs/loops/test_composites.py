"""Memories made of memories: a learned router over three of them, one token at a time.

The memories take a weight a_t in [0, 1], how much of the token they get: decays are raised to its power and writes
multiplied by it.
"""

from __future__ import annotations

import pytest
import torch
from loops_plain import (
    VOCAB,
    Here,
    Weights,
    convolve,
    gelu,
    model_loop,
    model_of,
    projected,
    prove,
    rms,
    rms_norm,
    sigmoid,
    silu,
    softplus,
    swiglu,
    unit,
)
from torch import Tensor

ONE = torch.ones((), dtype=torch.float64)
QUERIES, KEYS, DIM = 4, 2, 6
H, DK, DV = 2, 6, 10


def below(here: Here, name: object) -> Here:
    """The same place for a memory inside: it keeps what it remembers under its own name."""
    return Here(here.t, here.layer, here.memory.setdefault(name, {}), here.token)  # type: ignore[arg-type]


def softmax(x: Tensor) -> Tensor:
    e = torch.exp(x - x.max())
    return e / e.sum()


def window_attention(window: int, persistent: int = 0):
    def step(w: Weights, x: Tensor, here: Here, a: Tensor = ONE) -> Tensor:
        """1706.03762 over the last `window` places, of which only the tokens it was given are there; 2104.09864.

        Persistent keys and values (2501.00663, section 3.3) are always there, unturned.
        """
        def paired(u: Tensor) -> Tensor:
            return torch.complex(u[: DIM // 2], u[DIM // 2 :])

        def turned(u: Tensor) -> Tensor:
            theta = 10000.0 ** (-2 * torch.arange(DIM // 2, dtype=x.dtype) / DIM)
            return paired(u) * torch.exp(1j * here.t * theta)

        k, v, q = w.map("k", x), w.map("v", x), w.map("q", x)
        if a > 0:
            here.memory[here.t] = [(turned(k[DIM * g : DIM * (g + 1)]), v[DIM * g : DIM * (g + 1)])
                                   for g in range(KEYS)]
        seen = [here.memory[t] for t in here.memory if t > here.t - window]
        for n in range(persistent):
            p = w("persistent")[:, :, n]
            seen.append([(paired(p[0, g]), p[1, g]) for g in range(KEYS)])  # type: ignore[arg-type]
        out = []
        for h in range(QUERIES):
            g, q_h = h // (QUERIES // KEYS), turned(q[DIM * h : DIM * (h + 1)])
            if not seen:
                out.append(torch.zeros(DIM, dtype=x.dtype))
                continue
            weights = softmax(torch.stack([(q_h * pair[g][0].conj()).sum().real for pair in seen]) / DIM**0.5)
            out.append(weights @ torch.stack([pair[g][1] for pair in seen]))
        return w.map("out", torch.cat(out))

    return step


def inputs(w: Weights, x: Tensor, here: Here) -> list[Tensor]:
    """q, k, v; where there is no convolution, only q and k go through a SiLU."""
    if w.has("conv.weight"):
        return projected(w, x, here, (H * DK, H * DK, H * DV))
    return [silu(w.map("q", x)), silu(w.map("k", x)), w.map("v", x)]


def gated_delta_net(w: Weights, x: Tensor, here: Here, a: Tensor = ONE) -> Tensor:
    """2412.06464: S_t = S_{t-1} (alpha^a (I - a beta k k^T)) + a beta v k^T, o = S q."""
    q, k, v = inputs(w.at("params"), x, here)
    beta = sigmoid(w.map("params.rate", x))
    step = softplus(w.map("params.decay.map", x) + w("params.decay.dt_bias"))
    alpha = torch.exp(-torch.exp(w("params.decay.A_log")) * step)
    out = []
    for h in range(H):
        q_h, k_h = (unit(u[DK * h : DK * (h + 1)]) for u in (q, k))
        s = here.memory.get(h, torch.zeros(DV, DK, dtype=x.dtype))
        s = s @ (alpha[h] ** a * (torch.eye(DK, dtype=x.dtype) - a * beta[h] * torch.outer(k_h, k_h)))
        here.memory[h] = s = s + a * beta[h] * torch.outer(v[DV * h : DV * (h + 1)], k_h)
        out.append(rms(s @ q_h / DK**0.5, 1e-5) * w("norm.weight"))
    return w.map("out", torch.cat(out) * silu(w.map("gate", x)))


def mamba(w: Weights, x: Tensor, here: Here, a: Tensor = ONE) -> Tensor:
    """2312.00752, algorithm 2: the step size and B are multiplied by a."""
    p = w.at("params")
    z, u = p.map("z", x), p.map("x", x)
    if p.has("conv.weight"):
        u = convolve(here, "u", u, p("conv.weight"), p("conv.bias"))
    u = silu(u)
    states, rank = p("A_log").shape[1], p("dt.weight").shape[1]
    low, b, c = p.map("bcdt", u).split([rank, states, states])
    delta, rate = a * softplus(p.map("dt", low)), -torch.exp(p("A_log"))
    h = here.memory.get("h", torch.zeros_like(rate))
    here.memory["h"] = h = torch.exp(delta[:, None] * rate) * h + (delta * u)[:, None] * (a * b)
    return p.map("out", (h @ c + p("D") * u) * silu(z))


def long_term_memory(chunk: int, clip: float):
    def step(w: Weights, x: Tensor, here: Here, a: Tensor = ONE) -> Tensor:
        """2501.00663, equations 11 to 15, with gradients taken at the weights of the chunk's start (section 3.2):

            S_t = eta_t S_{t-1} - theta_t grad l(M_n; x_t),    M_t = (1 - alpha_t) M_{t-1} + S_t,    y_t = M_t(q_t)

        Each gradient is held below `clip`. With a = 0 a token only reads.
        """
        u = dict(zip("qkv", inputs(w, x, here)))
        alpha, eta, theta = (sigmoid(w.map(f"gates.{name}", x) + w(f"biases.{name}"))
                             for name in ("decay", "momentum", "rate"))
        kept: dict = here.memory
        seen, out = kept.get("seen", 0), []
        for h in range(H):
            q, k, v = unit(u["q"][DK * h : DK * (h + 1)]), unit(u["k"][DK * h : DK * (h + 1)]), \
                u["v"][DV * h : DV * (h + 1)]
            first = tuple(w(f"start.map{i}_weight")[h] for i in (1, 2))
            frozen, now, s = kept.get(h, (first, first, tuple(torch.zeros_like(p) for p in first)))
            if a > 0:
                training = torch.is_grad_enabled()
                with torch.enable_grad():
                    # Copies: k and v may depend on these weights too, and are held fixed.
                    at = [(p if training else p.detach().requires_grad_()).clone() for p in frozen]
                    off = gelu(k @ at[0]) @ at[1] - v
                    surprise = torch.autograd.grad((off * off).sum() / 2, at, create_graph=True)
                size = torch.stack([(g * g).sum() for g in surprise]).sum()
                most = theta[h] / chunk / torch.sqrt(1 + size / clip**2)
                s = tuple(eta[h] * z - most * g for z, g in zip(s, surprise))
                now = tuple((1 - alpha[h]) * p + z for p, z in zip(now, s))
                kept[h] = (now if (seen + 1) % chunk == 0 else frozen, now, s)
            out.append(rms(gelu(q @ now[0]) @ now[1], 1e-5) * w("norm.weight"))
        kept["seen"] = seen + int(a)
        return w.map("out", torch.cat(out) * silu(w.map("gate", x)))

    return step


def router(memories, hard: bool, chosen: bool):
    def step(w: Weights, x: Tensor, here: Here) -> Tensor:
        """y = sum_i a_i M_i(x); a the softmax, or one at its largest entry with the softmax's derivative."""
        a = p = softmax(w.map("router", x))
        if hard:
            one = torch.zeros_like(p)
            one[p.argmax()] = 1
            a = one + p - p.detach()
        ys = [m(w.at(f"of.{i}"), x, below(here, i), a[i] if chosen else ONE) for i, m in enumerate(memories)]
        return torch.stack([a[i] * y for i, y in enumerate(ys)]).sum(0)

    return step


def product(w: Weights, first: Tensor, second: Tensor) -> Tensor:
    """2501.00663, section 4.2: both normed with a weight per channel, the second through a sigmoid."""
    return rms(first, 1e-6) * w("norms.0.weight") * sigmoid(rms(second, 1e-6) * w("norms.1.weight"))


def memory_as_context(memory, attention, segment: int):
    def step(w: Weights, x: Tensor, here: Here) -> Tensor:
        """2501.00663, equations 21 to 25, token by token: what a segment reads of the memory is what the memory was
        when it began; h of a token is visible to it and to later ones; the memory learns from each y in turn."""
        kept, j = here.memory, here.t % segment
        if j == 0:
            kept["before"], kept["inside"] = dict(kept.setdefault("now", {})), {}  # type: ignore[arg-type]

        def at(t: int, name: str) -> Here:
            return Here(t, here.layer, kept[name])  # type: ignore[arg-type]

        h = memory(w.at("memory"), x, Here(here.t, here.layer, dict(kept["before"])), 0 * ONE)
        attention(w.at("attention"), h, at(2 * j, "inside"))
        y = attention(w.at("attention"), x, at(2 * j + 1, "inside"))
        y = rms(y, 1e-6) * w("norm.weight")
        gate = memory(w.at("memory"), y, at(here.t, "now"), ONE)
        return y * sigmoid(rms(gate, 1e-6) * w("gate_norm.weight"))

    return step


def memory_as_gate(attention, memory):
    def step(w: Weights, x: Tensor, here: Here) -> Tensor:
        """2501.00663, equations 27 and 28: o = y (x) M(x), y from attention over a window."""
        first, second = (m(w.at(f"of.{i}"), x, below(here, i)) for i, m in enumerate((attention, memory)))
        return product(w.at("product"), first, second)

    return step


def memory_as_layer(memory, attention):
    def step(w: Weights, x: Tensor, here: Here) -> Tensor:
        """2501.00663, equations 30 and 31: attention over a window of what the memory makes of the tokens."""
        return attention(w.at("of.1"), memory(w.at("of.0"), x, below(here, 0)), below(here, 1))

    return step


ATTENTION = {"kind": "attention", "window": 14, "persistent": 3,
             "heads": {"query": QUERIES, "key_value": KEYS, "dim": DIM}}
DELTA = {"kind": "matrix", "loss": "l2", "features": ["silu", "l2norm"], "retention": {"per": "head", "gate": "mamba"},
         "heads": {"value": H, "dim_key": DK, "dim_value": DV}, "read": "gated-norm"}
ARRANGED = {
    "context": ({"kind": "context", "memory": DELTA, "attention": ATTENTION, "segment": 7},
                memory_as_context(gated_delta_net, window_attention(14, 3), 7)),
    "context, window shorter": ({"kind": "context", "memory": DELTA, "attention": {**ATTENTION, "window": 5},
                                 "segment": 7}, memory_as_context(gated_delta_net, window_attention(5, 3), 7)),
    "context, mamba": ({"kind": "context", "memory": {"kind": "vector", "dim_inner": 20, "dim_state": 5},
                        "attention": ATTENTION, "segment": 16},
                       memory_as_context(mamba, window_attention(14, 3), 16)),
    "gate": ({"kind": "parallel", "merge": "product", "of": [ATTENTION, DELTA]},
             memory_as_gate(window_attention(14, 3), gated_delta_net)),
    "layer": ({"kind": "chain", "of": [DELTA, ATTENTION]},
              memory_as_layer(gated_delta_net, window_attention(14, 3))),
}


@pytest.mark.parametrize("name", ARRANGED)
def test_titans_arrangements_with_other_memories(record_proof, name):
    mixer, branch = ARRANGED[name]
    model = model_of({"name": "proof", "model": {"width": 16, "vocab": VOCAB, "mixers": {
        "memory": mixer, "feedforward": {"kind": "swiglu"}}, "stack": ["memory/feedforward"] * 2}})
    recipe = {"context": "titans-mac", "gate": "titans-mag", "layer": "titans-mal"}[name.split(",")[0]]
    prove(record_proof, recipe, f"2501.00663 (another memory as {name})", model,
          lambda w, tokens: model_loop(w, tokens, [[branch, swiglu]] * 2, rms_norm()))


def titans(memory: str, attention: str, *more: str):
    """The recipe's sizes, small: a chunk of 5 and a window of 14 places, or 7 tokens and what is read for them."""
    changes = {f"{attention}.heads.query": QUERIES, f"{attention}.heads.key_value": KEYS, f"{attention}.heads.dim": DIM,
               f"{attention}.window": 14, f"{attention}.persistent": 3, f"{memory}.heads.value": H,
               f"{memory}.heads.dim_key": DK, f"{memory}.heads.dim_value": DV, f"{memory}.update.chunk": 5}
    return [f"model.mixers.memory.{k}={v}" for k, v in changes.items()] + list(more)


@pytest.mark.parametrize(("recipe", "branch", "overrides"), [
    ("titans-mac", memory_as_context(long_term_memory(5, 1.0), window_attention(14, 3), 7),
     titans("memory", "attention", "model.mixers.memory.segment=7")),
    ("titans-mag", memory_as_gate(window_attention(14, 3), long_term_memory(5, 1.0)), titans("of.1", "of.0")),
    ("titans-mal", memory_as_layer(long_term_memory(5, 1.0), window_attention(14, 3)), titans("of.0", "of.1")),
], ids=lambda v: v if isinstance(v, str) else "")
def test_titans(record_proof, recipe, branch, overrides):
    prove(record_proof, recipe, "2501.00663", model_of(recipe, overrides),
          lambda w, tokens: model_loop(w, tokens, [[branch, swiglu]] * 2, rms_norm()))


def test_four_learners(record_proof):
    sizes = {"matrix.heads.value": H, "matrix.heads.dim_key": DK, "matrix.heads.dim_value": DV, "vector.dim_inner": 20,
             "vector.dim_state": 5, "window.window": 9, "window.heads.query": QUERIES, "window.heads.key_value": KEYS,
             "window.heads.dim": DIM, "deep.heads.value": H, "deep.heads.dim_key": DK, "deep.heads.dim_value": DV,
             "deep.update.chunk": 5}
    model = model_of("four-learners", [f"model.mixers.{k}={v}" for k, v in sizes.items()], layers=4)
    learners = [gated_delta_net, mamba, window_attention(9), long_term_memory(5, 1.0)]
    prove(record_proof, "four-learners", "2412.06464, 2312.00752, 2004.05150, 2501.00663", model,
          lambda w, tokens: model_loop(w, tokens, [[m, swiglu] for m in learners], rms_norm()))


SMALL = [*(f"model.mixers.memory.of.0.heads.{k}={v}" for k, v in zip(("query", "key_value", "dim"),
                                                                    (QUERIES, KEYS, DIM))),
         *(f"model.mixers.memory.of.1.heads.{k}={v}" for k, v in zip(("value", "dim_key", "dim_value"), (H, DK, DV))),
         "model.mixers.memory.of.0.window=9", "model.mixers.memory.of.2.dim_inner=20",
         "model.mixers.memory.of.2.dim_state=5"]


def test_memory_router(record_proof):
    memories = [window_attention(9), gated_delta_net, mamba]
    for by, more, hard, chosen in (
        ("", [], True, True),
        (" (soft weights)", ["model.mixers.memory.top=null"], False, True),
        (" (soft weights, all written)", ["model.mixers.memory.top=null", "model.mixers.memory.writes=all"], False,
         False),
        (" (all written)", ["model.mixers.memory.writes=all"], True, False),
    ):
        branch = router(memories, hard, chosen)
        prove(record_proof, "memory-router", f"2502.13685{by}", model_of("memory-router", SMALL + more),
              lambda w, tokens, branch=branch: model_loop(w, tokens, [[branch, swiglu]] * 2, rms_norm()))
