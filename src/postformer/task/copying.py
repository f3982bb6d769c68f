"""Copying: a string of letters, a separator, the string again (forwards or backwards).

    a b c | a b        targets a b c from the separator on        reversed: a b c | c b

Random letters cannot be compressed, so a memory of fixed size copies exactly only what fits into it, while attention
copies far longer strings after far fewer examples ("Repeat After Me", arXiv 2402.01032). Backwards it is the
context-free language of "Neural Networks and the Chomsky Hierarchy" (arXiv 2207.02098).

The earlier letters of the answer stand in the input (teacher forcing); a row right at every position is also what
greedy generation writes, so `exact_match` is the published measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from postformer.task.base import Setting, Task, TaskBatch, TaskError, is_count, protocol
from postformer.task.draw import answered, integers
from postformer.task.registry import register


class Copy(Task):
    """Copy or reverse a string. A setting is the length of the whole sequence, twice the number of letters.

    Args:
        backwards: the answer is the string reversed.
        letters: size of the alphabet.
        train: the training length or lengths (a mixture, one length a batch).
        evaluate: the evaluation lengths; None: the training lengths, then twice and four times the longest.

    Raises:
        TaskError: fewer than two letters, or an odd length.
    """

    metric = "exact_match"

    def __init__(
        self,
        backwards: bool = False,
        letters: int = 26,
        train: Setting | Sequence[Setting] = (8, 16, 24, 32),
        evaluate: Setting | Sequence[Setting] | None = None,
    ) -> None:
        self.name = "reverse" if backwards else "copy"
        if not is_count(letters) or letters < 2:
            raise TaskError(f"task {self.name}: letters is {letters!r}; an alphabet has at least 2, 26 as published")
        self.backwards, self.letters, self.vocab = backwards, letters, letters + 1
        self.answers = (0, letters)
        self.difficulties = protocol(self, train, evaluate, lambda n: (2 * n, 4 * n), 16)

    def describe(self) -> str:
        order, paper = ("backwards", "2207.02098") if self.backwards else ("again", "2402.01032")
        return f"Write a string of random letters (of {self.letters}) {order} after a separator (arXiv {paper})."

    def chance(self, setting: Setting) -> float:
        """Every letter of the string guessed."""
        self.check(setting)
        return self.letters ** -(setting // 2)  # type: ignore[operator]

    def check(self, setting: Setting) -> None:
        if not is_count(setting) or setting % 2:  # type: ignore[operator]
            raise TaskError(
                f"task {self.name}: a setting is an even length, twice the number of letters, for instance 16; got "
                f"{setting!r}"
            )

    def generate(self, setting: Setting, batch_size: int, generator: torch.Generator) -> TaskBatch:
        count: int = setting // 2  # type: ignore[operator]
        string = integers(0, self.letters, (batch_size, count), generator)
        answer = string.flip(1) if self.backwards else string
        separator = torch.full_like(string[:, :1], self.letters)
        tokens = torch.cat([string, separator, answer[:, :-1]], 1)
        return TaskBatch(tokens, answered(tokens, answer))


register("copy")(Copy)
register("reverse")(partial(Copy, backwards=True))
