"""Policy: how the next token is drawn from the model's distribution."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Policy:
    """temperature 0: the most likely token (greedy). repetition_penalty: logits of tokens already in the row are
    divided by it where positive and multiplied where negative (1909.05858), before everything else. Then temperature;
    then top_k: only the k most likely tokens; min_p: only tokens at least this many times as likely as the most likely
    one (2407.01082); top_p: only the smallest set of most likely tokens whose probability reaches p (nucleus,
    1904.09751).

    Raises ValueError for a value out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or a positive number, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {self.top_k}; leave it out to keep every token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}; leave it out to keep every token")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], not {self.min_p}; leave it out to keep every token")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be positive (1: none), not {self.repetition_penalty}")

    @property
    def remembers(self) -> bool:
        """Whether draws depend on the tokens already there."""
        return self.repetition_penalty != 1

    def draw(self, logits: Tensor, generator: torch.Generator | None = None, seen: Tensor | None = None) -> Tensor:
        """logits [B, V] -> token ids [B] int64. seen: [B, V] bool, tokens that are in the row already."""
        if self.remembers and seen is not None:
            factor = torch.where(logits > 0, 1 / self.repetition_penalty, self.repetition_penalty)
            logits = torch.where(seen, logits * factor, logits)
        if self.temperature == 0:
            return logits.argmax(-1)
        scores = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k).values[:, -1:]
            scores = scores.masked_fill(scores < least, float("-inf"))
        probabilities = scores.softmax(-1)
        if self.min_p:
            least = self.min_p * probabilities.amax(-1, keepdim=True)
            probabilities = probabilities.masked_fill(probabilities < least, 0.0)
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        if self.top_p is not None and self.top_p < 1:
            ordered, index = probabilities.sort(descending=True, dim=-1)
            # A token stays while the mass before it is below p: so the one that reaches p stays too.
            ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= self.top_p, 0.0)
            probabilities = torch.zeros_like(ordered).scatter(-1, index, ordered)
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def seen_in(tokens: Tensor, valid: Tensor | None, vocab: int) -> Tensor:
    """tokens [B, T], valid [B, T] or None -> [B, vocab] bool: which tokens a row holds."""
    there = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
    counted = torch.zeros(tokens.shape[0], vocab, dtype=torch.long, device=tokens.device)
    return counted.scatter_add(1, tokens, there.long()) > 0
