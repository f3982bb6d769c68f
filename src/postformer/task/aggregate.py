"""Aggregation: questions about many lines at once, none of which can be answered from one line.

    u1 c2  w w  u3 c0  w  u1 c2  w ...  ASK ...

Lines of a user and a class stand among filler words. As in OOLONG (arXiv 2511.02817), where every line must be judged
before it is counted, questions are about all lines: how many of a class, the most frequent class, the most frequent
class of a user. The number of lines and the length are separate knobs, so that what comes with length alone can be
told from what comes with more to count.

Limits: classes are tokens that need no judgement; what is left of the benchmark is its aggregation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from postformer.task.base import Setting, Task, TaskBatch, TaskError, is_count, protocol
from postformer.task.draw import answered, distinct, expected_mode, hide, integers
from postformer.task.registry import register

QUESTIONS = ("count", "mode", "user")


class Aggregate(Task):
    """Questions about lines among filler. A setting is (length, lines), the rest being filler.

    Args:
        question: "count": how many lines each class has, with `most` for so many or more; the classes are asked one
            after the other in random order. "mode": the most frequent class, the first by number of equals. "user":
            the same among the lines of each user, all users asked one after the other in random order.
        classes: how many classes there are, at least 2; each line has any of them.
        users: how many users there are; they have equally many lines, one more or less.
        most: the largest answer to "count".
        filler: how many different filler words there are.
        train: the training setting or settings (a mixture, one setting a batch).
        evaluate: the evaluation settings; None: those of training, then twice the length, then twice the lines too.

    Raises:
        TaskError: a question that is not known, a length that does not hold the lines and the question, or fewer
            than three lines to count (for "user": a user).
    """

    unit = "lines"

    def __init__(
        self,
        question: str = "count",
        classes: int = 4,
        users: int = 4,
        most: int = 20,
        filler: int = 8,
        train: Setting | Sequence[Setting] = ((32, 12), (64, 12), (64, 24)),
        evaluate: Setting | Sequence[Setting] | None = None,
    ) -> None:
        if question not in QUESTIONS:
            raise TaskError(f"task aggregate: there is no question {question!r}; ask one of {', '.join(QUESTIONS)}")
        self.name, self.question = f"aggregate-{question}", question
        counts = {"classes": (classes, 2), "users": (users, 1), "most": (most, 1), "filler": (filler, 1)}
        for option, (value, least) in counts.items():
            if not is_count(value) or value < least:
                raise TaskError(f"task {self.name}: {option} is {value!r}; give at least {least}")
        self.classes, self.users, self.most, self.filler = classes, users, most, filler
        self._users, self._words = classes, classes + users
        self._numbers = self._words + filler
        self._ask = self._numbers + most + 1
        self.vocab = self._ask + 1
        self.answers = (self._numbers, self._ask) if question == "count" else (0, classes)
        self._asked = {"count": classes, "mode": 0, "user": users}[question]
        self.difficulties = protocol(self, train, evaluate, lambda t, n: ((2 * t, n), (2 * t, 2 * n)), (64, 24))

    def describe(self) -> str:
        what = {
            "count": f"Count the lines of each of {self.classes} classes (up to {self.most})",
            "mode": f"Say which of {self.classes} classes has most lines",
            "user": f"Say which of {self.classes} classes has most lines of a user ({self.users} users)",
        }[self.question]
        return f"{what}, among filler (arXiv 2511.02817)."

    def chance(self, setting: Setting) -> float:
        return 1 / (self.most + 1 if self.question == "count" else self.classes)

    def shortcut(self, setting: Setting) -> float:
        """The likeliest number; or the class of one of the lines that count."""
        self.check(setting)
        lines: int = setting[1]  # type: ignore[index]
        if self.question == "count":
            p = 1 / self.classes
            exact = [math.comb(lines, n) * p**n * (1 - p) ** (lines - n) for n in range(min(self.most, lines + 1))]
            return max(*exact, 1 - sum(exact))
        groups = self._groups
        return sum(expected_mode(lines // groups + (g < lines % groups), self.classes) for g in range(groups)) / groups

    @property
    def _groups(self) -> int:
        return self.users if self.question == "user" else 1

    def check(self, setting: Setting) -> None:
        if not (isinstance(setting, tuple) and len(setting) == 2 and all(map(is_count, setting))):
            raise TaskError(
                f"task {self.name}: a setting is (length, lines), two integers of at least 1, for instance (64, 24); "
                f"got {setting!r}"
            )
        length, lines = setting
        least = 3 * self._groups
        if lines < least:
            raise TaskError(f"task {self.name}: {lines} lines are too few to need counting; use {least} or more")
        if length < 2 * lines + 1 + self._asked:
            raise TaskError(
                f"task {self.name}: a length of {length} does not hold {lines} lines and the question; use "
                f"{2 * lines + 1 + self._asked} or more"
            )

    def generate(self, setting: Setting, batch_size: int, generator: torch.Generator) -> TaskBatch:
        length, lines = setting  # type: ignore[misc]
        classes = integers(0, self.classes, (batch_size, lines), generator)
        turn = torch.arange(lines, device=classes.device) % self.users
        users = distinct(self.users, batch_size, self.users, generator)[:, turn]
        room = length - 2 * lines - 1 - self._asked
        filler = self._words + integers(0, self.filler, (batch_size, room), generator)
        places = torch.rand(classes.shape, generator=generator, device=classes.device, dtype=torch.float64)
        text = hide(torch.stack([self._users + users, classes], 2), places * (room + 1), filler)

        ask = torch.full_like(classes[:, :1], self._ask)
        asked = distinct(self._asked, batch_size, self._asked, generator) if self._asked else ask[:, :0]
        answer, questions = self._answer(users, classes, asked)
        tokens = torch.cat([text, ask, questions], 1)
        return TaskBatch(tokens, answered(tokens, answer))

    def _answer(self, users: Tensor, classes: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        """-> the answers and the tokens that ask for them."""
        lines = F.one_hot(classes, self.classes)
        if self.question == "count":
            return self._numbers + lines.sum(1).clamp(max=self.most).gather(1, asked), asked
        if self.question == "mode":
            return lines.sum(1).argmax(1, keepdim=True), asked
        counts = F.one_hot(users, self.users).mT.double() @ lines.double()  # a GPU multiplies no integers
        return counts.argmax(2).gather(1, asked), self._users + asked


for _question in QUESTIONS:
    register(f"aggregate-{_question}")(partial(Aggregate, question=_question))
