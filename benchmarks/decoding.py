"""Tokens per second of one sequence, greedy, beside transformers' `generate`; and time and memory against the context.

    python benchmarks/decoding.py [--threads 1] [--rounds 5] [--tokens 128] [--contexts 100,1000,10000,100000]

Both sides have random weights, width 256, 4 layers and the same sizes of state; they run by turns in one process. A
figure is of 16 tokens in a row, the fastest (and the median) of all such runs after the first 16 tokens. A context is
not read token by token: the state after a long one is made by filling the growing lists, which is all that changes.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import time
import warnings
from typing import Any

import torch

import postformer
from postformer.contract import state as states
from postformer.contract.state import Growing
from postformer.sampling import Policy, Prefix, generate, stream
from postformer.sampling.stepper import Stepper

VOCAB, WIDTH, LAYERS = 256, 256, 4
GREEDY = Policy(temperature=0)


def peers() -> dict[str, Any]:
    """transformers' own classes at the sizes of our recipes."""
    import transformers as t

    common: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    delta: dict[str, Any] = {
        "linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 64,
        "linear_value_head_dim": 64, "mlp_only_layers": [0, 1, 2, 3], "intermediate_size": 688, "num_experts": 4}
    mamba2: dict[str, Any] = {"num_heads": 8, "head_dim": 64, "state_size": 64, "n_groups": 1}
    return {
        "mamba": t.MambaForCausalLM(t.MambaConfig(**common, state_size=16)),
        "mamba2": t.Mamba2ForCausalLM(t.Mamba2Config(**common, **mamba2)),
        "gated-deltanet": t.Qwen3NextForCausalLM(t.Qwen3NextConfig(
            **common, **heads, **delta, layer_types=["linear_attention"] * 3 + ["full_attention"])),
        "transformer": t.LlamaForCausalLM(t.LlamaConfig(**common, **heads, intermediate_size=688)),
    }


OURS = {
    "mamba": ("mamba", []), "mamba2": ("mamba2", []), "transformer": ("transformer", []),
    # transformers' generate needs one layer of attention: both sides have three of the delta rule and one of that.
    "gated-deltanet": ("qwen3-next", ["model.mixers.memory.heads={value: 4, dim_key: 64, dim_value: 64}",
                                      "model.mixers.feedforward={kind: swiglu}"]),
}


def ours(name: str) -> Any:
    recipe, changes = OURS[name]
    return postformer.load(recipe, [*changes, f"model.vocab={VOCAB}"], width=WIDTH, layers=LAYERS).build().eval()


def seconds(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Clock:
    """Notes when a token comes; transformers' `generate` calls `put` for each."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Any = None) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def blocks(self, size: int = 16) -> list[float]:
        """Seconds per token of each run of tokens, without the prompt and the first of them."""
        t = self.times[size :]
        return [(t[i + size] - t[i]) / size for i in range(0, len(t) - size, size)]


def own(model: torch.nn.Module, prompt: Any, tokens: int) -> list[float]:
    clock = Clock()
    for _ in stream(model, prompt, GREEDY, tokens + 17):
        clock.put()
    return clock.blocks()


def other(peer: Any, prompt: torch.Tensor, tokens: int) -> list[float]:
    clock = Clock()
    peer.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens + 17,
                  min_new_tokens=tokens + 17, do_sample=False, streamer=clock)
    return clock.blocks()


def compare(tokens: int, rounds: int) -> None:
    prompt = torch.randint(0, VOCAB, (1, 64), generator=torch.Generator().manual_seed(0))
    print(f"{'':16}{'params':>17}{'postformer':>22}{'transformers':>22}{'ratio':>8}")
    for name, peer in peers().items():
        peer.eval()
        peer.generation_config.eos_token_id, peer.generation_config.pad_token_id = None, 0
        model = ours(name)
        times: list[list[float]] = [[], []]
        for _ in range(rounds):
            times[0] += own(model, prompt, tokens)
            times[1] += other(peer, prompt, tokens)
        size = "/".join(f"{sum(p.numel() for p in m.parameters()) / 1e6:.2f}M" for m in (model, peer))
        each = [f"{1 / min(t):.0f}/s ({1 / statistics.median(t):.0f})" for t in times]
        print(f"{name:16}{size:>17}{each[0]:>22}{each[1]:>22}{min(times[1]) / min(times[0]):>7.1f}x", flush=True)


def stepping(tokens: int, rounds: int) -> None:
    """The step alone: without drawing, and against the floor of reading every weight once."""
    print(f"\n{'':16}{'step':>12}{'weights read once':>20}")
    for name in OURS:
        model = ours(name)
        with torch.inference_mode():
            stepper, token = Stepper(model, model.initial(1), 1000), torch.zeros(1, dtype=torch.long)
            for _ in range(10):
                stepper.step(token)
            best = min(seconds(lambda s=stepper, t=token: [s.step(t) for _ in range(16)]) / 16
                       for _ in range(rounds * tokens // 16))
        flat = torch.cat([p.detach().flatten() for p in model.parameters()])
        floor = min(seconds(flat.sum) for _ in range(50))
        print(f"{name:16}{best * 1e6:>9.0f} us{floor * 1e6:>17.0f} us   {stepper.reason or 'compiled'}", flush=True)


def aged(state: Any, context: int) -> Any:
    """The state as after that many tokens, with random keys and values."""
    if isinstance(state, Growing):
        shape = (1, context, *state.data.shape[2:])
        return Growing(torch.randn(shape), torch.full_like(state.length, context))
    if isinstance(state, torch.Tensor):
        return torch.full_like(state, context) if state.dtype == torch.long and state.ndim == 1 else state.clone()
    parts = None if state is None else [aged(part, context) for part in state]
    return parts if parts is None else type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)


def contexts(lengths: list[int], tokens: int, rounds: int) -> None:
    print(f"\n{'context':16}" + "".join(f"{n:>22}" for n in lengths))
    for name in OURS:
        model = ours(name)
        prompt = torch.randint(0, VOCAB, (1, 64))
        start = generate(model, prompt, GREEDY, 1).trace.after
        assert start is not None
        line = f"{name:16}"
        for context in lengths:
            prefix = Prefix(start.tokens, start.valid, aged(start.state, context))
            times = [t for _ in range(rounds) for t in own(model, prefix, tokens)]
            line += f"{min(times) * 1e6:>10.0f} us{states.size(prefix.state) / 2**20:>6.1f} MiB"
            gc.collect()
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--contexts", default="100,1000,10000,100000")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    print(f"width {WIDTH}, {LAYERS} layers, greedy, fp32, threads {given.threads}: best of {given.rounds} (median)\n")
    compare(given.tokens, given.rounds)
    stepping(given.tokens, given.rounds)
    contexts([int(n) for n in given.contexts.split(",")], 32, 2)


if __name__ == "__main__":
    main()
