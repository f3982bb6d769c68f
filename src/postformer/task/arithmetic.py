"""Arithmetic modulo five: the value of an expression, at the equals sign that ends it.

    2 + 4 * 3 - 1 =                  without brackets: a regular language, products before sums
    ( ( 2 - 4 ) + ( 3 - 1 ) ) =      with brackets: context-free, since a minus turns all signs within its right side

Two of the tasks on which state tracking was measured for xLSTM (arXiv 2405.04517) and for linear recurrences with
negative eigenvalues (arXiv 2411.12537), after "Neural Networks and the Chomsky Hierarchy" (arXiv 2207.02098).

With brackets there are + and - only, as in the published runs, and no unary minus, which they had. There a random
digit is replaced by a bracket until the length is reached, so depth grows with the logarithm of the length.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial

import torch
from torch import Tensor

from postformer.task.base import Setting, Task, TaskBatch, TaskError, is_count, protocol
from postformer.task.draw import answered, integers
from postformer.task.registry import register

MODULUS = 5
PLUS, MINUS, TIMES, EQUALS, OPEN, CLOSE = range(MODULUS, MODULUS + 6)


class ModularArithmetic(Task):
    """The value of an expression modulo 5. A setting is the length, the equals sign included.

    Without brackets n digits make a length of 2 n, with brackets one of 4 n - 2, where n is at least 2. Brackets around
    two digits change nothing: such a length is for training only.

    Args:
        brackets: every operation is bracketed; else products go before sums.
        train: the training length or lengths (a mixture, one length a batch); None: 2 to 10 digits, 3 to 8 bracketed.
        evaluate: the evaluation lengths; None: those of training, then those of twice and four times as many digits.

    Raises:
        TaskError: a length that no expression has.
    """

    metric = "last_accuracy"
    answers = (0, MODULUS)

    def __init__(
        self,
        brackets: bool = False,
        train: Setting | Sequence[Setting] | None = None,
        evaluate: Setting | Sequence[Setting] | None = None,
    ) -> None:
        self.brackets = brackets
        self.name = "modular-arithmetic-brackets" if brackets else "modular-arithmetic"
        self.vocab = CLOSE + 1 if brackets else EQUALS + 1
        if train is None:
            train = [self.of_digits(n) for n in (range(3, 9) if brackets else range(2, 11))]
        self.difficulties = protocol(
            self, train, evaluate, lambda n: [self.of_digits(f * self._digits(n)) for f in (2, 4)], self.of_digits(4)
        )

    def of_digits(self, count: int) -> int:
        """The length of an expression of so many digits."""
        return 4 * count - 2 if self.brackets else 2 * count

    def _digits(self, length: int) -> int:
        return (length + 2) // 4 if self.brackets else length // 2

    def describe(self) -> str:
        form = "sums in brackets" if self.brackets else "products and sums without brackets"
        return f"Give the value modulo {MODULUS} of an expression, {form} (arXiv 2405.04517, 2411.12537)."

    def chance(self, setting: Setting) -> float:
        return 1 / MODULUS

    def shortcut(self, setting: Setting) -> float:
        """Without brackets: always zero, the likeliest value; with: as if the brackets were not there."""
        self.check(setting)
        digits = self._digits(setting)  # type: ignore[arg-type]
        sure = _harmless(digits) if self.brackets else _zero(digits)
        return sure + (1 - sure) / MODULUS

    def check(self, setting: Setting) -> None:
        least = 2 if self.brackets else 1
        sound = is_count(setting) and self.of_digits(self._digits(setting)) == setting  # type: ignore[arg-type]
        if not sound or self._digits(setting) < least:  # type: ignore[arg-type]
            rule = "4 n - 2 for n >= 2 digits" if self.brackets else "2 n for n >= 1 digits"
            raise TaskError(
                f"task {self.name}: a setting is a length {rule}, for instance {self.of_digits(4)}; got {setting!r}"
            )

    def generate(self, setting: Setting, batch_size: int, generator: torch.Generator) -> TaskBatch:
        digits = self._digits(setting)  # type: ignore[arg-type]
        expression, value = (_bracketed if self.brackets else _flat)(digits, batch_size, generator)
        equals = torch.full_like(value, EQUALS)
        tokens = torch.cat([expression, equals[:, None]], 1)
        return TaskBatch(tokens, answered(tokens, value[:, None]))


def _flat(count: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random digits and operations: tokens [rows, 2 * count - 1] and values [rows]."""
    digits = integers(0, MODULUS, (rows, count), generator)
    operations = integers(PLUS, TIMES + 1, (rows, count - 1), generator)
    total, product = torch.zeros_like(digits[:, 0]), digits[:, 0]
    for i in range(1, count):
        operation, digit = operations[:, i - 1], digits[:, i]
        times = operation == TIMES
        total = torch.where(times, total, total + product)
        product = torch.where(times, product * digit, torch.where(operation == MINUS, -digit, digit)) % MODULUS
    tokens = digits.new_empty(rows, 2 * count - 1)
    tokens[:, ::2], tokens[:, 1::2] = digits, operations
    return tokens, (total + product) % MODULUS


