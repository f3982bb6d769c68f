"""Documents: what was to be kept is asked many documents later, each of which is a document of its own to the model.

    KEEP a 3 c 1 e 0 | LOCAL c 2 a 0 f 3 ? a | LOCAL ... ? f | ASK e a c    targets 0 at ? a, ..., and 0 3 1 at the end

The first document gives pairs that are worth keeping. Each later one gives pairs of its own, with the same symbols and
other values, of which one is asked at its own end: so a memory must learn from it, and must not let it overwrite what
is kept. The last document asks for the pairs of the first. A memory that forgets at the end of a document answers only
the questions inside one; one that never forgets has its pairs overwritten. What is needed is consolidation: what the
fast memory learned goes into a slow one, once, and only if it matters (complementary learning systems; nested learning,
2512.24695).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from postformer.contract.context import DOCUMENT
from postformer.task.base import IGNORE, Setting, Task, TaskBatch, TaskError, is_count, protocol
from postformer.task.draw import distinct, integers
from postformer.task.registry import register


@register
class Documents(Task):
    """Keep a document's facts over many others. A setting is (length, documents in between).

    With p pairs a document, n documents in between have a length of 2 p + 1 + n (2 p + 3) + 1 + p.

    Args:
        symbols: how many keys there are, and how many values.
        pairs: of a document; all of the first one's keys are asked at the end.
        train: the training setting or settings (a mixture, one setting a batch).
        evaluate: the evaluation settings; None: those of training, then 32 and 100 documents.

    Raises:
        TaskError: more pairs than symbols, or a length that is not that of whole documents.
    """

    name = "documents"
    unit = "documents"
    metric = "last_accuracy"

    def __init__(
        self,
        symbols: int = 16,
        pairs: int = 4,
        train: Setting | Sequence[Setting] | None = None,
        evaluate: Setting | Sequence[Setting] | None = None,
    ) -> None:
        for option, value in (("symbols", symbols), ("pairs", pairs)):
            if not is_count(value) or value < 2:
                raise TaskError(f"task {self.name}: {option} is {value!r}; give at least 2")
        if pairs > symbols:
            raise TaskError(f"task {self.name}: {pairs} pairs need as many different keys; use symbols={pairs} or more")
        self.symbols, self.pairs = symbols, pairs
        self.answers = (symbols, 2 * symbols)
        self.keep, self.local, self.query, self.ask = range(2 * symbols, 2 * symbols + 4)
        self.vocab = 2 * symbols + 4
        if train is None:
            train = [self.between(n) for n in (1, 2, 4, 8)]
        self.difficulties = protocol(self, train, evaluate, self._beyond, self.between(1))

    def between(self, documents: int) -> tuple[int, int]:
        """The setting with so many documents between what is kept and the questions."""
        p = self.pairs
        return (2 * p + 1 + documents * (2 * p + 3) + 1 + p, documents)

    def _beyond(self, length: int, documents: int) -> Sequence[Setting]:
        return [self.between(n) for n in (32, 100) if n > documents]

    def describe(self) -> str:
        return "Recall the facts of the first of many documents, each with facts of its own (arXiv 2512.24695)."

    def chance(self, setting: Setting) -> float:
        return 1 / self.symbols

    def shortcut(self, setting: Setting) -> float:
        """Any value of the first document, whatever its key."""
        return 1 / self.pairs + (1 - 1 / self.pairs) / self.symbols

    def check(self, setting: Setting) -> None:
        if not (isinstance(setting, tuple) and len(setting) == 2 and all(map(is_count, setting))):
            raise TaskError(f"task {self.name}: a setting is (length, documents), two integers of at least 1, for "
                            f"instance {self.between(4)}; got {setting!r}")
        if setting != self.between(setting[1]):
            raise TaskError(f"task {self.name}: {setting[1]} documents of {self.pairs} pairs have a length of "
                            f"{self.between(setting[1])[0]}; got {setting[0]}")

    def generate(self, setting: Setting, batch_size: int, generator: torch.Generator) -> TaskBatch:
        between = setting[1]  # type: ignore[index]
        rows, p = batch_size * (between + 1), self.pairs
        keys = distinct(self.symbols, rows, p, generator)
        values = integers(self.symbols, 2 * self.symbols, (rows, p), generator)
        pairs = torch.stack([keys, values], 2).flatten(1).unflatten(0, (batch_size, -1))
        asked = integers(0, p, (rows, 1), generator)
        own = torch.cat([keys.gather(1, asked), values.gather(1, asked)], 1).unflatten(0, (batch_size, -1))

        def mark(token: int, like: Tensor) -> Tensor:
            return torch.full_like(like[..., :1], token)

        others, end = pairs[:, 1:], own[:, 1:, :1]
        middle = torch.cat([mark(self.local, others), others, mark(self.query, others), end], 2)
        answers = torch.full_like(middle, IGNORE)
        answers[..., -1:] = own[:, 1:, 1:]
        order = distinct(p, batch_size, p, generator)
        first, last = pairs[:, 0], keys.unflatten(0, (batch_size, -1))[:, 0].gather(1, order)
        tokens = torch.cat([mark(self.keep, first), first, middle.flatten(1), mark(self.ask, last), last], 1)
        targets = torch.full_like(tokens, IGNORE)
        targets[:, 2 * p + 1 : -p - 1] = answers.flatten(1)
        targets[:, -p:] = values.unflatten(0, (batch_size, -1))[:, 0].gather(1, order)
        boundary = torch.zeros_like(tokens, dtype=torch.int8)
        boundary[:, 2 * p + 1 : -p - 1 : 2 * p + 3] = DOCUMENT
        boundary[:, -p - 1] = DOCUMENT
        return TaskBatch(tokens, targets, boundary)
