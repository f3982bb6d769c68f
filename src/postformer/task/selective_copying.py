"""Selective copying of MAD (arXiv 2403.17844): give back the tokens that stood among blanks, in their order.

    . a . . b . . . c > . . .          targets a b c at the three last positions

n tokens, uniform with repetition; T - 2n - 1 blanks, each before one of them, uniform; the copy token; n blanks at
which the answers are asked. The last token to copy stands therefore directly before the copy token.

Departures: MAD's accuracy is averaged over classes (macro); ours is over tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from postformer.task.base import IGNORE, Setting, Task, TaskBatch, TaskError, is_count, protocol
from postformer.task.draw import expected_mode, integers
from postformer.task.registry import register


@register
class SelectiveCopying(Task):
    """Selective copying. A setting is (T, n): sequence length and number of tokens to copy.

    Args:
        vocab: all ids, at least 4: the last is the copy token, the last but one the blank.
        train: the training setting or settings (a mixture, one setting a batch).
        evaluate: the evaluation settings; those with more tokens than any training setting count as outside.
            None: the training settings, then twice their longest length and most tokens.

    Raises:
        TaskError: a setting whose length is below 2 * n + 1.
    """

    name = "selective-copying"
    unit = "tokens to copy"

    def __init__(
        self,
        vocab: int = 16,
        train: Setting | Sequence[Setting] = ((64, 4), (64, 8)),
        evaluate: Setting | Sequence[Setting] | None = None,
    ) -> None:
        if not is_count(vocab) or vocab < 4:
            raise TaskError(f"task {self.name}: vocab is {vocab!r}; at least 4 ids are needed, two of them to copy")
        self.vocab = vocab
        self.answers = (0, vocab - 2)
        self.difficulties = protocol(self, train, evaluate, lambda length, n: [(2 * length, 2 * n)], (64, 8))

    def describe(self) -> str:
        return (
            f"Copy the tokens ({self.vocab - 2} kinds) that stood among blanks, in their order (selective copying of "
            "MAD, arXiv 2403.17844)."
        )

    def chance(self, setting: Setting) -> float:
        """A uniform guess among the tokens to copy."""
        return 1 / (self.vocab - 2)

    def shortcut(self, setting: Setting) -> float:
        """The row's most frequent token everywhere: remembers what was there, but not the order."""
        self.check(setting)
        return expected_mode(setting[1], self.vocab - 2)  # type: ignore[index]

    def check(self, setting: Setting) -> None:
        if not (isinstance(setting, tuple) and len(setting) == 2 and all(map(is_count, setting))):
            raise TaskError(
                f"task {self.name}: a setting is (length, tokens to copy), two integers of at least 1, for instance "
                f"(64, 8); got {setting!r}"
            )
        length, n = setting
        if length < 2 * n + 1:
            raise TaskError(
                f"task {self.name}: {n} tokens and their copies do not fit a length of {length}; use at least "
                f"2 * n + 1 = {2 * n + 1}"
            )

    def generate(self, setting: Setting, batch_size: int, generator: torch.Generator) -> TaskBatch:
        length, n = setting  # type: ignore[misc]
        copied = integers(0, self.vocab - 2, (batch_size, n), generator)
        before = integers(0, n, (batch_size, length - 2 * n - 1), generator)
        blanks = torch.zeros_like(copied).scatter_add_(1, before, torch.ones_like(before)).cumsum(1)
        tokens = torch.full((batch_size, length), self.vocab - 2, device=generator.device)
        tokens.scatter_(1, blanks + torch.arange(n, device=generator.device), copied)
        tokens[:, length - n - 1] = self.vocab - 1
        targets = torch.full_like(tokens, IGNORE)
        targets[:, length - n :] = copied
        return TaskBatch(tokens, targets)
