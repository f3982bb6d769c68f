"""What one more token costs after a long context: bytes of state, declared and measured, and seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from postformer.contract.context import Context
from postformer.contract.state import map_state, size
from postformer.design import Recipe
from postformer.model import build


@torch.inference_mode()
def measure_decode(
    recipe: Recipe, contexts: Sequence[int], limit: float, steps: int = 24, chunk: int = 512, seed: int = 0
) -> list[dict[str, Any]]:
    """Cost of decoding one sequence after each context length.

    Args:
        recipe: the design; its weights are random, which changes neither bytes nor time.
        contexts: tokens of context, ascending.
        limit: seconds; contexts that cannot be reached within them are left out.
        steps: tokens that are decoded and timed at each context; the median counts.
        chunk: tokens per call while the context is read.

    Returns:
        For each context reached: `context`, `declared_bytes` (of the design), `measured_bytes` (of the state after that
        context), `seconds_per_token`.
    """
    began = time.monotonic()
    model = build(recipe.model, seed=seed).eval()
    cost = recipe.cost()
    generator = torch.Generator().manual_seed(seed)
    state, seen, found = model.initial(1), 0, []
    give = Context(consume=True)
    for context in contexts:
        while seen < context:
            tokens = torch.randint(recipe.model.vocab, (1, min(chunk, context - seen)), generator=generator)
            state = model(tokens, state, give).state
            seen += tokens.shape[1]
            if time.monotonic() - began > limit:
                return found
        token = torch.zeros(1, 1, dtype=torch.long)
        fork = map_state(torch.Tensor.clone, state)
        times = []
        for step in range(steps + 4):
            start = time.perf_counter()
            fork = model(token, fork, give).state
            if step >= 4:  # The first steps pay for caches and for room in the growing lists.
                times.append(time.perf_counter() - start)
        found.append({
            "context": context, "declared_bytes": cost.state_bytes(context), "measured_bytes": size(state),
            "seconds_per_token": statistics.median(times),
        })  # fmt: skip
    return found
