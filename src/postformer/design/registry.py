"""The open registry of kinds: a name in a recipe -> the mixer class that realises it.

Built-in kinds and a user's own are found the same way, through the entry-point group `postformer.kinds`; `register`
also makes a class known to the running process. Nothing is imported before a recipe names it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar, get_args

from postformer.design.base import Design, DesignError, nearest

GROUP = "postformer.kinds"
_classes: dict[str, type] = {}
T = TypeVar("T", bound=type)


def register(design: type[Design]) -> Callable[[T], T]:
    """Class decorator: this mixer realises the kinds that `design.kind` names."""
    def add(mixer: T) -> T:
        named = get_args(design.model_fields["kind"].annotation) if "kind" in design.model_fields else ()
        if not named:
            raise TypeError(f'{design.__name__} names no kind; give it a field  kind: Literal["..."] = "..."')
        mixer.Design = design  # type: ignore[attr-defined]
        for kind in named:
            _refuse_another(kind, mixer)
            _classes[kind] = mixer
        return mixer
    return add


def _refuse_another(kind: str, mixer: type) -> None:
    """TypeError if the kind is some other class's: a recipe must not change its meaning by an import."""
    owner = {f"{c.__module__}:{c.__qualname__}" for k, c in _classes.items() if k == kind}
    owner |= {e.value for e in _offered() if e.name == kind}
    if owner and f"{mixer.__module__}:{mixer.__qualname__}" not in owner:
        raise TypeError(f"kind '{kind}' is already {min(owner)}; give {mixer.__qualname__} a kind of its own")


@cache
def _offered() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=GROUP))


def kinds() -> list[str]:
    """Every kind that a recipe may name here."""
    return sorted(set(_classes) | {e.name for e in _offered()})


def resolve(kind: str) -> Any:
    """The mixer class of a kind; its `.Design` is the config class. DesignError for an unknown kind."""
    if not isinstance(kind, str):
        raise DesignError(f"{kind!r} is no kind.{nearest('', kinds())}", path="kind")
    if kind not in _classes:
        found = [e for e in _offered() if e.name == kind]
        if not found:
            raise DesignError(f"unknown kind '{kind}'.{nearest(kind, kinds())} A package's own kind is found by its "
                              f"entry point in the group {GROUP}.", path="kind")
        if len({e.value for e in found}) > 1:
            raise DesignError(f"kind '{kind}' is offered twice, by {' and '.join(e.value for e in found)}; "
                              "uninstall one of the packages", path="kind")
        try:
            loaded = found[0].load()
        except (ImportError, AttributeError) as e:
            raise DesignError(f"the entry point of kind '{kind}' ({found[0].value}) cannot be loaded: {e}",
                              path="kind") from e
        if kind not in _classes:
            raise DesignError(f"the package that offers kind '{kind}' loads {loaded!r} but does not register it; "
                              "decorate the class with @register(ItsDesign)", path="kind")
    return _classes[kind]


def inside(design: Design, path: str) -> list[tuple[str, Any]]:
    """(path, design) of the mixers in a composite's fields and in theirs, whatever the fields are called."""
    known, found = set(kinds()), []
    for field in type(design).model_fields:
        value = getattr(design, field)
        parts = [(f"{field}.{i}", v) for i, v in enumerate(value)] if isinstance(value, tuple) else [(field, value)]
        for part, child in parts:
            if not isinstance(child, Design):
                continue
            kind = getattr(child, "kind", None)
            if kind in known and type(child) is resolve(kind).Design:
                found.append((f"{path}.{part}", child))
            found += inside(child, f"{path}.{part}")
    return found
