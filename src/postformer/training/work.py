"""What a recipe is trained on, by name: a corpus or task:NAME. The command line and Python share it, defaults too."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from postformer.data import Corpus, load_corpus
from postformer.design import DesignError, Recipe, load
from postformer.design.base import nearest
from postformer.task import load as load_task
from postformer.training.config import TrainConfig
from postformer.training.record import Result
from postformer.training.run import Source, corpus_source, task_source, train_language, train_task

TASK = "task:"
TOKENS = 2_000_000
"""Where neither steps nor tokens are given."""
DEFAULTS = {"checkpoint_every": 200, "evaluate_every": 200}


@dataclass(frozen=True)
class Work:
    """A recipe, fitted to its data, and the data: `corpus`, or the name of a `task`."""

    recipe: Recipe
    corpus: Corpus | None = None
    task: str | None = None

    @property
    def data(self) -> str:
        """The name that `work` takes."""
        return TASK + self.task if self.task is not None else self._corpus().name

    def source(self, config: TrainConfig) -> Source:
        """For `plan`."""
        if self.task is not None:
            return task_source(self.task, None, config)
        return corpus_source(self._corpus(), config)

    def train(self, config: TrainConfig, directory: Path, *, progress: str = "auto", resume: bool = False) -> Result:
        """As `train_language` and `train_task`."""
        if self.task is not None:
            return train_task(self.recipe, self.task, None, config, directory, progress=progress, resume=resume)
        return train_language(self.recipe, self._corpus(), config, directory, progress=progress, resume=resume)

    def _corpus(self) -> Corpus:
        assert self.corpus is not None
        return self.corpus


def work(recipe: Recipe, data: str) -> Work:
    """data: stdlib, enwik8, a file or directory, or task:NAME.

    For a task, a vocabulary that the recipe does not state becomes the task's. Raises CorpusError, TaskError.
    """
    if not data.startswith(TASK):
        return Work(recipe, corpus=load_corpus(data))
    name = data.removeprefix(TASK)
    vocab = load_task(name).vocab
    if "vocab" not in recipe.model.model_fields_set:
        recipe = load(recipe, [f"model.vocab={vocab}"])
    return Work(recipe, task=name)


def run_directory(name: str, data: str) -> Path:
    """runs/NAME-DATA, whatever characters the two have."""
    label = data.removeprefix(TASK) if data.startswith(TASK) else Path(os.path.abspath(Path(data).expanduser())).name
    return Path("runs") / (re.sub(r"[^\w.+=-]+", "-", f"{name}-{label or 'data'}").lstrip(".-") or "run")


def configured(settings: Mapping[str, Any], path: str = "train") -> TrainConfig:
    """TrainConfig of `settings` over the defaults of a training by hand; path: where they stand, for errors.

    Raises DesignError, which names the field, the value and the nearest field there is.
    """
    given = dict(settings)
    if given.get("steps") is None and given.get("tokens") is None:
        given["tokens"] = TOKENS
    try:
        return TrainConfig.model_validate(DEFAULTS | given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    where = [str(part) for part in first["loc"]]
    path = ".".join([path, *where])
    if first["type"] == "extra_forbidden":
        fields = _fields(where[:-1])
        raise DesignError(f"unknown field '{where[-1]}' (value {first['input']!r}).{nearest(where[-1], fields)}",
                          path=path)
    got = "" if first["type"] == "value_error" else f" (got {first['input']!r})"
    raise DesignError(f"{first['msg'].removeprefix('Value error, ')}{got}", path=path)


def _fields(path: list[str]) -> list[str]:
    """The fields of the configuration that a path leads to."""
    at: type[BaseModel] = TrainConfig
    for part in path:
        inner = at.model_fields[part].annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        at = inner
    return list(at.model_fields)
