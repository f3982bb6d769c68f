"""Training throughput against transformers' own classes of the same size, side by side in one process.

    python benchmarks/throughput.py [--threads 2] [--rounds 5] [--json]

Width 256, 4 layers, 2 x 1024 tokens (Mamba-1: 2 x 128, as its class loops over tokens in Python): forward, backward and
no optimiser. Both sides take turns; the minimum over the rounds counts, since whatever else runs only ever adds time.
The floor is the multiply-adds of the pass (declared FLOPs, times three for the backward) over the rate of a 1024^3
matrix product measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
import torch.nn.functional as F

from postformer.design import load
from postformer.model import build

SIZE = {"vocab_size": 256, "hidden_size": 256, "num_hidden_layers": 4}


def theirs(name: str) -> torch.nn.Module:
    """transformers' class of the recipe's size, freshly initialised."""
    import transformers as t

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 688}
    if name == "transformer":
        return t.LlamaForCausalLM(t.LlamaConfig(**SIZE, **heads, tie_word_embeddings=True, use_cache=False))
    if name == "mamba2":
        return t.Mamba2ForCausalLM(t.Mamba2Config(**SIZE, num_heads=8, head_dim=64, state_size=64, n_groups=1,
                                                  chunk_size=64, tie_word_embeddings=True, use_cache=False))
    if name == "mamba":
        return t.MambaForCausalLM(t.MambaConfig(**SIZE, state_size=16, use_cache=False))
    if name == "gated-deltanet":
        config = t.Qwen3NextConfig(
            **SIZE, **heads, linear_num_value_heads=4, linear_num_key_heads=4, linear_key_head_dim=64,
            linear_value_head_dim=64, layer_types=["linear_attention"] * 4, mlp_only_layers=[0, 1, 2, 3],
            tie_word_embeddings=True, use_cache=False)
        return t.Qwen3NextForCausalLM(config)
    raise ValueError(name)


def step(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Seconds of one forward and backward pass."""
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    out = model(tokens)
    F.cross_entropy(out.logits.flatten(0, 1), tokens.flatten()).backward()
    return time.perf_counter() - start


def gemm_rate(n: int = 1024) -> float:
    """FLOP/s of an n^3 fp32 product, best of ten."""
    a, b, best = torch.randn(n, n), torch.randn(n, n), float("inf")
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rate, rows = gemm_rate(), []
    print(f"{args.threads} threads, GEMM {rate / 1e9:.0f} GFLOP/s, torch {torch.__version__}")
    print(f"{'recipe':<16} {'tokens':>8} {'ours tok/s':>11} {'theirs tok/s':>13} {'ratio':>6} {'of floor':>9}")
    for name, length in (("transformer", 1024), ("mamba2", 1024), ("gated-deltanet", 1024), ("mamba", 128)):
        recipe = load(name, width=256, layers=4)
        ours, other = build(recipe.model), theirs(name)
        tokens = torch.randint(0, 256, (2, length))
        best = {"ours": float("inf"), "theirs": float("inf")}
        for _ in range(args.rounds):
            best["ours"] = min(best["ours"], step(ours, tokens))
            best["theirs"] = min(best["theirs"], step(other, tokens))
        floor = 3 * 2 * recipe.cost().flops(length) / rate
        speed = {k: 2 * length / v for k, v in best.items()}
        params = [sum(p.numel() for p in m.parameters()) for m in (ours, other)]
        rows.append({"recipe": name, "length": length, "params": params, "ours": speed["ours"],
                     "theirs": speed["theirs"], "ratio": speed["ours"] / speed["theirs"],
                     "share_of_floor": floor / best["ours"]})
        print(f"{name:<16} {2 * length:>8} {speed['ours']:>11.0f} {speed['theirs']:>13.0f} "
              f"{rows[-1]['ratio']:>6.2f} {rows[-1]['share_of_floor']:>9.1%}   params {params[0]:,} / {params[1]:,}")
    if args.json:
        print(json.dumps({"threads": args.threads, "gemm_flops": rate, "rows": rows}))


if __name__ == "__main__":
    main()
