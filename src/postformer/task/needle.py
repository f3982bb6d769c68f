"""Needles: a few facts hidden in filler, and one of them asked for at the end.

    The grass is green . NEEDLE k3 7 1 The sky is blue . ... ASK k3 7        targets 7 1 from the asked key on

One needle is the passkey test of long contexts (arXiv 2305.16300), several are the multi-key needle of RULER (arXiv
2404.06654), and a needle at a chosen depth shows who is lost in the middle (arXiv 2307.03172). The filler is the
passkey test's, one token a word, repeated from a random word on. All needles have the same form and length.

Limits: needles may stand between any two words, not only between sentences; the text is tokens, no model of language
is needed or tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from postformer.task.base import Setting, Task, TaskBatch, TaskError, is_count, protocol
from postformer.task.draw import answered, distinct, hide, integers
from postformer.task.registry import register

TEXT = "The grass is green . The sky is blue . The sun is yellow . Here we go . There and back again ."
FILLER = TEXT.split()
WORDS = tuple(dict.fromkeys(FILLER))
DEPTHS = 8
"""A depth is given in eighths of the filler: 0 is before it, 8 after it."""


class Needle(Task):
    """Find the needle with the asked key. A setting is a length, or, where `placed`, (length, depth in eighths).

    Args:
        name: what the task is called.
        needles: how many there are; they have different keys, and one of them is asked.
        placed: the asked needle has the depth that the setting says, the others any; else all have any.
        keys: how many different keys there are.
        digits: how many digits a needle's value has.
        train: the training setting or settings (a mixture, one setting a batch); None: lengths of one and two times
            the shortest power of two that leaves half of the row to the filler, where `placed` at every depth.
        evaluate: the evaluation settings; None: those of training, then lengths of twice and four times the longest
            (at depth 4).

    Raises:
        TaskError: more needles than keys, or a length that does not hold them.
    """

    metric = "exact_match"

    def __init__(
        self,
        name: str = "needle",
        needles: int = 4,
        placed: bool = False,
        keys: int = 16,
        digits: int = 2,
        train: Setting | Sequence[Setting] | None = None,
        evaluate: Setting | Sequence[Setting] | None = None,
    ) -> None:
        self.name, self.needles, self.placed, self.keys, self.digits = name, needles, placed, keys, digits
        for option, value in (("needles", needles), ("keys", keys), ("digits", digits)):
            if not is_count(value):
                raise TaskError(f"task {name}: {option} is {value!r}; give at least 1")
        if needles > keys:
            raise TaskError(f"task {name}: {needles} needles need as many different keys; use keys={needles} or more")
        self.unit = "eighths of depth" if placed else "length"
        self.answers = (0, 10)
        self._keys, self._words = 10, 10 + keys
        self._needle, self._ask = self._words + len(WORDS), self._words + len(WORDS) + 1
        self.vocab = self._ask + 1
        self._cycle = torch.tensor([self._words + WORDS.index(word) for word in FILLER])
        if train is None:
            shortest = 1 << (2 * self._facts - 1).bit_length()
            depths = range(DEPTHS + 1)
            train = [(shortest, d) for d in depths] if placed else [shortest, 2 * shortest]
        self.difficulties = protocol(self, train, evaluate, self._beyond, (64, 4) if placed else 64)

    @property
    def _facts(self) -> int:
        """Tokens that are no filler: the needles, and the question with all but the last digit of its answer."""
        return self.needles * (2 + self.digits) + 1 + self.digits

    def _beyond(self, length: int, *depth: int) -> Sequence[Setting]:
        return [(f * length, DEPTHS // 2) for f in (2, 4)] if depth else [2 * length, 4 * length]

    def describe(self) -> str:
        what = "the number" if self.needles == 1 else f"one of {self.needles} numbers, by its key,"
        paper = "2307.03172" if self.placed else "2305.16300" if self.needles == 1 else "2404.06654"
        return f"Recall {what} hidden in filler (arXiv {paper})."

    def chance(self, setting: Setting) -> float:
        """Every digit guessed."""
        return 10.0**-self.digits

    def shortcut(self, setting: Setting) -> float:
        """The value of any needle, whatever its key, where there are several."""
        wrong = 1 - 1 / self.needles
        return self.chance(setting) if self.needles == 1 else 1 - wrong + wrong * self.chance(setting)

    def check(self, setting: Setting) -> None:
        length, depth = setting if isinstance(setting, tuple) and len(setting) == 2 else (setting, None)
        if self.placed:
            sound = is_count(length) and isinstance(depth, int) and not isinstance(depth, bool)
            if not sound or not 0 <= depth <= DEPTHS:  # type: ignore[operator]
                raise TaskError(
                    f"task {self.name}: a setting is (length, depth), the depth from 0 to {DEPTHS} in eighths, for "
                    f"instance (64, 4); got {setting!r}"
                )
        elif depth is not None or not is_count(length):
            raise TaskError(f"task {self.name}: a setting is a length of at least 1, for instance 64; got {setting!r}")
        if length < self._facts:  # type: ignore[operator]
            raise TaskError(
                f"task {self.name}: a length of {length} does not hold {self.needles} needles and the question; use "
                f"{self._facts} or more"
            )

    def generate(self, setting: Setting, batch_size: int, generator: torch.Generator) -> TaskBatch:
        length, depth = setting if isinstance(setting, tuple) else (setting, None)
        device, shape = generator.device, (batch_size, self.needles)
        keys = self._keys + distinct(self.keys, batch_size, self.needles, generator)
        values = integers(0, 10, (*shape, self.digits), generator)
        needles = torch.cat([torch.full((*shape, 1), self._needle, device=device), keys[..., None], values], 2)

        room = length - self._facts
        places = torch.rand(shape, generator=generator, device=device, dtype=torch.float64)
        if depth is not None:
            places[:, 0] = (room * depth // DEPTHS + places[:, 0]) / (room + 1)  # needle 0 is the one asked
        start = integers(0, len(FILLER), (batch_size, 1), generator)
        filler = self._cycle.to(device)[(start + torch.arange(room, device=device)) % len(FILLER)]

        text = hide(needles, places * (room + 1), filler)
        ask = torch.full_like(keys[:, :1], self._ask)
        tokens = torch.cat([text, ask, keys[:, :1], values[:, 0, :-1]], 1)
        return TaskBatch(tokens, answered(tokens, values[:, 0]))


class PhoneBook(Task):
    """Lines of name and number, then a name: its number (arXiv 2402.01032).

        A3 B1 4 0 2   A3 B7 5 5 1   ...   ASK A3 B7 5 5        targets 5 5 1 from the last name on

    A setting is (length, entries), where length = (entries + 1) * (digits + 2). A name is a first and a last name,
    and only both together tell an entry.

    Args:
        names: how many first names, and how many last names, there are.
        digits: how many digits a number has.
        train: the training setting or settings (a mixture, one setting a batch); None: 2, 4 and 8 entries.
        evaluate: the evaluation settings; None: those of training, then twice and four times the most entries, as far
            as the names go.

    Raises:
        TaskError: more entries than names, or a length that is not that of so many entries.
    """

    name = "phone-book"
    metric = "exact_match"
    unit = "entries"

    def __init__(
        self,
        names: int = 8,
        digits: int = 3,
        train: Setting | Sequence[Setting] | None = None,
        evaluate: Setting | Sequence[Setting] | None = None,
    ) -> None:
        for option, value in (("names", names), ("digits", digits)):
            if not is_count(value):
                raise TaskError(f"task {self.name}: {option} is {value!r}; give at least 1")
        self.names, self.digits = names, digits
        self.answers = (0, 10)
        self.vocab = 10 + 2 * names + 1
        if train is None:
            train = [self.entries(n) for n in (2, 4, 8) if n <= names**2]
        self.difficulties = protocol(self, train, evaluate, self._beyond, self.entries(8))

    def entries(self, count: int) -> tuple[int, int]:
        """The setting of so many entries."""
        return ((count + 1) * (self.digits + 2), count)

    def _beyond(self, _: int, entries: int) -> Sequence[Setting]:
        return [self.entries(f * entries) for f in (2, 4) if f * entries <= self.names**2]

    def describe(self) -> str:
        return f"Find the number of {self.digits} digits that stands beside a name of two tokens (arXiv 2402.01032)."

    def chance(self, setting: Setting) -> float:
        """Every digit guessed."""
        return 10.0**-self.digits

    def shortcut(self, setting: Setting) -> float:
        """The number of any entry with the right last name, the token before the number."""
        self.check(setting)
        entries: int = setting[1]  # type: ignore[index]
        # P(right entry) = E[1 / entries of that last name] = E[kinds of last names among them] / entries, since the
        # entries of one last name share one right answer between them.
        absent = 1.0
        for i in range(entries):
            absent *= max(0, self.names**2 - self.names - i) / (self.names**2 - i)
        right = self.names * (1 - absent) / entries
        return right + (1 - right) * self.chance(setting)

    def check(self, setting: Setting) -> None:
        if not (isinstance(setting, tuple) and len(setting) == 2 and all(map(is_count, setting))):
            raise TaskError(
                f"task {self.name}: a setting is (length, entries), two integers of at least 1, for instance "
                f"{self.entries(8)}; got {setting!r}"
            )
        if setting != self.entries(setting[1]):
            raise TaskError(
                f"task {self.name}: {setting[1]} entries of {self.digits} digits and the question have a length of "
                f"{self.entries(setting[1])[0]}; use {self.entries(setting[1])}"
            )
        if setting[1] > self.names**2:
            raise TaskError(
                f"task {self.name}: {setting[1]} entries need as many different names, and {self.names} first with "
                f"{self.names} last names make {self.names**2}; use fewer entries or more names"
            )

    def generate(self, setting: Setting, batch_size: int, generator: torch.Generator) -> TaskBatch:
        entries: int = setting[1]  # type: ignore[index]
        pairs = distinct(self.names**2, batch_size, entries, generator)
        name = torch.stack([10 + pairs // self.names, 10 + self.names + pairs % self.names], 2)
        values = integers(0, 10, (batch_size, entries, self.digits), generator)
        lines = torch.cat([name, values], 2)
        # The lines are in the order of drawing, so the asked one must be drawn too.
        asked = lines[torch.arange(batch_size, device=lines.device), integers(0, entries, (batch_size,), generator)]
        ask = torch.full_like(asked[:, :1], self.vocab - 1)
        tokens = torch.cat([lines.flatten(1), ask, asked[:, :-1]], 1)
        return TaskBatch(tokens, answered(tokens, asked[:, 2:]))


register("needle")(Needle)
register("passkey")(partial(Needle, name="passkey", needles=1, digits=5))
register("lost-in-the-middle")(partial(Needle, name="lost-in-the-middle", placed=True))
register(PhoneBook)
