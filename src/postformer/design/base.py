"""The base of every piece of a design: frozen pydantic models that refuse unknown fields."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema


class Scales:
    """Marks a field that is proportional to the model's width: `Annotated[int, Scales()]`.

    multiple: what the scaled value is rounded to.
    """

    def __init__(self, multiple: int = 8) -> None:
        self.multiple = multiple


class Short:
    """Annotation of a field that has a short form: `read` turns it into the long one, `form` is its JSON Schema."""

    def __init__(self, read: Callable[[Any], Any], form: Mapping[str, Any] | None = None) -> None:
        self.read, self.form = read, {"type": "string"} if form is None else dict(form)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.read, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [handler(schema), self.form]}


def word(field: str) -> Short:
    """A word may stand for the whole piece: `Annotated[Norm, word("kind")]` reads "rms" as {"kind": "rms"}."""
    return Short(lambda value: {field: value} if isinstance(value, str) else value)


def one_of(kinds: Mapping[str, type[Design]], what: str, example: str) -> Short:
    """A field that takes a design of one of these kinds, by a mapping with its 'kind' or by the kind's name alone.

    what, example: for messages, e.g. "linear map" and "{kind: lora, rank: 8}".
    """
    *most, last = kinds

    def read(value: Any) -> Any:
        if isinstance(value, tuple(kinds.values())):
            return value
        value = {"kind": value} if isinstance(value, str) else value
        if not isinstance(value, dict) or "kind" not in value:
            raise ValueError(f"a {what} is {', '.join(most)} or {last}, or a mapping with a 'kind', e.g. {example}")
        if value["kind"] not in list(kinds):
            raise ValueError(f"unknown kind '{value['kind']}' of {what}.{nearest(value['kind'], kinds)}")
        return kinds[value["kind"]].model_validate(value)

    return Short(read, {"enum": sorted(kinds)})


class Design(BaseModel):
    """A frozen piece of architecture. Mixers subclass it with a `kind: Literal[...]`."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    def model_post_init(self, context: Any) -> None:
        # What is said and what is left to defaults are told apart when scaling; a kind is always said.
        if "kind" in type(self).model_fields:
            self.__pydantic_fields_set__.add("kind")

    def scaled(self, ratio: float) -> Self:
        """The same design for a model `ratio` times as wide."""
        changes: dict[str, Any] = {}
        for name, info in type(self).model_fields.items():
            value = getattr(self, name)
            mark = next((m for m in info.metadata if isinstance(m, Scales)), None)
            if mark and isinstance(value, int) and name in self.model_fields_set:
                changes[name] = max(mark.multiple, round(value * ratio / mark.multiple) * mark.multiple)
            elif (new := each_design(value, lambda piece: piece.scaled(ratio))) is not value:
                changes[name] = new
        return self.model_copy(update=changes) if changes else self

    def narrowed(self, dim: int, width: int) -> Self:
        """The same design with heads of at most `dim` channels, and as many more of them; width: the model's."""
        found = {name: (value, each_design(value, lambda piece: piece.narrowed(dim, width)))
                 for name in type(self).model_fields if (value := getattr(self, name)) is not None}
        changes = {name: new for name, (value, new) in found.items() if new is not value}
        return self.model_copy(update=changes) if changes else self

    def said(self) -> dict[str, Any]:
        """Only what was given, as plain JSON-able data: what a default scales with stays a default."""
        return self.model_dump(mode="json", exclude_unset=True, serialize_as_any=True)

    def essence(self) -> dict[str, Any]:
        """What differs from the defaults, and the kind. Equal for two designs exactly if their dumps are, and the same
        still when the grammar grows a field."""
        fields = type(self).model_fields
        values = {name: getattr(self, name) for name, info in fields.items()
                  if name == "kind" or getattr(self, name) != info.get_default(call_default_factory=True)}
        return {name: _essence(value) for name, value in values.items()}

    def dump(self) -> dict[str, Any]:
        """Everything, defaults filled in, as plain JSON-able data."""
        return self.model_dump(mode="json", serialize_as_any=True)


def _essence(value: Any) -> Any:
    if isinstance(value, Design):
        return value.essence()
    if isinstance(value, (list, tuple)):
        return [_essence(v) for v in value]
    return {k: _essence(v) for k, v in value.items()} if isinstance(value, dict) else value


def each_design(value: Any, change: Callable[[Design], Design]) -> Any:
    """Change designs inside containers; the very same object when nothing changed."""
    if isinstance(value, Design):
        return change(value)
    if isinstance(value, (list, tuple)):
        new = [each_design(v, change) for v in value]
        return type(value)(new) if any(a is not b for a, b in zip(new, value)) else value
    if isinstance(value, dict):
        new = {k: each_design(v, change) for k, v in value.items()}
        return new if any(new[k] is not value[k] for k in value) else value
    return value


class DesignError(ValueError):
    """A design that cannot be: says file, path, value, what is allowed, the nearest valid spelling."""

    exit_code = 2

    def __init__(self, message: str, *, path: str = "", file: str = "", line: int | None = None) -> None:
        self.message, self.path, self.file, self.line = message, path, file, line
        where = file + (f":{line}" if file and line else "")
        super().__init__(": ".join(part for part in (where, path, message) if part))


def nearest(word: str, allowed: Iterable[str]) -> str:
    """' Did you mean X?' or the allowed words."""
    words = sorted(map(str, allowed))
    close = difflib.get_close_matches(str(word), words, n=1, cutoff=0.5)
    listing = f" Allowed: {', '.join(words)}." if words else ""
    return (f" Did you mean '{close[0]}'?" if close else "") + listing
