"""Whole models: time against length, and training steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from postformer.design import Recipe, load, names
from postformer.design.registry import inside
from postformer.model import build
from postformer.study.bench import peers
from postformer.study.bench.backend import Fallback, observe, ours
from postformer.study.bench.clock import Machine, by_turns, clocked, summary
from postformer.study.bench.config import LINEAR, BenchConfig
from postformer.study.entry import fitted

Tell = Callable[[str], None]
CHANGES = {"qwen3-next": ["model.mixers.feedforward={kind: swiglu}"]}
"""Experts are not what is compared here."""
K1_K2 = ("matrix", "vector")
LIMIT = 1.05
"""The exponent that time against length keeps to where all memories are matrices and vectors"""


def memories(recipe: Recipe) -> set[str]:
    """The kinds of a recipe's mixers that carry a state, composites opened."""
    found = [piece for mixer in recipe.model.mixers.values() for piece in (mixer, *(m for _, m in inside(mixer, "")))]
    return {m.kind for m in found} - {"swiglu", "geglu", "mlp", "channel-mix", "moe", "chain", "parallel"}


def compiled(recipe: Recipe, config: BenchConfig) -> bool:
    """Whether there is compiled code for a memory of the recipe on the device."""
    return bool(memories(recipe) & set(K1_K2 if config.device == "cpu" else K1_K2[:1]))


def linear_recipes() -> list[str]:
    """Every shipped recipe whose memories are K1's and K2's."""
    return [name for name in names() if memories(load(name)) <= set(K1_K2)]


def _step(model: nn.Module, tokens: Tensor, **more: Any) -> None:
    logits = model(tokens, **more).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()


def kept_bytes(work: Callable[[], Any], model: nn.Module) -> int:
    """Bytes that a forward pass keeps for its backward pass, each memory once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if (at := x.untyped_storage().data_ptr()) not in own:
            kept[at] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hold = work()
    del hold
    return sum(kept.values())


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of log y against log x, by least squares."""
    lx, ly = [math.log(v) for v in x], [math.log(v) for v in y]
    mx, my = sum(lx) / len(lx), sum(ly) / len(ly)
    return sum((a - mx) * (b - my) for a, b in zip(lx, ly)) / sum((a - mx) ** 2 for a in lx)


def lengths(config: BenchConfig, tell: Tell) -> list[dict[str, Any]]:
    """Seconds of a forward and backward pass of one sequence, and bytes kept for the backward pass, by length."""
    asked = [r for given in config.lengths.recipes for r in (linear_recipes() if given == LINEAR else [given])]
    found = []
    for name in dict.fromkeys(asked):
        tell(f"time against length, {name}")
        found.append(_by_length(name, config))
    return found


def _by_length(name: str, config: BenchConfig) -> dict[str, Any]:
    sizes = config.lengths
    recipe = fitted(name, sizes.width, sizes.layers, CHANGES.get(name, []))
    linear = memories(recipe) <= set(K1_K2)
    out: dict[str, Any] = {"recipe": name, "memories": sorted(memories(recipe)), "layers": len(recipe.model.stack),
                           "limit": LIMIT if linear else None}
    model = build(recipe.model, seed=0).to(config.device)
    tokens = random_tokens(1, max(sizes.tokens), config)
    try:
        _, backend = observe(lambda: _step(model, tokens[:, :min(sizes.tokens)]), config.backend,
                             compiled=compiled(recipe, config))
    except Fallback as error:
        return out | {"failed": str(error)}
    sides = {str(n): clocked(ours(lambda n=n: _step(model, tokens[:, :n]), config.backend), config.device)
             for n in sizes.tokens}
    times = by_turns(sides, sizes.rounds, 4 * config.seconds)  # the first run of the longest finds cold memory
    kept = [kept_bytes(ours(lambda n=n: model(tokens[:, :n]), config.backend), model) for n in sizes.tokens]
    points = [{"tokens": n, **summary(times[str(n)]), "kept_bytes": k} for n, k in zip(sizes.tokens, kept)]
    return out | {"backend": backend, "points": points,
                  "exponent": exponent(sizes.tokens, [p["min"] for p in points]),
                  "kept_exponent": exponent(sizes.tokens, kept)}


def random_tokens(batch: int, length: int, config: BenchConfig) -> Tensor:
    """[batch, length] int64, always the same."""
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(0)).to(config.device)


def _optimised(model: nn.Module, tokens: Tensor, **more: Any) -> Callable[[], None]:
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run() -> None:
        optimiser.zero_grad(set_to_none=True)
        _step(model, tokens, **more)
        optimiser.step()

    return run


def training(config: BenchConfig, machine: Machine, tell: Tell) -> list[dict[str, Any]]:
    """Tokens per second of whole training steps (forward, backward, AdamW), ours and transformers' by turns."""
    found = []
    for name in config.training.recipes:
        tell(f"training step, {name}")
        found.append(_trained(name, config, machine))
    return found


def _trained(name: str, config: BenchConfig, machine: Machine) -> dict[str, Any]:
    sizes = config.training
    length = sizes.short if name == "mamba" else sizes.length
    recipe = load(name, CHANGES.get(name, []), sizes.width, sizes.layers)
    model, tokens = build(recipe.model, seed=0).to(config.device), random_tokens(sizes.batch, length, config)
    out: dict[str, Any] = {"recipe": name, "tokens": tokens.numel(), "length": length, "sides": {}}
    mine = _optimised(model, tokens)
    try:
        _, backend = observe(mine, config.backend, compiled=compiled(recipe, config))
    except Fallback as error:
        return out | {"failed": str(error)}
    runs, out["sides"]["ours"] = {"ours": ours(mine, config.backend)}, {"backend": backend, "params": count(model)}
    try:
        other = peers.model(name, sizes.width, sizes.layers).to(config.device).train()
        runs[peers.TRANSFORMERS] = _optimised(other, tokens, use_cache=False)
        out["sides"][peers.TRANSFORMERS] = {"backend": peers.backend(peers.TRANSFORMERS), "params": count(other)}
    except peers.Absent as why:
        out["sides"][peers.TRANSFORMERS] = {"absent": str(why)}
    timed = machine.measure({side: clocked(run, config.device) for side, run in runs.items()}, sizes.rounds,
                            2 * config.seconds)
    out["work"] = {"multiply_adds": 3 * sizes.batch * recipe.cost().flops(length) / 2, "bytes": 0.0}
    return rated(out, timed, tokens.numel())


def rated(out: dict[str, Any], timed: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    """The sides with their times and tokens per second, and the ratios of the others to ours."""
    for side, times in timed.items():
        out["sides"][side] |= summary(times) | {"tokens_per_s": tokens / min(times)}
    mine = out["sides"]["ours"]["min"]
    out["ratios"] = {n: s["min"] / mine for n, s in out["sides"].items() if n != "ours" and "min" in s}
    return out


def count(model: nn.Module) -> int:
    """Parameters, each once."""
    return sum(p.numel() for p in model.parameters())