def _bracketed(count: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random digits, signs and brackets: tokens [rows, 4 * count - 3] and values [rows].

    It starts with the value and replaces digits by brackets of the same value. Since the right digit follows from the
    left one and the value, all digits are independent and uniform at the end, as if they had been drawn first.
    """
    value = integers(0, MODULUS, (rows,), generator)
    tokens = value[:, None]
    for _ in range(count - 1):
        noise = torch.rand(tokens.shape, generator=generator, device=generator.device)
        at = torch.where(tokens < MODULUS, noise, -1.0).argmax(1, keepdim=True)
        left = integers(0, MODULUS, (rows, 1), generator)
        sign = integers(PLUS, MINUS + 1, (rows, 1), generator)
        digit = tokens.gather(1, at)
        right = torch.where(sign == PLUS, digit - left, left - digit) % MODULUS
        bracket = torch.cat([torch.full_like(at, OPEN), left, sign, right, torch.full_like(at, CLOSE)], 1)
        position = torch.arange(tokens.shape[1] + 4, device=tokens.device)
        tokens = tokens.gather(1, position - (position - at).clamp(0, 4))
        tokens = tokens.scatter(1, at + torch.arange(5, device=at.device), bracket)
    return tokens, value


@cache
def _zero(digits: int) -> float:
    """The part of an unbracketed expression's value that is surely zero: P(0) is that and a fifth of the rest.

    A product of k digits is zero with a chance of 1 - (4/5)^k, and uniform otherwise: a mixture of a sure zero, with
    weight 1 - (4/5)^(k-1), and a uniform value. Sums multiply the weights. The first operation that is no product,
    each with a chance of 2/3, ends the first product.
    """
    sure = 1 - (1 - 1 / MODULUS) ** (digits - 1)
    whole = (1 / 3) ** (digits - 1) * sure
    ends = ((k, (1 / 3) ** (k - 1) * 2 / 3, 1 - (1 - 1 / MODULUS) ** (k - 1)) for k in range(1, digits))
    return whole + sum(chance * weight * _zero(digits - k) for k, chance, weight in ends)


@cache
def _harmless(digits: int) -> float:
    """The chance that no minus stands before a bracket: then leaving the brackets out changes nothing.

    Replacing a random digit again and again makes every split of the digits into left and right equally likely.
    """
    if digits == 1:
        return 1.0
    lefts = range(1, digits)
    return sum(_harmless(n) * _harmless(digits - n) * (1 if digits - n == 1 else 0.5) for n in lefts) / len(lefts)


register("modular-arithmetic")(ModularArithmetic)
register("modular-arithmetic-brackets")(partial(ModularArithmetic, brackets=True))
