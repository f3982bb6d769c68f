"""Draws that several tasks make, for a whole batch at once, from a given generator."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def distinct(weights: int | Tensor, rows: int, count: int, generator: torch.Generator) -> Tensor:
    """[rows, count] int64 drawn one by one without replacement, each row for itself.

    weights [n]: item i comes first with probability weights[i] / sum, then likewise among those left; an integer n:
    all of 0..n-1 alike. `count` is at most n.
    """
    size = weights if isinstance(weights, int) else len(weights)
    noise = torch.empty(rows, size, dtype=torch.float64, device=generator.device).exponential_(generator=generator)
    if isinstance(weights, Tensor):
        noise = noise / weights.to(noise)
    # The smallest of exponential noise over the weights is a draw by them, the next smallest the next (Gumbel top-k).
    return noise.topk(count, largest=False, sorted=True).indices


def integers(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """int64 of that shape, uniform from low to below high."""
    return torch.randint(low, high, shape, generator=generator, device=generator.device)


def expected_mode(draws: int, choices: int) -> float:
    """How often the most frequent value is expected to occur among so many uniform draws, as a share of them.

    Who knows a row's tokens but not their order, and answers the most frequent one everywhere, is right so often.
    """
    # P(no value more than m times) = draws! / choices^draws times the coefficient of x^draws in
    # (sum_{j <= m} x^j / j!)^choices; here x is scaled so that the coefficients stay near 1.
    scale = draws / choices
    below = 0.0
    whole = math.lgamma(draws + 1) - draws * math.log(draws)
    for most in range(1, draws):
        term = np.array([math.exp(j * math.log(scale) - math.lgamma(j + 1) - scale) for j in range(most + 1)])
        product, power, left = np.ones(1), term, choices
        while left:  # by squaring
            if left & 1:
                product = np.convolve(product, power)[: draws + 1]
            power, left = np.convolve(power, power)[: draws + 1], left >> 1
        if len(product) > draws:
            below += product[draws] * math.exp(whole + draws)
    return (draws - below) / draws


def hide(blocks: Tensor, places: Tensor, filler: Tensor) -> Tensor:
    """Text with blocks of tokens in it: blocks [B, n, s], filler [B, F] -> [B, n * s + F].

    places [B, n] floats from 0 to below F + 1: a block stands where so many whole words of filler have passed, and
    blocks between the same words in the order of their places.
    """
    rows, count, size = blocks.shape
    places, order = places.sort(1)
    blocks = blocks.gather(1, order[..., None].expand(blocks.shape))
    start = places.long() + size * torch.arange(count, device=places.device)
    taken = (start[..., None] + torch.arange(size, device=places.device)).flatten(1)
    free = torch.ones(rows, count * size + filler.shape[1], dtype=torch.bool, device=places.device)
    free.scatter_(1, taken, False)
    text = torch.empty(free.shape, dtype=filler.dtype, device=places.device)
    text[free] = filler.flatten()
    return text.scatter_(1, taken, blocks.flatten(1))


def answered(tokens: Tensor, answer: Tensor) -> Tensor:
    """Targets for tokens [B, T] whose last n positions are asked for `answer` [B, n], the others for nothing."""
    targets = torch.full_like(tokens, -100)
    targets[:, tokens.shape[1] - answer.shape[1] :] = answer
    return targets
