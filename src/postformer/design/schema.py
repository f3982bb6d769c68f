"""JSON Schema of recipes, as editors use it: the full grammar, its short forms, and every registered kind."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from postformer.design import registry
from postformer.design.grammar import Recipe

TEMPLATE = "#/$defs/{model}"


def recipe_schema(kinds: Collection[str] | None = None) -> dict[str, Any]:
    """Schema (draft 2020-12) of what may stand in a recipe file; kinds: None for all that are registered here."""
    schema = Recipe.model_json_schema(ref_template=TEMPLATE)
    defs = schema["$defs"]
    mixers = []
    for kind in sorted(kinds or registry.kinds()):
        design = registry.resolve(kind).Design
        own = design.model_json_schema(ref_template=TEMPLATE)
        defs.update(own.pop("$defs", {}))
        own.setdefault("required", []).append("kind")
        defs[design.__name__] = own
        mixers.append(design.__name__)
    defs["Mixer"] = {"anyOf": [{"$ref": TEMPLATE.format(model=m)} for m in dict.fromkeys(mixers)]}
    _short_forms(defs)
    schema = _linked(schema)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "postformer recipe"
    return schema


def _linked(node: Any) -> Any:
    """References where a mixer of any registered kind may stand."""
    if isinstance(node, dict):
        if node.get("x-postformer") == "mixer":
            return {"$ref": "#/$defs/Mixer"}
        return {key: _linked(value) for key, value in node.items()}
    return [_linked(value) for value in node] if isinstance(node, list) else node


def _short_forms(defs: dict[str, Any]) -> None:
    """What `loading.desugar` also accepts."""
    model = defs["Model"]
    layer = {"type": "array", "items": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/Sublayer"}]}}
    entry = {"anyOf": [
        {"type": "string"},
        {"type": "object", "additionalProperties": False, "required": ["repeat", "of"],
         "properties": {"repeat": {"type": "integer", "minimum": 1}, "of": {"$ref": "#/$defs/Stack"}}},
        {"type": "object", "additionalProperties": False, "required": ["tile", "layers"],
         "properties": {"tile": {"$ref": "#/$defs/Stack"}, "layers": {"type": "integer", "minimum": 1}}},
    ]}
    defs["Stack"] = {"type": "array", "items": entry}
    model["properties"] |= {
        "stack": {"$ref": "#/$defs/Stack"},
        "layers": {"type": "object", "additionalProperties": layer},
        "memory": {"$ref": "#/$defs/Mixer"},
        "feedforward": {"$ref": "#/$defs/Mixer"},
        "pattern": {"type": "array", "items": {"type": "string"}},
        "num_layers": {"type": "integer", "minimum": 1},
    }
    model["required"] = ["width"]


if __name__ == "__main__":  # writes the schema that ships
    target = Path(__file__).parents[1] / "schema" / "recipe.json"
    target.write_text(json.dumps(recipe_schema(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
