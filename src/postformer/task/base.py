"""Task: a seeded generator, a scorer and a difficulty knob.

A task makes batches of tokens with targets aligned to them: the logits at position t predict `targets[:, t]`, nothing
is shifted, and a target of -100 (`IGNORE`) is not scored. Its difficulty is a *setting*, a plain integer (a length) or
a tuple of integers (length, number of pairs), so that it can be written into a ledger and typed on a command line.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from postformer.contract.context import Context

IGNORE = -100
"""Target of a position that is not scored; what `torch.nn.functional.cross_entropy` ignores by default."""

METRICS = ("token_accuracy", "exact_match", "last_accuracy")
"""What `Task.score` returns, all in [0, 1]."""

Setting = int | tuple[int, ...]
"""One difficulty: a length, or a tuple that begins with the length."""


class TaskError(ValueError):
    """A task, a setting or an option that does not exist or makes no sense; the message says what would."""


@dataclass(frozen=True)
class TaskBatch:
    """`tokens` [B, T] int64 and `targets` [B, T] int64 with -100 where nothing is scored, on one device. `boundary`
    [B, T] int8: what ends before each token (`Context.boundary`); None: each row is one document."""

    tokens: Tensor
    targets: Tensor
    boundary: Tensor | None = None

    @property
    def scored(self) -> Tensor:
        """[B, T] bool: which positions are scored."""
        return self.targets != IGNORE

    def to(self, device: torch.device | str) -> TaskBatch:
        """The same batch on another device."""
        boundary = None if self.boundary is None else self.boundary.to(device)
        return TaskBatch(self.tokens.to(device), self.targets.to(device), boundary)

    @property
    def ctx(self) -> Context | None:
        """The context in which a model sees the tokens; None: plain."""
        return None if self.boundary is None else Context(boundary=self.boundary)


@dataclass(frozen=True)
class Difficulties:
    """The settings of a task's standard protocol.

    `train` is a mixture (each batch takes one of them, uniformly); `inside` are the evaluation settings that training
    covers, `outside` those beyond it. A score outside is about generalisation and is never averaged with one inside.
    """

    train: tuple[Setting, ...]
    inside: tuple[Setting, ...]
    outside: tuple[Setting, ...] = ()

    @property
    def evaluate(self) -> tuple[Setting, ...]:
        """All evaluation settings, those inside the training distribution first."""
        return self.inside + self.outside


class Task(ABC):
    """What every task offers. Subclasses set `name`, `vocab` and `difficulties`, and write the abstract methods."""

    name: str
    """What `load` calls it."""
    vocab: int
    """Number of token ids; tokens and targets are both in 0..vocab-1."""
    difficulties: Difficulties
    metric: str = "token_accuracy"
    """The figure of `measure` that reports show and learning rates are chosen by."""
    better: Literal["higher", "lower"] = "higher"
    """Which way `metric` is good."""
    answers: tuple[int, int] | None = None
    """The token ids that can be an answer, from the first to below the second; None: all."""
    unit: str = "length"
    """What the setting's last number counts, for the axis of a figure."""

    @abstractmethod
    def describe(self) -> str:
        """One sentence: what must be computed, and the paper's id."""

    @abstractmethod
    def chance(self, setting: Setting) -> float:
        """Expected `metric` of `guess`."""

    def shortcut(self, setting: Setting) -> float:
        """`metric` of the best known answer that avoids what the task is about; at least `chance`.

        A model at this score has learned the task's surface. Print it beside chance.
        """
        return self.chance(setting)

    def guess(self, batch: TaskBatch, generator: torch.Generator) -> Tensor:
        """[B, T] token ids drawn uniformly from `answers`: who answers so, scores `chance`."""
        low, high = self.answers or (0, self.vocab)
        return torch.randint(low, high, batch.tokens.shape, generator=generator, device=generator.device)

    def on(self, split: str) -> Task:
        """The task whose problems come from that split ("train", "validation" or "test").

        Generated tasks are told apart by the generator's seed and return themselves; only what draws from a fixed
        stock of data needs this.
        """
        return self

    def around(self, model: nn.Module) -> nn.Module:
        """The model as this task trains it; itself, but where the task needs a reading of its own."""
        return model

    @abstractmethod
    def generate(self, setting: Setting, batch_size: int, generator: torch.Generator) -> TaskBatch:
        """A batch of a setting that `check` has accepted, on the generator's device, from its random numbers only."""

    @abstractmethod
    def check(self, setting: Setting) -> None:
        """Raises TaskError, with a remedy, for a setting that this task cannot make."""

    def batch(self, setting: Setting, batch_size: int, generator: torch.Generator) -> TaskBatch:
        """A fresh batch of one setting.

        The same generator state gives the same batch; use `seeded` for one that depends on a seed and a step only.
        Raises TaskError for a setting that the task cannot make or a batch size below one.
        """
        if batch_size < 1:
            raise TaskError(f"task {self.name}: batch_size is {batch_size}; give at least 1")
        setting = tuple(setting) if isinstance(setting, list) else setting  # JSON and YAML have no tuples
        self.check(setting)
        return self.generate(setting, batch_size, generator)

    def train_batch(self, batch_size: int, generator: torch.Generator) -> TaskBatch:
        """A training batch: one setting of the training mixture, drawn uniformly, then a batch of it."""
        train = self.difficulties.train
        choice = torch.randint(len(train), (), generator=generator, device=generator.device)
        return self.batch(train[int(choice)], batch_size, generator)

    def score(self, prediction: Tensor, batch: TaskBatch) -> dict[str, float]:
        """How right the predicted token ids are.

        Args:
            prediction: [B, T] integers, usually `logits.argmax(-1)`; what stands at unscored positions is ignored.
            batch: the batch they answer.

        Returns:
            `token_accuracy`: the fraction of all scored positions that are right;
            `exact_match`: the fraction of rows that are right at every scored position;
            `last_accuracy`: the fraction of rows right at their last scored position, which prefixes that could be
            memorised do not flatter.

        Raises:
            TaskError: the shapes differ, or a row has nothing to score.
        """
        if prediction.shape != batch.targets.shape:
            raise TaskError(
                f"task {self.name}: the prediction's shape {tuple(prediction.shape)} is not the targets' "
                f"{tuple(batch.targets.shape)}; pass token ids [B, T], for instance logits.argmax(-1)"
            )
        targets, scored = batch.targets.to(prediction.device), batch.scored.to(prediction.device)
        if not bool(scored.any(1).all()):
            raise TaskError(f"task {self.name}: a row of the batch has no scored position; every target in it is -100")
        right = prediction == targets
        position = torch.arange(targets.shape[1], device=targets.device)
        last = torch.where(scored, position, -1).amax(1, keepdim=True)
        return {
            "token_accuracy": (right & scored).sum().item() / scored.sum().item(),
            "exact_match": (right | ~scored).all(1).double().mean().item(),
            "last_accuracy": right.gather(1, last).double().mean().item(),
        }


    def measure(self, logits: Tensor, batch: TaskBatch) -> dict[str, float]:
        """What is known of a model's answers: logits [N, vocab] at the scored positions, row by row.

        Returns:
            What `score` says of the most likely tokens, and `loss`, nats per scored token; `metric` is among them.
        """
        targets = batch.targets[batch.scored]
        prediction = torch.full_like(batch.targets, IGNORE)
        prediction[batch.scored] = logits.argmax(-1)
        return self.score(prediction, batch) | {"loss": float(F.cross_entropy(logits.float(), targets))}


