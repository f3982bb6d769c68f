"""Multi-query associative recall (MQAR): look up several values by their keys, some time after seeing the pairs.

    k1 v1 k2 v2 ... kn vn | . . k2 . . . k1 . . k4 . ...      target v2 at k2's second appearance, and so on

The exact generator of Zoology (arXiv 2312.04927): keys 1..V/2-1 and values V/2..V-1, each drawn without replacement;
after the 2n context tokens come (T - 2n)/2 slots of two tokens, and key i is asked in slot g_i, drawn without
replacement with p(g) proportional to a * g^(a-1), so that most questions come soon after the context. The label sits
on the query's own position; the value does not follow it. Every other token is filler: uniform over the vocabulary
(it may coincide with a key and is not scored), or 0.

Limits: the published generator also demands V > T, which nothing here needs; figures in the literature use V = 8192.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from postformer.task.base import IGNORE, Difficulties, Setting, Task, TaskBatch, TaskError, is_count, mixture
from postformer.task.registry import register


@register
class MQAR(Task):
    """Multi-query associative recall. A setting is (T, pairs): sequence length and number of key-value pairs.

    Args:
        vocab: V, even or odd, at least 4.
        power: a in p(g); 1 is uniform over the slots, near 0 is about 1/g.
        random_non_queries: fill what is neither context nor query with random tokens (True) or with 0 (False, as
            in the paper's figure 2).
        train: the training setting or settings (a mixture, one setting a batch).
        evaluate: the evaluation settings; those with more pairs or tokens than any training setting count as outside.
            None: the training settings, then twice and four times their most pairs, as far as the vocabulary goes.

    Raises:
        TaskError: a setting whose pairs do not fit its length (4 * pairs <= T, T even) or the vocabulary.
    """

    name = "mqar"
    unit = "pairs"

    def __init__(
        self,
        vocab: int = 128,
        power: float = 0.01,
        random_non_queries: bool = True,
        train: Setting | Sequence[Setting] = ((64, 4), (64, 8)),
        evaluate: Setting | Sequence[Setting] | None = None,
    ) -> None:
        if not is_count(vocab) or vocab < 4:
            raise TaskError(f"task {self.name}: vocab is {vocab!r}; at least 4 ids are needed for one key and a value")
        if not power > 0:
            raise TaskError(f"task {self.name}: power is {power!r}; give a positive number, 0.01 as published")
        self.vocab, self.power, self.random_non_queries = vocab, power, random_non_queries
        self.answers = (vocab // 2, vocab)
        trained = mixture(train, 2)
        if not trained:
            raise TaskError(f"task {self.name}: no training setting; give one, for instance train=(64, 8)")
        for setting in trained:
            self.check(setting)
        most = [max(setting[axis] for setting in trained) for axis in range(2)]  # type: ignore[index]
        tested = trained + self._beyond(*most) if evaluate is None else mixture(evaluate, 2)
        for setting in tested:
            self.check(setting)
        inside = [setting for setting in tested if setting[0] <= most[0] and setting[1] <= most[1]]  # type: ignore[index]
        outside = [setting for setting in tested if setting not in inside]
        self.difficulties = Difficulties(train=trained, inside=tuple(inside), outside=tuple(outside))

    def describe(self) -> str:
        return (
            f"Recall the value bound to each of several keys (vocabulary {self.vocab}), all bound once at the start "
            "and each asked once (multi-query associative recall, arXiv 2312.04927)."
        )

    def chance(self, setting: Setting) -> float:
        """A uniform guess among the V - V//2 values."""
        return 1 / (self.vocab - self.vocab // 2)

    def shortcut(self, setting: Setting) -> float:
        """A uniform guess among the values seen in the row: remembers what was there, not what was bound to what."""
        self.check(setting)
        return 1 / setting[1]  # type: ignore[index]

    def check(self, setting: Setting) -> None:
        if not (isinstance(setting, tuple) and len(setting) == 2 and all(map(is_count, setting))):
            raise TaskError(
                f"task {self.name}: a setting is (length, pairs), two integers of at least 1, for instance (64, 8); "
                f"got {setting!r}"
            )
        length, pairs = setting
        if length % 2 or length < 4 * pairs:
            raise TaskError(
                f"task {self.name}: {pairs} pairs do not fit a length of {length}; the length must be even and at "
                f"least 4 * pairs = {4 * pairs}"
            )
        if pairs > self.vocab // 2 - 1:
            raise TaskError(
                f"task {self.name}: {pairs} pairs need as many different keys, and a vocabulary of {self.vocab} has "
                f"{self.vocab // 2 - 1}; use vocab={2 * pairs + 2} or more"
            )

    def _beyond(self, length: int, pairs: int) -> tuple[Setting, ...]:
        length = max(length, 8 * pairs)
        further = ((length, 2 * pairs), (2 * length, 4 * pairs))
        return tuple(setting for setting in further if setting[1] <= self.vocab // 2 - 1)

    def slot_weights(self, setting: Setting) -> Tensor:
        """p(g) for g = 1..(T - 2 * pairs)/2, float64, summing to one: where the first key drawn is asked."""
        self.check(setting)
        length, pairs = setting  # type: ignore[misc]
        g = torch.arange(1, (length - 2 * pairs) // 2 + 1, dtype=torch.float64)
        p = self.power * g ** (self.power - 1)
        return p / p.sum()

    def generate(self, setting: Setting, batch_size: int, generator: torch.Generator) -> TaskBatch:
        length, pairs = setting  # type: ignore[misc]
        device, half = generator.device, self.vocab // 2
        keys = 1 + self._distinct(half - 1, batch_size, pairs, generator)
        values = half + self._distinct(self.vocab - half, batch_size, pairs, generator)
        # Dividing exponential noise by the weights and taking the smallest is the same as drawing one by one without
        # replacement (Gumbel top-k), for a whole batch at once.
        weights = self.slot_weights(setting).to(device)
        noise = torch.empty(batch_size, len(weights), dtype=torch.float64, device=device)
        slots = (noise.exponential_(generator=generator) / weights).topk(pairs, largest=False).indices

        if self.random_non_queries:
            tokens = torch.randint(self.vocab, (batch_size, length), generator=generator, device=device)
        else:
            tokens = torch.zeros(batch_size, length, dtype=torch.int64, device=device)
        tokens[:, 0 : 2 * pairs : 2] = keys
        tokens[:, 1 : 2 * pairs : 2] = values
        position = 2 * pairs + 2 * slots
        tokens.scatter_(1, position, keys)
        targets = torch.full_like(tokens, IGNORE).scatter_(1, position, values)
        return TaskBatch(tokens, targets)

    @staticmethod
    def _distinct(choices: int, rows: int, count: int, generator: torch.Generator) -> Tensor:
        """[rows, count] integers of 0..choices-1, uniform, without replacement within a row."""
        noise = torch.rand(rows, choices, dtype=torch.float64, generator=generator, device=generator.device)
        return noise.topk(count, sorted=True).indices
