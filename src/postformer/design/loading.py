"""YAML -> Recipe: migrations, the short form, the stack's repeats and tiles, overrides by path, scaling, errors.

A recipe is resolved once and never mutated. Every error names the file, the line, the path, the value, what is allowed
and the nearest valid spelling.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from postformer.design import registry
from postformer.design.base import Design, DesignError, nearest
from postformer.design.grammar import VERSION, Model, Recipe

MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""from version n -> a function that returns the same recipe in version n + 1"""


class _Strict(yaml.SafeLoader):
    """YAML in which a field given twice is an error (plain YAML silently takes the last)."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen and key.value != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' is given twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def names() -> list[str]:
    """The recipes that ship with postformer."""
    return sorted(p.name[:-5] for p in files("postformer").joinpath("recipes").iterdir() if p.name.endswith(".yaml"))


def load(recipe: str | Path | dict[str, Any] | Recipe, overrides: Sequence[str] = (), width: int | None = None,
         layers: int | None = None) -> Recipe:
    """A recipe by shipped name (and size: "palimpsest-125m"), path, mapping or Recipe, then scaled, then overridden.

    overrides: "path.to.field=value" (value in YAML); lists by index. width, layers: scale the design to that many
    channels and layers, keeping head sizes and the pattern. Raises DesignError.
    """
    file, text, size = "", "", ""
    if isinstance(recipe, Recipe):
        raw: Any = recipe.said()
    elif isinstance(recipe, dict):
        raw = copy.deepcopy(recipe)
    else:
        file, text, size = _read(recipe)
        try:
            raw = yaml.load(text, _Strict)
        except yaml.YAMLError as e:
            mark = getattr(e, "problem_mark", None)
            raise DesignError(f"not valid YAML: {getattr(e, 'problem', e)}", file=file,
                              line=mark.line + 1 if mark else None) from None
    if not isinstance(raw, dict) or "model" not in raw:
        raise DesignError("a recipe is a mapping with at least 'name' and 'model'", file=file)
    if size:
        found = raw["sizes"][size]
        raw, width, layers = {**raw, "name": recipe}, width or found["width"], layers or found["layers"]
    try:
        result = _validated(raw, layers)
        if width is not None and width != result.model.width:
            result = scale_width(result, width)
        from postformer.design.plan import check

        if not overrides:
            check(result)
            return result
    except DesignError as e:
        raise DesignError(e.message, path=e.path, file=file, line=_line(text, e.path)) from None
    # From here on a wrong value is the override's, not the file's.
    data = result.said()
    for item in overrides:
        override(data, item)
    result = _validated(data, None)
    check(result)
    return result


def _read(recipe: str | Path) -> tuple[str, str, str]:
    """(file, text, the size that the name ends in, if any)"""
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml") or path.exists():
        try:
            return str(path), path.read_text(encoding="utf-8"), ""
        except OSError as e:
            raise DesignError(f"cannot read the recipe: {e.strerror or e}. `postformer list` shows what ships.",
                              file=str(path)) from None
    name, known = str(recipe), names()
    if name in known:
        return f"{name}.yaml", shipped(name), ""
    base, _, size = name.rpartition("-")
    if base in known and size in _sizes(base):
        return f"{base}.yaml", shipped(base), size
    sized = [f"{base}-{size}" for base in known for size in _sizes(base)]
    raise DesignError(f"no recipe or file '{recipe}'.{nearest(name, [*known, *sized])}")


def shipped(name: str) -> str:
    """The text of a recipe that ships with postformer."""
    return files("postformer").joinpath("recipes", f"{name}.yaml").read_text(encoding="utf-8")


def _sizes(name: str) -> list[str]:
    """The names of a shipped recipe's sizes."""
    return list(yaml.safe_load(shipped(name)).get("sizes", {}))


def _validated(raw: dict[str, Any], layers: int | None) -> Recipe:
    raw = migrate(raw)
    raw["model"] = desugar(raw["model"], layers)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as e:
        raise _design_error(e, raw) from None


def migrate(raw: dict[str, Any]) -> dict[str, Any]:
    """The same recipe in the current version of the grammar."""
    version = raw.get("version", VERSION)
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise DesignError(f"version {version!r} is not known here; this postformer reads 1 to {VERSION}. "
                          "Upgrade postformer, or set the version that the recipe was written for.", path="version")
    while version < VERSION:
        raw, version = MIGRATIONS[version](raw), version + 1
    return {**raw, "version": VERSION}


