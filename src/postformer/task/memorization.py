"""Memorization of MAD (arXiv 2403.17844): learn a fixed map by heart, in the weights.

    k7 + k2 + k9 + ...          target v7 at the first "+", v2 at the second, and so on

The map from keys to values, one to one, depends on a fixed seed and the vocabulary alone, and is never shown: training
and test ask the same map, by design, since what has not been trained cannot be known. Only the rows differ.

Departures: the map is ours, not that of MAD's generator; a setting says how many of the keys are asked, of which MAD
asks all. MAD's accuracy is averaged over classes (macro); ours is over tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from postformer.task.base import IGNORE, Setting, Task, TaskBatch, TaskError, is_count, protocol, seeded
from postformer.task.draw import distinct, integers
from postformer.task.registry import register


@register
class Memorization(Task):
    """Memorization. A setting is (T, keys): sequence length and how many keys, the first of all, are asked.

    Args:
        vocab: all ids, at least 5: keys 0 to (V-1)//2 - 1, then values, and the last asks for the value.
        map_seed: draws the map.
        train: the training setting or settings (a mixture, one setting a batch).
        evaluate: the evaluation settings; those with more keys or tokens than any training setting count as outside.
            None: the training settings, and twice their longest.

    Raises:
        TaskError: a setting with an odd length, or with more keys than there are.
    """

    name = "memorization"
    unit = "keys"

    def __init__(
        self,
        vocab: int = 256,
        map_seed: int = 12345,
        train: Setting | Sequence[Setting] = ((32, 16), (32, 127)),
        evaluate: Setting | Sequence[Setting] | None = None,
    ) -> None:
        if not is_count(vocab) or vocab < 5:
            raise TaskError(f"task {self.name}: vocab is {vocab!r}; at least 5 ids are needed, two keys and two values")
        self.vocab, self.keys = vocab, (vocab - 1) // 2
        self.answers = (self.keys, vocab - 1)
        order = distinct(vocab - 1 - self.keys, 1, self.keys, seeded(map_seed, "map"))
        self.values = self.keys + order[0]
        """[keys] int64: the value of each key"""
        self.difficulties = protocol(self, train, evaluate, lambda length, keys: [(2 * length, keys)], (32, 16))

    def describe(self) -> str:
        return (
            f"Name the values of a fixed map of {self.keys} keys, which is never shown but trained, so that training "
            "and test ask the same (memorization of MAD, arXiv 2403.17844)."
        )

    def chance(self, setting: Setting) -> float:
        """A uniform guess among the values."""
        return 1 / (self.vocab - 1 - self.keys)

    def check(self, setting: Setting) -> None:
        if not (isinstance(setting, tuple) and len(setting) == 2 and all(map(is_count, setting))):
            raise TaskError(
                f"task {self.name}: a setting is (length, keys), two integers of at least 1, for instance (32, 16); "
                f"got {setting!r}"
            )
        length, keys = setting
        if length % 2:
            raise TaskError(f"task {self.name}: the length {length} is odd; use {length + 1}: a key and its question")
        if keys > self.keys:
            raise TaskError(
                f"task {self.name}: {keys} keys are more than the {self.keys} of a vocabulary of {self.vocab}; use "
                f"vocab={2 * keys + 1} or more"
            )

    def generate(self, setting: Setting, batch_size: int, generator: torch.Generator) -> TaskBatch:
        length, keys = setting  # type: ignore[misc]
        asked = integers(0, keys, (batch_size, length // 2), generator)
        tokens = torch.full((batch_size, length), self.vocab - 1, device=generator.device)
        tokens[:, 0::2] = asked
        targets = torch.full_like(tokens, IGNORE)
        targets[:, 1::2] = self.values.to(generator.device)[asked]
        return TaskBatch(tokens, targets)
