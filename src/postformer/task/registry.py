"""The open registry of tasks: by decorator in this process, by entry point in an installed package.

An installed package is found through its entry points of the group "postformer.tasks", whose objects are Task
subclasses or functions that return a Task. They are imported when first asked for.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar, overload

from postformer.task.base import Task, TaskError

GROUP = "postformer.tasks"
Factory = Callable[..., Task]
F = TypeVar("F", bound=Factory)

_FACTORIES: dict[str, Factory] = {}


@overload
def register(target: F) -> F: ...
@overload
def register(target: str) -> Callable[[F], F]: ...
def register(target: F | str) -> F | Callable[[F], F]:
    """Make a task loadable by name: `@register` takes the class's `name`, `@register("name")` gives one.

    Registering the same class or function again replaces it (so that a notebook's cell can be run twice).
    Raises TaskError where the name belongs to something else.
    """
    if isinstance(target, str):
        return lambda factory: _add(target, factory)
    name = getattr(target, "name", None)
    if not isinstance(name, str):
        raise TaskError(f"{target!r} has no `name`; set one on the class, or write @register('name')")
    return _add(name, target)


def _add(name: str, factory: F) -> F:
    known = _FACTORIES.get(name)
    if known is not None and _identity(known) != _identity(factory):
        raise TaskError(f"a task named {name!r} is already registered by {_identity(known)}; choose another name")
    _FACTORIES[name] = factory
    return factory


def _identity(factory: Factory) -> str:
    return f"{getattr(factory, '__module__', '?')}.{getattr(factory, '__qualname__', repr(factory))}"


@cache
def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def names() -> list[str]:
    """The names of all tasks, sorted."""
    return sorted(_FACTORIES.keys() | _installed().keys())


def load(name: str, **options: Any) -> Task:
    """The task of that name, built with its constructor's keywords.

    Raises TaskError for an unknown name or option, with the nearest spelling.
    """
    factory = _FACTORIES.get(name)
    if factory is None and name in _installed():
        factory = _installed()[name].load()
    if factory is None:
        raise TaskError(f"no task is named {name!r}{_nearest(name, names())}; there are: {', '.join(names())}")
    parameters = inspect.signature(factory).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for option in options:
            if option not in parameters:
                raise TaskError(
                    f"task {name} has no option {option!r}{_nearest(option, parameters)}; "
                    f"it has: {', '.join(parameters) or 'none'}"
                )
    return factory(**options)


def _nearest(name: str, known: Any) -> str:
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""