def desugar(model: Any, layers: int | None = None) -> dict[str, Any]:
    """Short forms into the full grammar; `layers`: how many layers the stack shall have."""
    if not isinstance(model, dict):
        raise DesignError("'model' is a mapping", path="model")
    model = dict(model)
    for field in ("mixers", "layers", "shared"):
        if not isinstance(model.get(field) or {}, dict):
            raise DesignError(f"'{field}' is a mapping of names (got {model[field]!r})", path=f"model.{field}")
    mixers = dict(model.get("mixers") or {})
    for short in ("memory", "feedforward"):
        if short in model:
            mixers[short] = model.pop(short)
    pattern, count = model.pop("pattern", None), model.pop("num_layers", None)
    if pattern is not None and (not isinstance(pattern, (list, tuple)) or not pattern
                                or not all(isinstance(u, str) for u in pattern)):
        raise DesignError(f"the pattern is a list of layers, e.g. [memory, attention] (got {pattern!r})",
                          path="model.pattern")
    if "stack" not in model and mixers:
        unit = pattern or ["/".join(n for n in ("memory", "feedforward") if n in mixers)]
        unit = [u if "/" in u or "feedforward" not in mixers or u in (model.get("layers") or {})
                else f"{u}/feedforward" for u in unit]
        model["stack"] = [{"tile": unit, "layers": count or len(unit)}]
    defined = {k: _sublayers(v, f"model.layers.{k}") for k, v in (model.get("layers") or {}).items()}
    known = set(mixers) | set(model.get("shared") or {})
    stack: list[str] = []
    for name in _expand(model.get("stack", []), "model.stack", layers):
        if name not in defined:
            parts = name.split("/")
            for part in parts:
                if part not in known:
                    raise DesignError(f"'{name}' is no layer, and '{part}' is no mixer."
                                      f"{nearest(part, known | set(defined))}",
                                      path=_where_named(model.get("stack"), name, "model.stack"))
            defined[name] = [{"use": part} for part in parts]
        stack.append(name)
    shared = {k: {**v, "layer": _sublayers(v.get("layer", []), f"model.shared.{k}.layer")} if isinstance(v, dict) else v
              for k, v in (model.get("shared") or {}).items()}
    return {**model, "mixers": mixers, "layers": {k: v for k, v in defined.items() if k in stack},
            "stack": stack, **({"shared": shared} if shared else {})}


def _where_named(stack: Any, name: str, path: str) -> str:
    """The path of the entry of an unexpanded stack that says this name."""
    for i, item in enumerate(stack if isinstance(stack, (list, tuple)) else ()):
        if item == name:
            return f"{path}.{i}"
        if isinstance(item, dict):
            key = "of" if "of" in item else "tile"
            inner = f"{path}.{i}.{key}"
            if (found := _where_named(item.get(key), name, inner)) != inner:
                return found
    return path


