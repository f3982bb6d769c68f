"""Group word problem: report the running product of a sequence of group elements.

    y_t = x_1 * x_2 * ... * x_t        at every position t

Tokens and targets are element indices. Commutative groups (Z2 is parity, Z60) need counting; non-solvable ones (A5,
S5) are NC1-complete, which diagonal state-space models and attention of fixed depth cannot do at any length
("The Illusion of State", arXiv 2404.08819). Householder products with negative eigenvalues solve S3 and A5 in one layer
(DeltaProduct, arXiv 2502.10297).

Limits: groups of at most 1,000 elements, since the whole product table is held.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from functools import cache, partial

import torch
from torch import Tensor

from postformer.task.base import Difficulties, Setting, Task, TaskBatch, TaskError, is_count, mixture
from postformer.task.registry import register

MAX_ELEMENTS = 1000
FACTOR = re.compile(r"([SAZD])([1-9]\d{0,3})")


class Group:
    """A finite group as a product table.

    `table[a, b]` is a * b and element 0 the identity. Permutations are listed in lexicographic order and multiply by
    composition, (p * q)(i) = p(q(i)); Z_n is addition modulo n; AxB is the direct product, index a * |B| + b.

    Args:
        name: S<n> (symmetric), A<n> (alternating), Z<n> (cyclic), D<n> (dihedral, 2n elements), or a product of them
            joined by "x", such as A4xZ5.

    Raises:
        TaskError: a name that is not of this form, or a group of more than 1,000 elements.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.table = _table(name)

    def __len__(self) -> int:
        return self.table.shape[0]

    def prefix_products(self, elements: Tensor) -> Tensor:
        """[..., T] element indices -> [..., T] indices of x_1 * ... * x_t, in ceil(log2 T) vectorised steps."""
        table, product = self.table.to(elements.device), elements
        shift = 1
        while shift < elements.shape[-1]:  # Hillis-Steele: after each round, product[t] spans 2 * shift elements
            ahead = table[product[..., :-shift], product[..., shift:]]
            product = torch.cat([product[..., :shift], ahead], -1)
            shift *= 2
        return product


@cache
def _table(name: str) -> Tensor:
    tables = []
    for part in name.split("x"):
        match = FACTOR.fullmatch(part)
        if match is None:
            raise TaskError(
                f"group {name!r} is not known; write S<n>, A<n>, Z<n>, D<n> or a product of them, "
                "for instance S3, S4, S5, A5, Z60, Z2, A4xZ5"
            )
        tables.append(_factor(match[1], int(match[2]), name))
    table = tables[0]
    for other in tables[1:]:
        m = other.shape[0]
        if table.shape[0] * m > MAX_ELEMENTS:
            raise _too_large(name)
        product = table[:, None, :, None] * m + other[None, :, None, :]
        table = product.reshape(table.shape[0] * m, -1)
    return table


def _factor(family: str, n: int, name: str) -> Tensor:
    if family == "Z":
        if n > MAX_ELEMENTS:
            raise _too_large(name)
        return (torch.arange(n)[:, None] + torch.arange(n)) % n
    if family == "D":
        if 2 * n > MAX_ELEMENTS:
            raise _too_large(name)
        # Elements of D_n as i -> turn + flip * i mod n. Not as permutations of n points, which for n < 3 coincide.
        turn, flip = torch.arange(n).repeat(2), torch.tensor([1, -1]).repeat_interleave(n)
        turns = (turn[:, None] + flip[:, None] * turn) % n
        return turns + n * (flip[:, None] * flip < 0).long()
    if n > 6:
        raise _too_large(name)
    permutations = list(itertools.permutations(range(n)))
    if family == "A":
        permutations = [p for p in permutations if sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0]
    index = {p: i for i, p in enumerate(permutations)}
    return torch.tensor([[index[tuple(p[i] for i in q)] for q in permutations] for p in permutations])


def _too_large(name: str) -> TaskError:
    return TaskError(f"group {name!r} has more than {MAX_ELEMENTS} elements; choose a smaller one, for instance S5")


@register
class GroupWord(Task):
    """Prefix products of uniformly drawn group elements, scored at every position.

    Args:
        group: see `Group`; Z2 is parity.
        train: the training length or lengths (a mixture, one length a batch).
        evaluate: the evaluation lengths; those longer than every training length count as outside. None: one, two
            and four times the longest training length.

    A setting is a length. Published comparisons train at 16 to 128 and test at several times that.
    """

    name = "group"

    def __init__(
        self, group: str = "S3", train: int | Sequence[int] = 16, evaluate: int | Sequence[int] | None = None
    ) -> None:
        self.group = Group(group)
        self.name = "parity" if group == "Z2" else f"group-{group.lower()}"
        self.vocab = len(self.group)
        self.metric = "last_accuracy" if group == "Z2" else "token_accuracy"
        lengths = mixture(train, 1)
        if not lengths:
            raise TaskError(f"task {self.name}: no training length; give one, for instance train=16")
        for setting in lengths:
            self.check(setting)
        longest: int = max(lengths)  # type: ignore[assignment]
        tested = (longest, 2 * longest, 4 * longest) if evaluate is None else mixture(evaluate, 1)
        for setting in tested:
            self.check(setting)
        self.difficulties = Difficulties(
            train=lengths,
            inside=tuple(t for t in tested if t <= longest),  # type: ignore[operator]
            outside=tuple(t for t in tested if t > longest),  # type: ignore[operator]
        )

    def describe(self) -> str:
        return (
            f"Report the running product of elements of the group {self.group.name} ({self.vocab} elements) at every "
            "position (arXiv 2404.08819, 2502.10297)."
        )

    def chance(self, setting: Setting) -> float:
        return 1 / self.vocab

    def shortcut(self, setting: Setting) -> float:
        """Repeating the token is right at the first position and by chance elsewhere."""
        self.check(setting)
        if self.metric == "last_accuracy" and setting != 1:
            return self.chance(setting)
        return (1 + (setting - 1) / self.vocab) / setting  # type: ignore[operator]

    def check(self, setting: Setting) -> None:
        if not is_count(setting):
            raise TaskError(f"task {self.name}: a setting is a length of at least 1, for instance 16; got {setting!r}")

    def generate(self, setting: Setting, batch_size: int, generator: torch.Generator) -> TaskBatch:
        tokens = torch.randint(self.vocab, (batch_size, setting), generator=generator, device=generator.device)  # type: ignore[arg-type]
        return TaskBatch(tokens, self.group.prefix_products(tokens))


register("parity")(partial(GroupWord, group="Z2"))
for _group in ("S3", "S4", "S5", "A5", "Z60", "A4xZ5"):
    register(f"group-{_group.lower()}")(partial(GroupWord, group=_group))
