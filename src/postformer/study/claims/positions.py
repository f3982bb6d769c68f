"""T9: how much each position of the input sways the last output, before any training."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from postformer.design import load
from postformer.model import build
from postformer.study.claims.base import Claim, Figure, claim
from postformer.study.claims.results import Results

DECAYING = ("retnet", "gla", "mamba2", "gated-deltanet")
PARTS = 8
VOCAB = 256


def influence(
    recipe: str, tokens: int, layers: int, seeds: int, width: int = 64, rows: int = 2, probes: int = 4
) -> Tensor:
    """[tokens]: the norm of d(last output) / d(embedding at i) of untrained models, as shares of their sum.

    The squared Frobenius norm is the mean of |c J|^2 over standard normal c, `probes` of them.
    """
    total = torch.zeros(tokens)
    for seed in range(seeds):
        model = build(load(recipe, [f"model.vocab={VOCAB}"], width, layers).model, seed).requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        x = model.embed(torch.randint(VOCAB, (rows, tokens), generator=generator)).requires_grad_(True)
        last = model.run(x)[0].y[:, -1]
        squares = torch.zeros(tokens)
        for _ in range(probes):
            probe = torch.randn(last.shape, generator=generator)
            (gradient,) = torch.autograd.grad(last, x, probe, retain_graph=True)
            squares += gradient.square().sum(-1).mean(0) / probes
        total += squares.sqrt()
    return total / total.sum()


def averaging(tokens: int, layers: int, weight: float) -> Tensor:
    """[tokens] float64: last row of ((1 - a) I + a C)^L, where row t of C is the mean of positions 0..t."""
    causal = torch.ones(tokens, tokens, dtype=torch.float64).tril()
    mean = causal / causal.sum(1, keepdim=True)
    mixed = (1 - weight) * torch.eye(tokens, dtype=torch.float64) + weight * mean
    return torch.linalg.matrix_power(mixed, layers)[-1]


def parts(shares: Tensor) -> list[float]:
    """The mean share in each eighth of the positions."""
    return [float(part.mean()) for part in shares.chunk(PARTS)]


def valley(shares: Tensor) -> bool:
    """Whether the least of the eighths is neither the first nor the last."""
    means = parts(shares)
    return min(means) < min(means[0], means[-1])


def rising(shares: Tensor) -> bool:
    """Whether every eighth has at least as much as the one before it."""
    means = parts(shares)
    return all(a <= b for a, b in pairwise(means))


def _figures(name: str, shares: Tensor) -> list[Figure]:
    means = parts(shares)
    where = ("first eighth", "least eighth", "last eighth")
    values = (means[0], min(means), means[-1])
    return [Figure(name=f"{name}: {part}", value=len(shares) * value, unit="times the mean")
            for part, value in zip(where, values, strict=True)]


@claim("T9")
def lost_in_the_middle(results: Results, quick: bool) -> Claim:
    """Untrained stacks and the matrix that they amount to."""
    tokens, layers, seeds = (128, 8, 3) if quick else (256, 8, 5)
    figures, wrong = [], []
    for weight in (0.1, 0.3, 0.5):
        shares = averaging(tokens, layers, weight)
        figures += _figures(f"averaging, a = {weight}", shares)
        if not valley(shares):
            wrong.append(f"averaging with a = {weight} has no valley")
    shares = influence("transformer", tokens, layers, seeds)
    figures += _figures("transformer", shares)
    if not valley(shares):
        wrong.append("the transformer has no valley")
    for recipe in DECAYING:
        shares = influence(recipe, tokens, layers, seeds)
        figures += _figures(recipe, shares)
        if not rising(shares):
            wrong.append(f"{recipe} does not rise towards the end")
    return Claim(
        id="T9", title="Lost in the middle before training",
        statement="In an untrained causal transformer the last output depends most on the first and the last positions "
        "and least on those between: averaging over the past, layer upon layer, favours the start, and the residual "
        "path the end. Memories that decay favour the recent instead.",
        source="Chowdhury 2026 (for attention); the contrast with decaying memories is from notes",
        papers=("2603.10123",), from_notes=True,
        test=f"Norm of the gradient of the last output by the embedding at each of {tokens} positions, {layers} "
        f"layers, seeds: {seeds}; and the last row of ((1 - a) I + a C)^{layers} with C the matrix of running means. "
        "It holds if both have their least eighth inside, and every eighth of a decaying memory has at least as much "
        "as the one before it. Memories that decay little over so many positions look like averaging. "
        "Whether trained models lose the middle is not tested here.",
        figures=tuple(figures), verdict="does not hold" if wrong else "holds",
        reason="; ".join(wrong).capitalize() + "." if wrong else "The transformer and the matrix are lowest inside; "
        f"{', '.join(DECAYING)} rise towards the end.",
        misread="That a bias at the start of training proves one at its end: it says where learning has less to work "
        "with, not what is learned.",
    )
