"""Dyck-k of bounded depth: which of k kinds of bracket must close next.

    ( [ ] { ...        target ] after "( [", where a closing bracket follows; nothing where an opening one does

The brackets open and close at random (each with a chance of one half where both are possible) and are never more than
m deep; the text may end with open ones. It takes m log k bits and a stack ("RNNs can generate bounded hierarchical
languages with optimal memory", arXiv 2010.07515), or attention to the right bracket (arXiv 2105.11115).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from postformer.task.base import IGNORE, Setting, Task, TaskBatch, TaskError, is_count, protocol
from postformer.task.draw import integers
from postformer.task.registry import register


@register
class Dyck(Task):
    """The kind of every closing bracket, from what stands before it. A setting is (length, greatest depth).

    Args:
        kinds: k, at least 2.
        train: the training setting or settings (a mixture, one setting a batch).
        evaluate: the evaluation settings; None: those of training, then twice the length and twice the depth.

    Raises:
        TaskError: fewer than two kinds, or a length of less than twice the depth.
    """

    name = "dyck"
    unit = "depth"

    def __init__(
        self,
        kinds: int = 8,
        train: Setting | Sequence[Setting] = ((32, 2), (32, 4), (64, 8)),
        evaluate: Setting | Sequence[Setting] | None = None,
    ) -> None:
        if not is_count(kinds) or kinds < 2:
            raise TaskError(f"task {self.name}: kinds is {kinds!r}; with fewer than 2 there is nothing to predict")
        self.kinds, self.vocab, self.answers = kinds, 2 * kinds, (kinds, 2 * kinds)
        self.difficulties = protocol(self, train, evaluate, lambda t, m: ((2 * t, m), (2 * t, 2 * m)), (64, 8))

    def describe(self) -> str:
        return f"Say which of {self.kinds} kinds of bracket closes next, at bounded depth (arXiv 2010.07515)."

    def chance(self, setting: Setting) -> float:
        return 1 / self.kinds

    def shortcut(self, setting: Setting) -> float:
        """The kind of the bracket that was opened last, whether or not it has been closed since."""
        self.check(setting)
        length, depth = setting  # type: ignore[misc]
        up = [1.0] + [0.5] * (depth - 1) + [0.0]
        height = [1.0] + [0.0] * depth  # the chance of each
        closes = at_once = 0.0
        for _ in range(length):
            opened = [0.0, *(p * u for p, u in zip(height[:-1], up[:-1], strict=True))]
            closed = [*(p * (1 - u) for p, u in zip(height[1:], up[1:], strict=True)), 0.0]
            height = [a + b for a, b in zip(opened, closed, strict=True)]
            at_once += sum(p * (1 - u) for p, u in zip(opened, up, strict=True))
            closes += sum(p * (1 - u) for p, u in zip(height, up, strict=True))
        sure = at_once / closes
        return sure + (1 - sure) / self.kinds

    def check(self, setting: Setting) -> None:
        if not (isinstance(setting, tuple) and len(setting) == 2 and all(map(is_count, setting))):
            raise TaskError(
                f"task {self.name}: a setting is (length, depth), two integers of at least 1, for instance (64, 8); "
                f"got {setting!r}"
            )
        if setting[0] < 2 * setting[1]:
            raise TaskError(
                f"task {self.name}: a length of {setting[0]} hardly reaches a depth of {setting[1]}; use "
                f"{2 * setting[1]} or more"
            )

    def generate(self, setting: Setting, batch_size: int, generator: torch.Generator) -> TaskBatch:
        length, depth = setting  # type: ignore[misc]
        # A walk between two walls is a free walk folded between them.
        steps = 2 * integers(0, 2, (batch_size, length + 1), generator) - 1
        height = depth - (depth - steps.cumsum(1).remainder(2 * depth)).abs()
        opens = height > torch.nn.functional.pad(height[:, :-1], (1, 0))
        kind = integers(0, self.kinds, opens.shape, generator)
        position = torch.arange(length + 1, device=height.device)
        for level in range(1, depth + 1):
            opened = torch.where(opens & (height == level), position, 0).cummax(1).values
            kind = torch.where(~opens & (height == level - 1), kind.gather(1, opened), kind)
        text = torch.where(opens, kind, kind + self.kinds)
        return TaskBatch(text[:, :-1], torch.where(opens, IGNORE, text)[:, 1:])
