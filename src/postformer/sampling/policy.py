"""Policy: how the next token is drawn from the model's distribution."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Policy:
    """temperature 0: the most likely token (greedy). top_k: only the k most likely tokens. top_p: only the smallest set
    of most likely tokens whose probability reaches p (nucleus, 1904.09751), after temperature and top_k.

    Raises ValueError for a value out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or a positive number, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {self.top_k}; leave it out to keep every token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}; leave it out to keep every token")

    def draw(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """logits [B, V] -> token ids [B] int64."""
        if self.temperature == 0:
            return logits.argmax(-1)
        scores = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k).values[:, -1:]
            scores = scores.masked_fill(scores < least, float("-inf"))
        probabilities = scores.softmax(-1)
        if self.top_p is not None and self.top_p < 1:
            ordered, index = probabilities.sort(descending=True, dim=-1)
            # A token stays while the mass before it is below p: so the one that reaches p stays too.
            ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= self.top_p, 0.0)
            probabilities = torch.zeros_like(ordered).scatter(-1, index, ordered)
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