def _sublayers(value: Any, path: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise DesignError("a layer is a list of sublayers, e.g. [{use: memory}, {use: feedforward}]", path=path)
    return [{"use": v} if isinstance(v, str) else v for v in value]


def _expand(stack: Any, path: str, layers: int | None) -> list[str]:
    """Repeats and tiles written out. With `layers`, single entries stay and the repeated ones share what remains."""
    if not isinstance(stack, (list, tuple)):
        raise DesignError("the stack is a list of layers, {repeat: n, of: [...]} or {tile: [...], layers: n}",
                          path=path)
    units: list[tuple[list[str], int, bool]] = []
    for i, item in enumerate(stack):
        here = f"{path}.{i}"
        if isinstance(item, str):
            units.append(([item], 1, False))
        elif isinstance(item, dict) and set(item) == {"repeat", "of"}:
            inner = _expand(item["of"], f"{here}.of", None)
            if not isinstance(item["repeat"], int) or item["repeat"] < 1:
                raise DesignError(f"repeat is {item['repeat']!r}; it is a whole number >= 1", path=f"{here}.repeat")
            units.append((inner, item["repeat"] * len(inner), True))
        elif isinstance(item, dict) and set(item) == {"tile", "layers"}:
            if not isinstance(item["layers"], int) or item["layers"] < 1:
                raise DesignError(f"layers is {item['layers']!r}; it is a whole number >= 1", path=f"{here}.layers")
            units.append((_expand(item["tile"], f"{here}.tile", None), item["layers"], True))
        else:
            raise DesignError(f"{item!r} is neither a layer's name nor {{repeat: n, of: [...]}} nor "
                              "{tile: [...], layers: n}", path=here)
        if not units[-1][0]:
            raise DesignError("there is nothing to repeat; name at least one layer", path=here)
    if layers is not None:
        units = _fit(units, layers, path)
    return [unit[j % len(unit)] for unit, n, _ in units for j in range(n)]


def _fit(units: list[tuple[list[str], int, bool]], layers: int, path: str) -> list[tuple[list[str], int, bool]]:
    total = sum(n for _, n, _ in units)
    if layers < 1:
        raise DesignError(f"layers is {layers}; it is a whole number >= 1", path=path)
    elastic = [i for i, (_, _, repeated) in enumerate(units) if repeated]
    fixed = total - sum(units[i][1] for i in elastic)
    if not elastic or layers <= fixed:
        flat = [unit[j % len(unit)] for unit, n, _ in units for j in range(n)]
        return [(_thinned(flat, layers), layers, True)]
    room, stretch = layers - fixed, total - fixed
    shares = [units[i][1] * room / stretch for i in elastic]
    counts = [int(s) for s in shares]
    for i in sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])[: room - sum(counts)]:
        counts[i] += 1
    sized = dict(zip(elastic, counts, strict=True))
    return [(_thinned(unit, sized.get(i, n)), sized.get(i, n), rep)
            for i, (unit, n, rep) in enumerate(units) if sized.get(i, n)]


