"""From what a user types to a Plan: designs with their changes, tasks of a tier or of their own, changed entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from postformer.design import Recipe, load
from postformer.design.base import nearest
from postformer.design.loading import override
from postformer.study.entry import Entry, tier
from postformer.study.gauntlet import Plan
from postformer.study.match import QUANTITIES
from postformer.task import TaskError
from postformer.task import names as task_names

TOKENS = 1_000_000
"""Of a task that no tier names."""


def ask(recipes: Sequence[str], tier_name: str = "sprint", tasks: str | None = None, *, match: str | None = None,
        seeds: int = 3, changes: Sequence[str] = (), command: str = "postformer gauntlet") -> Plan:
    """The plan of a gauntlet.

    recipes: names or files, each "[LABEL=]RECIPE[@PATH=VALUE[;PATH=VALUE...]]", for instance
        "one-step=deltaproduct@model.mixers.memory.update.steps=1".
    tasks: keys of the tier or names of tasks, separated by commas; None: all of the tier.
    match: params, flops or state; changes: "FIELD=VALUE" for every entry, "TASK.FIELD=VALUE" for one.

    Raises DesignError, TaskError, ValueError, each with a remedy.
    """
    if match is not None and match not in QUANTITIES:
        raise ValueError(f"match is {match!r}.{nearest(match, QUANTITIES)}")
    designs: dict[str, Recipe] = {}
    for text in recipes:
        label, recipe = design(text)
        if label in designs:
            raise ValueError(f"two designs are called {label}; give one a name of its own: NAME={text}")
        designs[label] = recipe
    return Plan(designs, entries(tier_name, tasks, changes), seeds, match, tier_name, command)  # type: ignore[arg-type]


def design(text: str) -> tuple[str, Recipe]:
    """(label, recipe) of "[LABEL=]RECIPE[@PATH=VALUE[;PATH=VALUE...]]". Raises DesignError."""
    head, _, rest = text.partition("@")
    label, _, name = head.rpartition("=")
    recipe = load(name, [part for part in rest.split(";") if part])
    return label or (f"{recipe.name}@{rest}" if rest else recipe.name), recipe


def entries(tier_name: str, tasks: str | None = None, changes: Sequence[str] = ()) -> dict[str, Entry]:
    """The entries that are asked for, changed. Raises TaskError, ValueError."""
    known = dict(tier(tier_name))
    everything = known | {k: v for k, v in tier("standard").items() if k not in known}
    if tasks is None:
        chosen = known
    else:
        chosen = {}
        for key in filter(None, (part.strip() for part in tasks.split(","))):
            if key not in everything and key not in task_names():
                raise TaskError(f"no task is called {key!r}.{nearest(key, {*everything, *task_names()})}")
            chosen[key] = everything.get(key) or Entry(key=key, task=key, tokens=TOKENS)
    data: dict[str, Any] = {key: entry.model_dump(exclude_unset=True) for key, entry in chosen.items()}
    for change in changes:
        path = change.partition("=")[0].split(".")
        if path[0] not in Entry.model_fields and path[0] not in data:
            raise ValueError(f"'{change}' changes nothing: {path[0]!r} is neither a task of this gauntlet nor a field "
                             f"of an entry.{nearest(path[0], [*data, *Entry.model_fields])}")
        for key in data:
            if path[0] in Entry.model_fields:
                override(data[key], change)
            elif path[0] == key:
                override(data, change)
    found = {}
    for key, value in data.items():
        try:
            found[key] = Entry.model_validate(value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, (key, *first["loc"])))
            raise ValueError(f"{where}: {first['msg']} (got {first['input']!r})") from None
        found[key].make()
    return found


