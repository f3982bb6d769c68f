"""Decoding one sequence after contexts of many lengths, beside transformers' `generate`."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from postformer.contract.context import Context
from postformer.contract.state import Growing, map_state, size
from postformer.design import Recipe, load
from postformer.kernels import use
from postformer.model import build
from postformer.sampling import Policy, Prefix, stream
from postformer.sampling.stepper import WARM, Stepper
from postformer.study.bench import peers
from postformer.study.bench.backend import Fallback, setting
from postformer.study.bench.clock import Side, by_turns
from postformer.study.bench.config import READ, BenchConfig
from postformer.study.bench.models import CHANGES, Tell, random_tokens, rated

SKIPPED = WARM + 4
"""Tokens at the start, in which the step is recorded; they are not timed"""


@torch.inference_mode()
def measure(config: BenchConfig, tell: Tell) -> list[dict[str, Any]]:
    """Tokens per second, one sequence and greedy, and bytes of state, after each context."""
    sizes, found = config.decoding, []
    for name in sizes.recipes:
        recipe = load(name, CHANGES.get(name, []), sizes.width, sizes.layers)
        model = build(recipe.model, seed=0).to(config.device).eval()
        try:
            other: nn.Module | str = peers.model(name, sizes.width, sizes.layers).to(config.device).eval()
        except peers.Absent as why:
            other = str(why)
        start = model(random_tokens(1, READ, config), None, Context(consume=True)).state
        for context in sizes.contexts:
            tell(f"decoding, {name}, context {context:,}")
            found.append(_decoded(recipe, model, other, at_context(start, READ, context), context, config))
    return found


def _decoded(recipe: Recipe, model: nn.Module, other: nn.Module | str, state: Any, context: int,
             config: BenchConfig) -> dict[str, Any]:
    sizes, declared = config.decoding, recipe.cost().state_bytes(context)
    out: dict[str, Any] = {"recipe": recipe.name, "context": context, "state_bytes": size(state),
                           "declared_bytes": declared, "sides": {}}
    if size(state) != declared:
        return out | {"failed": f"the state has {size(state):,} bytes, and the design declares {declared:,}"}
    try:
        out["sides"]["ours"] = {"backend": stepping(model, state, config)}
    except Fallback as error:
        return out | {"failed": str(error)}
    sides: dict[str, Side] = {"ours": lambda: ours(model, state, sizes.tokens, config)}
    theirs = peers.TRANSFORMERS
    if isinstance(other, str):
        out["sides"][theirs] = {"absent": other}
    elif context > sizes.peer_context:
        out["sides"][theirs] = {"absent": "not run: it would have to read the context first; "
                                f"-s decoding.peer_context={context}"}
    else:
        prompt = random_tokens(1, context, config)
        try:
            generate(other, prompt, 2, config.device)
            sides[theirs] = lambda: generate(other, prompt, sizes.tokens, config.device)
            out["sides"][theirs] = {"backend": "generate, " + peers.backend(theirs)}
        except Exception as error:  # a peer's own failure is told, and is none of ours
            out["sides"][theirs] = {"absent": peers.failure(error)}
    return rated(out, by_turns(sides, sizes.rounds, config.seconds), sizes.tokens)


def at_context(state: Any, seen: int, context: int) -> Any:
    """A state after `seen` tokens as it would be after `context`: lists filled with what is in them, over and over,
    counters and positions moved. Values are not those of any text, which changes neither bytes nor time."""
    if isinstance(state, Growing):
        rows = torch.arange(context, device=state.length.device) % seen
        return Growing(state.data[:, rows], torch.full_like(state.length, context))
    if isinstance(state, Tensor):
        moved = state.dtype == torch.long
        return torch.where(state > 0, state + (context - seen), state) if moved else state.clone()
    if isinstance(state, dict):
        return {k: at_context(v, seen, context) for k, v in state.items()}
    if isinstance(state, (tuple, list)):
        parts = [at_context(v, seen, context) for v in state]
        return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
    return state


def stepping(model: nn.Module, state: Any, config: BenchConfig) -> str:
    """How a token is made here, in words. Raises Fallback where compiled code was asked for and does not run."""
    with use(backend=setting(config.backend)):
        stepper = Stepper(model, map_state(Tensor.clone, state))
        for _ in range(SKIPPED):
            stepper.step(torch.ones(1, dtype=torch.long, device=config.device))
    if stepper.tape is not None:
        return "compiled, the whole step"
    if config.backend == "native" and config.device == "cpu":
        raise Fallback(f"a compiled step was asked for, and there is none: {stepper.reason}")
    return f"the model's own operations ({stepper.reason})"


def ours(model: nn.Module, state: Any, tokens: int, config: BenchConfig) -> float:
    """Seconds of so many greedy tokens from a state, which is not changed, by what `postformer generate` runs.

    Where they take too long, of fewer, and the rest by the rule of three.
    """
    last = torch.ones(1, 1, dtype=torch.long, device=config.device)
    prefix = Prefix(last, torch.ones_like(last, dtype=torch.bool), state)
    stamps = []
    with use(backend=setting(config.backend)):
        for _ in stream(model, prefix, Policy(temperature=0), SKIPPED + tokens):
            _stamp(stamps, config.device)
            if len(stamps) > SKIPPED and stamps[-1] - stamps[SKIPPED - 1] > config.seconds:
                break
    return (stamps[-1] - stamps[SKIPPED - 1]) * tokens / (len(stamps) - SKIPPED)


def generate(model: Any, prompt: Tensor, tokens: int, device: str) -> float:
    """Seconds that transformers' `generate` takes for so many greedy tokens once it has made its first: reading the
    prompt is not timed. Raises Fallback where it makes another number of tokens."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    stamps: list[float] = []

    class Clock(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            _stamp(stamps, device)
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens + 1, do_sample=False,
                   use_cache=True, pad_token_id=0, eos_token_id=None, stopping_criteria=StoppingCriteriaList([Clock()]))
    if len(stamps) != tokens + 1:
        raise Fallback(f"generate made {len(stamps)} tokens and not {tokens + 1}")
    return stamps[-1] - stamps[0]


def _stamp(stamps: list[float], device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
    stamps.append(time.perf_counter())