def _thinned(flat: list[str], n: int) -> list[str]:
    """n of the layers in their order, each kind of layer keeping its share and at least one place; all if n >= len."""
    if n >= len(flat):
        return flat
    where = {name: [i for i, f in enumerate(flat) if f == name] for name in dict.fromkeys(flat)}
    shares = {name: len(at) * n / len(flat) for name, at in where.items()}
    counts = {name: max(1, int(share)) for name, share in shares.items()}
    while sum(counts.values()) > n:
        name = max(counts, key=lambda k: (counts[k] - shares[k], counts[k]))
        counts[name] -= 1
    while sum(counts.values()) < n:
        name = max(counts, key=lambda k: shares[k] - counts[k])
        counts[name] += 1
    kept = sorted(at[(2 * k + 1) * len(at) // (2 * counts[name])] for name, at in where.items()
                  for k in range(counts[name]))
    return [flat[i] for i in kept]


def scale_width(recipe: Recipe, width: int) -> Recipe:
    """The recipe at another width: head sizes stay where they fit, head counts and hidden sizes follow."""
    if width < 8 or width % 8:
        raise DesignError(f"width is {width}; it is a multiple of 8", path="model.width")
    model = recipe.model.scaled(width / recipe.model.width)
    data = recipe.model_copy(update={"model": model.model_copy(update={"width": width})})
    try:
        return Recipe.model_validate(data.said())
    except ValidationError as e:
        raise _design_error(e) from None


def narrow_heads(recipe: Recipe, dim: int) -> Recipe:
    """The recipe with heads of at most `dim` channels and as many more of them: small models then have several.

    Raises DesignError where a memory cannot have such heads.
    """
    model = recipe.model.narrowed(dim, recipe.model.width)
    try:
        return Recipe.model_validate(recipe.model_copy(update={"model": model}).said())
    except ValidationError as e:
        raise _design_error(e) from None


def override(data: Any, item: str) -> None:
    """Set one field in place: "model.mixers.memory.loss=l2"."""
    path, eq, text = item.partition("=")
    if not eq or not path:
        raise DesignError(f"'{item}' is not an override; write path.to.field=value")
    keys = path.split(".")
    at: Any = data
    for depth, name in enumerate(keys):
        key: Any = name
        here = ".".join(keys[: depth + 1])
        if isinstance(at, list):
            if not key.isdigit() or int(key) >= len(at):
                raise DesignError(f"'{key}' is no index of a list of {len(at)}", path=here)
            key = int(key)
        elif not isinstance(at, dict):
            raise DesignError(f"'{keys[depth - 1]}' has no fields of its own", path=here)
        if depth == len(keys) - 1:
            try:
                at[key] = yaml.safe_load(text)
            except yaml.YAMLError:
                raise DesignError(f"{text!r} is not a YAML value", path=here) from None
        elif isinstance(at, dict) and not isinstance(at.get(key), (dict, list)):
            if key in at and not isinstance(at[key], (str, type(None))):
                raise DesignError(f"'{key}' has no fields of its own", path=here)
            if depth and keys[depth - 1] in ("mixers", "layers", "shared"):
                raise DesignError(f"no '{key}' here.{nearest(key, at)}", path=here)
            at[key] = {}
            at = at[key]
        else:
            at = at[key]


def _design_error(e: ValidationError, raw: Any = None) -> DesignError:
    """The first complaint of pydantic, in our words."""
    def rank(err: Any) -> tuple[bool, bool, int]:
        # Of a choice between a name and a mapping, what was given is the one to complain about.
        other = err["type"] == "string_type" and isinstance(err["input"], (dict, list))
        return err["type"] == "missing", other, -len(err["loc"])

    err = min(e.errors(include_url=False), key=rank)
    loc = [str(x) for x in err["loc"] if not (isinstance(x, str) and x.startswith(("function-", "lax-", "literal[")))]
    if len(loc) > 1 and loc[-1] in ("str", "int", "float"):
        loc.pop()  # a branch of a choice, not a field
    path = ".".join(loc)
    value, kind = err.get("input"), err["type"]
    if kind == "extra_forbidden":
        fields = _fields(raw, err["loc"])
        return DesignError(f"unknown field '{loc[-1]}' (value {value!r}).{nearest(loc[-1], fields)}", path=path)
    if kind == "literal_error":
        expected = [w.strip(" '") for w in err.get("ctx", {})["expected"].replace(" or ", ", ").split(",")]
        return DesignError(f"{value!r} is not possible.{nearest(str(value), expected)}", path=path)
    if kind == "missing":
        return DesignError("this field is needed", path=path)
    message = err["msg"].removeprefix("Value error, ")
    shown = "" if kind == "value_error" else f" (got {value!r})"
    return DesignError(f"{message}{shown}", path=path)


def _fields(raw: Any, loc: tuple[Any, ...]) -> list[str]:
    """The fields allowed where an unknown one stood: walks the grammar and the data side by side."""
    at: Any = Recipe
    for part in loc[:-1]:
        if (isinstance(raw, dict) and part in raw) or (isinstance(raw, (list, tuple)) and isinstance(part, int)):
            raw = raw[part]
        elif str(part).startswith(("function-", "str", "lax-")):
            continue
        fields = getattr(at, "model_fields", {})
        inner = _model_in(fields[part].annotation, raw) if part in fields else at
        if inner is Design and isinstance(raw, dict) and "kind" in raw:
            inner = registry.resolve(raw["kind"]).Design
        at = inner or at
    return sorted(getattr(at, "model_fields", {}))


def _model_in(annotation: Any, data: Any) -> Any:
    """The class of design that an annotation allows; of several the one of the kind that the data names."""
    if isinstance(annotation, type) and issubclass(annotation, Design):
        return annotation
    found = [m for arg in getattr(annotation, "__args__", ()) if (m := _model_in(arg, data))]
    kind = data.get("kind") if isinstance(data, dict) else None
    named = [m for m in found if "kind" in m.model_fields and m.model_fields["kind"].default == kind]
    return (named or found or [None])[0]


def _line(text: str, path: str) -> int | None:
    """Line of the deepest node of `path` that the file has."""
    if not text:
        return None
    node = yaml.compose(text)
    line = None
    for key in path.split("."):
        if isinstance(node, yaml.MappingNode):
            pairs = [(k, v) for k, v in node.value if k.value == key]
            if not pairs and key == "mixers":
                continue  # the short form has no such level
            if not pairs:
                break
            line, node = pairs[0][0].start_mark.line + 1, pairs[0][1]
        elif isinstance(node, yaml.SequenceNode) and key.isdigit() and int(key) < len(node.value):
            node = node.value[int(key)]
            line = node.start_mark.line + 1
        else:
            break
    return line


__all__ = ["Model", "desugar", "load", "migrate", "names", "narrow_heads", "override", "scale_width"]
