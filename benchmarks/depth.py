"""What depth saves: a training step and a forward pass without gradients, against the same model of fixed depth.

    python benchmarks/depth.py            one thread; processor time, the least of several rounds in turn

Width 256, 4 layers of attention and SwiGLU, 4 x 512 tokens. `mod`: capacity 0.25 and 0.5 around both sublayers of every
layer, thresholds at the scores' quantiles. `loop`: one block, looped up to 4 times, of whose tokens one in eight goes
on after the first step; against the same block looped 4 times by every token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from postformer.block.depth.mod import Skipping
from postformer.design import load
from postformer.model import LanguageModel, build

WIDTH, LENGTH, BATCH, ROUNDS = 256, 512, 4, 5
MIXERS = {"attn": {"kind": "attention", "heads": {"query": 4, "key_value": 2, "dim": 64}}, "ff": {"kind": "swiglu"}}


def layered(depth: object) -> LanguageModel:
    layer = [{"use": "attn", "depth": depth}, {"use": "ff", "depth": depth}]
    return build(load({"name": "depth", "model": {"width": WIDTH, "mixers": MIXERS, "layers": {"l": layer},
                                                  "stack": ["l"] * 4}}).model)


def looped(bias: float) -> LanguageModel:
    """bias: of the gate that halts."""
    layer = [{"use": "block", "norm": "none", "residual": "none", "depth": {"kind": "loop", "most": 4}}]
    model = build(load({"name": "depth", "model": {
        "width": WIDTH, "mixers": MIXERS, "shared": {"block": {"layer": [{"use": "attn"}, {"use": "ff"}]}},
        "layers": {"l": layer}, "stack": ["l"]}}).model)
    gate = model.stack.layers[0].sublayers[0].depth.gate  # type: ignore[union-attr]
    with torch.no_grad():
        gate.bias.fill_(bias)  # type: ignore[union-attr]
        gate.weight.mul_(100)  # type: ignore[union-attr]
    return model


def at_capacity(model: LanguageModel, tokens: torch.Tensor, rounds: int = 60) -> LanguageModel:
    for _ in range(rounds):
        with torch.no_grad():
            model.after_step(model(tokens).measured)
    return model


def halting(model: LanguageModel, tokens: torch.Tensor, share: float) -> LanguageModel:
    """The gate's bias at which this share of the tokens takes more than one step, and those all of them."""
    gate = model.stack.layers[0].sublayers[0].depth.gate  # type: ignore[union-attr]
    low, high = -1e4, 1e4
    for _ in range(40):
        middle = (low + high) / 2
        with torch.no_grad():
            gate.bias.fill_(middle)  # type: ignore[union-attr]
            found = model(tokens)
        over = float(found.measured["0.0.steps"] / found.measured["0.0.tokens"]) > 1 + 3 * share
        low, high = (middle, high) if over else (low, middle)
    return model


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def train(model: LanguageModel, tokens: torch.Tensor) -> None:
    model.zero_grad(set_to_none=True)
    model(tokens).logits.logsumexp(-1).mean().backward()


def forward(model: LanguageModel, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        model(tokens)


def table(models: Sequence[tuple[str, LanguageModel]], tokens: torch.Tensor) -> None:
    """The first is the one that the others are held against."""
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(ROUNDS):
        for name, model in models:
            for what, run in (("train", train), ("forward", forward)):
                spent = seconds(lambda run=run, model=model: run(model, tokens))
                times.setdefault((name, what), []).append(spent)
    whole = {what: min(times[models[0][0], what]) for what in ("train", "forward")}
    for name, model in models:
        with torch.no_grad():
            measured = model(tokens).measured
        depths = [float(v / measured[f"{k.removesuffix('steps')}tokens"]) for k, v in measured.items()
                  if k.endswith("steps")]
        depth = sum(depths) / len(depths) if depths else 1.0
        cells = [f"{1e3 * min(times[name, what]):7.1f} ({min(times[name, what]) / whole[what]:.2f})"
                 for what in ("train", "forward")]
        print(f"| {name} | {depth:.2f} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    tokens = torch.randint(0, 256, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    print("| model | mean depth | training step, ms (share) | forward, ms (share) |\n| --- | ---: | ---: | ---: |")
    mods = [(f"mod {c}", at_capacity(layered({"kind": "mod", "capacity": c}), tokens)) for c in (0.5, 0.25)]
    assert all(isinstance(s.depth, Skipping) for s in mods[0][1].stack.layers[0].sublayers)  # type: ignore[union-attr]
    table([("fixed", layered("fixed")), *mods], tokens)
    eighth = halting(looped(0.0), tokens, 1 / 8)
    table([("loop, 4 for all", looped(-1e4)), ("loop, 4 for one in eight", eighth)], tokens)


if __name__ == "__main__":
    main()