def seeded(*keys: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose numbers depend on the keys only, e.g. `seeded(seed, "train", step)`.

    Resuming at a step therefore needs no saved generator state, and streams of different names do not overlap in
    practice. Random numbers differ between a CPU and a GPU device.
    """
    digest = hashlib.sha256(repr(keys).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def setting_name(setting: Setting) -> str:
    """How a setting is written in tables: 16 -> "16", (64, 8) -> "64x8"."""
    return str(setting) if isinstance(setting, int) else "x".join(map(str, setting))


def setting_length(setting: Setting) -> int:
    """Tokens of one sequence of a setting: 16 -> 16, (64, 8) -> 64."""
    return setting if isinstance(setting, int) else setting[0]


def mixture(value: Setting | Sequence[Setting], rank: int) -> tuple[Setting, ...]:
    """A setting or a sequence of settings as a tuple of settings; `rank` is how many integers one setting has."""
    if isinstance(value, int):
        return (value,)
    if rank > 1 and len(value) == rank and all(isinstance(v, int) for v in value):
        return (tuple(value),)  # type: ignore[arg-type]
    return tuple(v if isinstance(v, int) else tuple(v) for v in value)


def protocol(
    task: Task,
    train: Setting | Sequence[Setting],
    evaluate: Setting | Sequence[Setting] | None,
    beyond: Callable[..., Sequence[Setting]],
    example: Setting,
) -> Difficulties:
    """The difficulties that a constructor's `train` and `evaluate` ask for, all checked.

    Evaluation settings with any number larger than every training setting's are outside. Where `evaluate` is None,
    they are the training settings and `beyond(*largest)`, given the largest of each of their numbers. `example` is a
    setting that makes sense, for messages. Raises TaskError.
    """
    rank = 1 if isinstance(example, int) else len(example)
    trained = mixture(train, rank)
    if not trained:
        raise TaskError(f"task {task.name}: no training setting; give one, for instance train={example}")
    for setting in trained:
        task.check(setting)
    most = [max(numbers) for numbers in zip(*map(_numbers, trained), strict=True)]
    tested = trained + tuple(beyond(*most)) if evaluate is None else mixture(evaluate, rank)
    for setting in tested:
        task.check(setting)
    inside = [s for s in tested if all(n <= m for n, m in zip(_numbers(s), most, strict=True))]
    outside = [s for s in tested if s not in inside]
    return Difficulties(train=trained, inside=tuple(inside), outside=tuple(outside))


def _numbers(setting: Setting) -> tuple[int, ...]:
    return (setting,) if isinstance(setting, int) else setting


def is_count(value: object) -> bool:
    """Whether a value is an integer of at least one; True and False are no lengths."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
