"""Hops: follow pairs given in any order for k steps.

    d> a  b> d  a> c  c> b  HOPS2 d> b>        targets c a: from d to a to c, from b to d to a

Pointer chasing: the pairs are one cycle over n symbols, and k is said before the questions. A symbol has one token as
where a pointer starts and another as where it ends, so that the order of tokens need not tell. Function composition:
the pairs are k one-to-one functions, each from its own set of symbols to the next one's, shuffled together, and the
last set's symbol is asked. A layer of attention or a state-space layer of bounded width needs memory in proportion to
the symbols to compose two functions ("On limitations of the Transformer architecture", arXiv 2402.08164; for
state-space models arXiv 2405.16674), and k hops need depth that grows with log k (arXiv 2402.09268).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from postformer.task.base import Setting, Task, TaskBatch, TaskError, is_count, protocol
from postformer.task.draw import answered, distinct
from postformer.task.registry import register


class Hops(Task):
    """Where k steps lead from a symbol. A setting is (length, k).

    n pairs a function, two tokens a pair, then a token that says k and the questions: pointer chasing has a length of
    2 n + 1 + questions, function composition one of 2 n k + 1 + questions.

    Args:
        functions: function composition; else pointer chasing.
        symbols: how many symbols there are, in each set.
        hops: the greatest k.
        questions: how many symbols are asked, one after the other; all different.
        train: the training setting or settings (a mixture, one setting a batch); None: 8 pairs a function, for every
            k from 1 to half the greatest, rounded up.
        evaluate: the evaluation settings; None: those of training, then the greatest k, also with 16 pairs.

    Raises:
        TaskError: more pairs than symbols, more questions than pairs, or a length that is not that of whole pairs.
    """

    unit = "hops"

    def __init__(
        self,
        functions: bool = False,
        symbols: int = 16,
        hops: int = 4,
        questions: int = 4,
        train: Setting | Sequence[Setting] | None = None,
        evaluate: Setting | Sequence[Setting] | None = None,
    ) -> None:
        self.name = "composition" if functions else "pointer-chasing"
        for option, value in (("symbols", symbols), ("hops", hops), ("questions", questions)):
            if not is_count(value):
                raise TaskError(f"task {self.name}: {option} is {value!r}; give at least 1")
        self.functions, self.symbols, self.hops, self.questions = functions, symbols, hops, questions
        self.answers = (0, symbols)
        self._say = symbols * (hops + 1 if functions else 2)
        self.vocab = self._say + hops
        if train is None:
            train = [self.pairs(8, k) for k in range(1, (hops + 1) // 2 + 1)]
        self.difficulties = protocol(self, train, evaluate, self._beyond, self.pairs(8, 1))

    def pairs(self, count: int, hops: int) -> tuple[int, int]:
        """The setting of so many hops, and so many pairs a function."""
        return (2 * count * (hops if self.functions else 1) + 1 + self.questions, hops)

    def _count(self, length: int, hops: int) -> int:
        return (length - 1 - self.questions) // (2 * hops if self.functions else 2)

    def _beyond(self, *_: int) -> Sequence[Setting]:
        return [self.pairs(count, self.hops) for count in (8, 16) if count <= self.symbols]

    def describe(self) -> str:
        if self.functions:
            return "Compose functions that are given as shuffled pairs (arXiv 2402.08164, 2405.16674)."
        return "Follow a cycle of pointers, given as shuffled pairs, for k steps (arXiv 2402.09268)."

    def chance(self, setting: Setting) -> float:
        return 1 / self.symbols

    def shortcut(self, setting: Setting) -> float:
        """Any symbol of the row that could be the answer: of the last set, or not the one asked."""
        self.check(setting)
        count = self._count(*setting)  # type: ignore[misc]
        return 1 / count if self.functions else 1 / (count - 1)

    def check(self, setting: Setting) -> None:
        example = self.pairs(min(8, self.symbols), 1)
        if not (isinstance(setting, tuple) and len(setting) == 2 and all(map(is_count, setting))):
            raise TaskError(
                f"task {self.name}: a setting is (length, hops), two integers of at least 1, for instance {example}; "
                f"got {setting!r}"
            )
        length, hops = setting
        count = self._count(length, hops)
        if hops > self.hops:
            raise TaskError(f"task {self.name}: {hops} hops are more than {self.hops}; use hops={hops} or more")
        least = max(self.questions, 2) if self.functions else max(self.questions, hops + 1, 3)
        if setting != self.pairs(count, hops) or count < least:
            raise TaskError(
                f"task {self.name}: {hops} hops and {self.questions} questions need at least {least} pairs a function, "
                f"and a length of {self.pairs(least, hops)[0]} plus a multiple of "
                f"{self.pairs(1, hops)[0] - self.pairs(0, hops)[0]}; got {length}"
            )
        if count > self.symbols:
            raise TaskError(
                f"task {self.name}: {count} pairs need as many different symbols; use symbols={count} or more"
            )

    def generate(self, setting: Setting, batch_size: int, generator: torch.Generator) -> TaskBatch:
        length, hops = setting  # type: ignore[misc]
        count = self._count(length, hops)

        def draw() -> Tensor:
            return distinct(self.symbols, batch_size, count, generator)

        # paths[:, s, i]: where path i is after s steps. The last set's symbols are 0..symbols-1, whatever k is.
        if self.functions:
            paths = torch.stack([draw() + self.symbols * (hops - s) for s in range(hops + 1)], 1)
            pairs = torch.stack([paths[:, :-1], paths[:, 1:]], 3).flatten(1, 2)
        else:
            cycle = draw()
            paths = torch.stack([cycle + self.symbols, *(cycle.roll(-s, 1) for s in range(1, hops + 1))], 1)
            pairs = torch.stack([paths[:, 0], paths[:, 1]], 2)
        order = distinct(pairs.shape[1], batch_size, pairs.shape[1], generator)
        pairs = pairs.gather(1, order[..., None].expand(pairs.shape))

        asked = distinct(count, batch_size, self.questions, generator)
        start, end = paths[:, 0].gather(1, asked), paths[:, hops].gather(1, asked)
        say = torch.full_like(start[:, :1], self._say + hops - 1)
        tokens = torch.cat([pairs.flatten(1), say, start], 1)
        return TaskBatch(tokens, answered(tokens, end))


register("pointer-chasing")(Hops)
register("composition")(partial(Hops, functions=True))
