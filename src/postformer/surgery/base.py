"""What every surgery obeys, and the open registry of their kinds.

A surgery is a frozen piece of data with a `kind`, and three functions: `recipe` says which design comes out, from the
design alone, so that a training of several stages is checked before its first step; `operate` makes the model;
`preserves` says what is the same in both. A package adds its own by the entry-point group "postformer.surgeries", whose
objects are Surgery classes, or at once by `@register`.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from pydantic import ValidationError

from postformer.design import DesignError, Recipe
from postformer.design.base import Design, nearest
from postformer.model import LanguageModel

GROUP = "postformer.surgeries"
_classes: dict[str, type[Surgery]] = {}
S = TypeVar("S", bound="type[Surgery]")


class Surgery(Design):
    """Base of every surgery. Subclasses name themselves by `kind: Literal["..."] = "..."`."""

    def recipe(self, recipe: Recipe) -> Recipe:
        """The design that comes out of one that goes in. Raises DesignError where it cannot be."""
        raise NotImplementedError(f"{type(self).__name__} does not define recipe")

    def operate(self, model: LanguageModel) -> LanguageModel:
        """A new model; the one given is left as it was. Raises DesignError where it cannot be."""
        raise NotImplementedError(f"{type(self).__name__} does not define operate")

    def preserves(self) -> str:
        """What is the same before and after, in words."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it preserves")

    def in_words(self) -> str:
        """For logs: the kind and what was said of it."""
        said = ", ".join(f"{name} {value}" for name, value in self.said().items() if name != "kind")
        return f"{self.said()['kind']} ({said})" if said else self.said()["kind"]


def register(surgery: S) -> S:
    """Class decorator: this surgery is found by its kind. TypeError if the kind is some other class's."""
    kind = surgery.model_fields["kind"].default if "kind" in surgery.model_fields else None
    if not isinstance(kind, str):
        raise TypeError(f'{surgery.__name__} names no kind; give it a field  kind: Literal["..."] = "..."')
    known = _classes.get(kind)
    if known is not None and (known.__module__, known.__qualname__) != (surgery.__module__, surgery.__qualname__):
        raise TypeError(f"surgery '{kind}' is already {known.__module__}:{known.__qualname__}; give "
                        f"{surgery.__qualname__} a kind of its own")
    _classes[kind] = surgery
    return surgery


@cache
def _offered() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def names() -> list[str]:
    """Every kind of surgery there is."""
    return sorted(_classes.keys() | _offered().keys())


def load(said: Any, path: str = "surgery") -> Surgery:
    """A surgery from what a file says: a mapping with a `kind`, or a kind alone.

    path: where it stands, for errors. Raises DesignError with what is allowed and the nearest spelling.
    """
    if isinstance(said, Surgery):
        return said
    said = {"kind": said} if isinstance(said, str) else said
    if not isinstance(said, dict) or not isinstance(said.get("kind"), str):
        raise DesignError(f"a surgery is a mapping with a 'kind', e.g. {{kind: grow, factor: 2}} (got {said!r})",
                          path=path)
    kind = said["kind"]
    if kind not in _classes and kind in _offered():
        register(_offered()[kind].load())
    if kind not in _classes:
        raise DesignError(f"no surgery is called '{kind}'.{nearest(kind, names())}", path=f"{path}.kind")
    try:
        return _classes[kind].model_validate(said)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    where = f"{path}.{field}" if field else path
    if first["type"] == "extra_forbidden":
        fields = _classes[kind].model_fields
        raise DesignError(f"unknown field '{field}' (value {first['input']!r}).{nearest(field, fields)}", path=where)
    got = "" if first["type"] == "value_error" else f" (got {first['input']!r})"
    raise DesignError(f"{first['msg'].removeprefix('Value error, ')}{got}", path=where)
