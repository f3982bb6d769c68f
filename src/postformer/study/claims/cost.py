"""T1 and T2: what attention and memories of fixed size cost, in operations, seconds and bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from postformer.design import Recipe, load, names
from postformer.design.plan import planned, sublayer_cost
from postformer.kernels import attention, gdr
from postformer.study.claims.base import Claim, Figure, claim, slope
from postformer.study.claims.results import Results

Key = tuple[str, int]
PREFILL, DECODE = (2, 32), (8, 64)
"""Heads and their width; of one token more, so that the work is more than the call."""
MILLION = 1_000_000
COUNTED = (128, 256, 512)
TOLERANCE = 0.15
"""How far a timed exponent may lie from the predicted one before the claim's reason says so."""


def _inputs(tokens: int, keys: int, heads: int, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [1, H, tokens, d], k and v [1, H, keys, d], log-decay [1, H, tokens, 1]."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, n, dim, generator=generator) for n in (tokens, keys, keys))
    return q, k, v, torch.full((1, heads, tokens, 1), -0.1)


def _prefill(n: int, backend: str) -> dict[str, Callable[[], object]]:
    """A whole sequence of n tokens, by attention and by a recurrent memory."""
    q, k, v, g = _inputs(n, n, *PREFILL)
    return {"attention": lambda: attention(q, k, v, backend=backend),
            "recurrent": lambda: gdr(q, g, k_add=k, v_add=v, backend=backend)}


def _decode(n: int, backend: str) -> dict[str, Callable[[], object]]:
    """One more token after n."""
    q, k, v, g = _inputs(1, n, *DECODE)
    state = k.new_zeros(1, k.shape[1], k.shape[3], k.shape[3])
    return {"attention": lambda: attention(q, k, v, backend=backend),
            "recurrent": lambda: gdr(q, g, k_add=k[:, :, :1], v_add=v[:, :, :1], state=state, backend=backend)}


def _flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _seconds(runs: Mapping[Key, Callable[[], object]], repeats: int) -> dict[Key, float]:
    """The least of several times of each: what disturbs one only adds to it.

    All take turns, so that a busy minute does not meet one alone; in its turn each runs more than once, since the one
    before it has filled the caches.
    """
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for key, run in runs.items():
            for _ in range(3):
                start = time.perf_counter()
                run()
                best[key] = min(best[key], time.perf_counter() - start)
    return best


@claim("T1")
def quadratic(results: Results, quick: bool) -> Claim:
    """Exponents of operations and of seconds in the length, on one thread."""
    lengths = (1024, 2048, 4096) if quick else (512, 1024, 2048, 4096, 8192)
    top = lengths[-3:]
    modes = {"a whole sequence": (_prefill, {"attention": 2, "recurrent": 1}, 4 if quick else 6),
             "one more token": (_decode, {"attention": 1, "recurrent": 0}, 10 if quick else 20)}
    figures, exact, apart, off = [], [], [], []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            for what, (make, expected, repeats) in modes.items():
                runs = {(name, n): run for n in lengths for name, run in make(n, "auto").items()}
                seconds, timed = _seconds(runs, repeats), {}
                for name, power in expected.items():
                    counted = slope(COUNTED, [_flops(make(n, "reference")[name]) for n in COUNTED])
                    timed[name] = slope(top, [seconds[name, n] for n in top])
                    figures += [
                        Figure(name=f"{what}, {name}: exponent of counted operations", value=counted),
                        Figure(name=f"{what}, {name}: exponent of seconds", value=timed[name]),
                        *(Figure(name=f"{what}, {name}: {n:,} tokens", value=1e3 * seconds[name, n], unit="ms")
                          for n in lengths),
                    ]
                    exact.append(abs(counted - power) < 0.01)
                    if abs(timed[name] - power) > TOLERANCE:
                        off.append(f"{what}, {name}: {timed[name]:.2f} where {power} is predicted")
                apart.append(timed["attention"] - timed["recurrent"] > 0.5)
    finally:
        torch.set_num_threads(threads)
    clock = f"The clock is within {TOLERANCE} of all four." if not off else f"The clock differs: {'; '.join(off)}."
    return Claim(
        id="T1", title="Exact attention is quadratic",
        statement="Softmax attention takes time that grows with the square of the length, and no exact algorithm can "
        "do better unless the strong exponential time hypothesis is false; a recurrent memory takes linear time.",
        source="Duman Keles, Wijewardena and Hegde 2022", papers=("2209.04881",),
        test="Exponent of the length in the multiply-adds that PyTorch counts on the token-by-token kernels, and in "
        f"the least seconds of several repeats (one thread, {top[0]:,} to {top[-1]:,} tokens). "
        "It holds if the counts have the predicted exponents within 0.01 and the clock tells the two apart by more "
        "than half the predicted gap of 1; where only the clock does not, it is undecided. The theorem itself is about "
        "all algorithms and is not tested.",
        figures=tuple(figures),
        verdict="does not hold" if not all(exact) else "holds" if all(apart) else "undecided",
        reason=f"{sum(exact)} of 4 counted exponents are the predicted ones. {clock}",
        misread="That doubling the context of a recurrent model adds only a constant: it doubles the work. What is "
        "constant is the work for one more token.",
    )


def kv_bytes(layers: int, key_value_heads: int, dim: int, number_bytes: int) -> int:
    """Bytes of keys and values that attention keeps for each token."""
    return 2 * layers * key_value_heads * dim * number_bytes


def growth(recipe: Recipe) -> tuple[int, int, int]:
    """(bytes per token that never stop growing, layers that have such, layers that have any state)."""
    layers = [sum((sublayer_cost(item, recipe.model) for item in layer), start=0) for layer in planned(recipe.model)]
    kept = [sum(b for b, window in cost.state_per_token if window is None) for cost in layers]  # type: ignore[union-attr]
    stateful = sum(bool(cost.state or cost.state_per_token) for cost in layers)  # type: ignore[union-attr]
    return sum(kept), sum(k > 0 for k in kept), stateful


@claim("T2")
def key_value_cache(results: Results, quick: bool) -> Claim:
    """The arithmetic of a large transformer's cache, and the same figures of recipes."""
    large = load("transformer", ["model.mixers.attention.heads={query: 64, key_value: 8, dim: 128}"], 8192, 80)
    declared, arithmetic = growth(large)[0], kv_bytes(80, 8, 128, 2)
    shown = ("transformer", "jamba", "qwen3-next", "nemotron-h-style", "sliding-window", "mamba2", "gated-deltanet")
    figures = [
        Figure(name="80 layers, 8 key heads of 128, 16 bits: per token", value=arithmetic, unit="bytes"),
        Figure(name="at a million tokens", value=arithmetic * MILLION / 1e9, unit="GB"),
        Figure(name="the same as a recipe, in 32 bits: per token", value=declared, unit="bytes"),
    ]
    shares = {}
    for name in shown if quick else names():
        recipe = load(name)
        per_token, growing, stateful = growth(recipe)
        whole = recipe.cost().state_bytes(MILLION)
        figures.append(Figure(name=f"{name}, as shipped, in 32 bits: at a million tokens", value=whole / 1e6,
                              unit="MB"))
        if 0 < growing < stateful:
            shares[name] = growing / stateful
            figures.append(Figure(name=f"{name}: share of layers whose state grows", value=shares[name]))
        if name == "transformer":
            figures.append(Figure(name="transformer, as shipped, in 32 bits: per token", value=per_token, unit="bytes"))
    equal = arithmetic == 327_680 and declared == 2 * arithmetic
    eighth = growth(load("jamba"))[0] * 8 == growth(load("transformer"))[0]
    return Claim(
        id="T2", title="The key-value cache at a million tokens",
        statement="A transformer of 70 billion parameters (80 layers, 8 key-value heads of 128, 16 bits) keeps about "
        "320 GB of keys and values for a million tokens; a hybrid with attention in one layer of eight keeps an "
        "eighth.",
        source="arithmetic, with the sizes of Llama 2 70B", papers=("2307.09288", "2403.19887"), from_notes=True,
        test="2 * layers * heads * dim * bytes per token, worked out and as declared for a recipe of that size (in 32 "
        "bits, so twice as much); the shipped Jamba against the shipped transformer of equal width and heads.",
        figures=tuple(figures), verdict="holds" if equal and eighth else "does not hold",
        reason=f"Both ways give {arithmetic:,} bytes per token in 16 bits, {arithmetic * MILLION / 1e9:.0f} GB "
        f"({arithmetic * MILLION / 2**30:.0f} GiB) at a million."
        + (" Jamba's cache grows by an eighth of the transformer's." if eighth else
           " Jamba's cache does not grow by an eighth of the transformer's."),
        misread="320 GB is 320 kB times a million with kB read as KiB: it is 328 GB, or 305 GiB. Heads that share keys "
        "are already in it; with as many key heads as query heads it would be eight times as much.",
    )
