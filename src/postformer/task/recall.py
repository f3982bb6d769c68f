"""Multi-query associative recall (MQAR): look up several values by their keys, some time after seeing the pairs.

    k1 v1 k2 v2 ... kn vn | . . k2 . . . k1 . . k4 . ...      target v2 at k2's second appearance, and so on

The exact generator of Zoology (arXiv 2312.04927): keys 1..V/2-1 and values V/2..V-1, each drawn without replacement;
after the context's pairs come slots of two tokens to the end, and key i is asked in slot g_i, drawn without
replacement with p(g) proportional to a * g^(a-1), so that most questions come soon after the context. The label sits
on the query's own position; the value does not follow it. Every other token is filler: uniform over the vocabulary
(it may coincide with a key and is not scored), or 0.

Forgetting MQAR, as that repository has it: after the n pairs some of the keys come again, in random order, each with a
value that is not the one it had (but may be another key's), and the latest value is asked.

Limits: the published generator also demands V > T, which nothing here needs; figures in the literature use V = 8192.
Zoology's own code excludes the first value of another key than the one rewritten, so that a rewriting may change
nothing; here it always does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from postformer.task.base import IGNORE, Setting, Task, TaskBatch, TaskError, is_count, protocol
from postformer.task.draw import distinct, integers
from postformer.task.registry import register


@register
class MQAR(Task):
    """Multi-query associative recall. A setting is (T, pairs): sequence length and number of different keys.

    Args:
        vocab: V, even or odd, at least 4.
        power: a in p(g); 1 is uniform over the slots, near 0 is about 1/g.
        random_non_queries: fill what is neither context nor query with random tokens (True) or with 0 (False, as
            in the paper's figure 2).
        rewrite: the fraction of the keys that get a second value, rounded to a number of keys; 0 is plain MQAR.
        train: the training setting or settings (a mixture, one setting a batch).
        evaluate: the evaluation settings; those with more pairs or tokens than any training setting count as outside.
            None: the training settings, then twice and four times their most pairs, as far as the vocabulary goes.

    Raises:
        TaskError: a setting whose pairs do not fit its length (4 * pairs + 2 * rewritten <= T, T even) or the
            vocabulary, or of which none or all keys would be rewritten where some should.
    """

    name = "mqar"
    unit = "pairs"

    def __init__(
        self,
        vocab: int = 128,
        power: float = 0.01,
        random_non_queries: bool = True,
        rewrite: float = 0.0,
        train: Setting | Sequence[Setting] = ((64, 4), (64, 8)),
        evaluate: Setting | Sequence[Setting] | None = None,
    ) -> None:
        self.name = "forgetting-mqar" if rewrite else "mqar"
        if not is_count(vocab) or vocab < 4:
            raise TaskError(f"task {self.name}: vocab is {vocab!r}; at least 4 ids are needed for one key and a value")
        if not power > 0:
            raise TaskError(f"task {self.name}: power is {power!r}; give a positive number, 0.01 as published")
        if not 0 <= rewrite < 1:
            raise TaskError(f"task {self.name}: rewrite is {rewrite!r}; give a fraction from 0 to below 1")
        self.vocab, self.power, self.random_non_queries, self.rewrite = vocab, power, random_non_queries, rewrite
        self.answers = (vocab // 2, vocab)
        self.difficulties = protocol(self, train, evaluate, self._beyond, (64, 8))

    def describe(self) -> str:
        if self.rewrite:
            return (
                f"Recall the latest value of each of several keys (vocabulary {self.vocab}), of which "
                f"{self.rewrite:.0%} are bound a second time (forgetting MQAR, arXiv 2312.04927)."
            )
        return (
            f"Recall the value bound to each of several keys (vocabulary {self.vocab}), all bound once at the start "
            "and each asked once (multi-query associative recall, arXiv 2312.04927)."
        )

    def chance(self, setting: Setting) -> float:
        """A uniform guess among the V - V//2 values."""
        return 1 / (self.vocab - self.vocab // 2)

    def shortcut(self, setting: Setting) -> float:
        """A uniform guess among the values seen in the row, which remembers what was there, not what was bound to
        what; with rewriting, the first value of every key, which is right for those not rewritten."""
        self.check(setting)
        pairs: int = setting[1]  # type: ignore[index]
        return 1 - self._rewritten(pairs) / pairs if self.rewrite else 1 / pairs

    def check(self, setting: Setting) -> None:
        if not (isinstance(setting, tuple) and len(setting) == 2 and all(map(is_count, setting))):
            raise TaskError(
                f"task {self.name}: a setting is (length, pairs), two integers of at least 1, for instance (64, 8); "
                f"got {setting!r}"
            )
        length, pairs = setting
        if self.rewrite and not 0 < self._rewritten(pairs) < pairs:
            raise TaskError(
                f"task {self.name}: of {pairs} keys, rewrite={self.rewrite:g} changes {self._rewritten(pairs)}; use "
                "more pairs or another fraction, so that some are changed and some are not"
            )
        if length % 2 or length < self._room(pairs):
            least = f"4 * pairs{' + 2 * rewritten' if self.rewrite else ''} = {self._room(pairs)}"
            raise TaskError(
                f"task {self.name}: {pairs} pairs do not fit a length of {length}; the length must be even and at "
                f"least {least}"
            )
        if pairs > self.vocab // 2 - 1:
            raise TaskError(
                f"task {self.name}: {pairs} pairs need as many different keys, and a vocabulary of {self.vocab} has "
                f"{self.vocab // 2 - 1}; use vocab={2 * pairs + 2} or more"
            )

    def _rewritten(self, pairs: int) -> int:
        return round(self.rewrite * pairs)

    def _room(self, pairs: int) -> int:
        """The shortest length: context, and one slot a question."""
        return 4 * pairs + 2 * self._rewritten(pairs)

    def _beyond(self, length: int, pairs: int) -> list[Setting]:
        twice = max(length, self._room(2 * pairs))
        further = ((twice, 2 * pairs), (max(2 * twice, self._room(4 * pairs)), 4 * pairs))
        return [setting for setting in further if setting[1] <= self.vocab // 2 - 1]

    def slot_weights(self, setting: Setting) -> Tensor:
        """p(g) for the slots g = 1, 2, ... after the context, float64, summing to one: where the first key drawn is
        asked."""
        self.check(setting)
        length, pairs = setting  # type: ignore[misc]
        slots = length // 2 - pairs - self._rewritten(pairs)
        g = torch.arange(1, slots + 1, dtype=torch.float64)
        p = self.power * g ** (self.power - 1)
        return p / p.sum()

    def generate(self, setting: Setting, batch_size: int, generator: torch.Generator) -> TaskBatch:
        length, pairs = setting  # type: ignore[misc]
        half, others = self.vocab // 2, self.vocab - self.vocab // 2
        keys = 1 + distinct(half - 1, batch_size, pairs, generator)
        values = distinct(others, batch_size, pairs, generator)
        bound, latest = [keys], [values]
        if rewritten := self._rewritten(pairs):
            which = distinct(pairs, batch_size, rewritten, generator)
            change = integers(1, others, (batch_size, rewritten), generator)
            bound.append(keys.gather(1, which))
            latest.append((values.gather(1, which) + change) % others)
            values = values.scatter(1, which, latest[-1])
        slots = distinct(self.slot_weights(setting), batch_size, pairs, generator)

        if self.random_non_queries:
            tokens = integers(0, self.vocab, (batch_size, length), generator)
        else:
            tokens = torch.zeros(batch_size, length, dtype=torch.int64, device=generator.device)
        context = 2 * (pairs + rewritten)
        tokens[:, 0:context:2] = torch.cat(bound, 1)
        tokens[:, 1:context:2] = half + torch.cat(latest, 1)
        position = context + 2 * slots
        tokens.scatter_(1, position, keys)
        targets = torch.full_like(tokens, IGNORE).scatter_(1, position, half + values)
        return TaskBatch(tokens, targets)


register("forgetting-mqar")(partial(MQAR, rewrite=0.5))
