"""The recipe grammar: what a design may say. `loading` turns YAML into these; docs/grammar.md shows it whole."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, WithJsonSchema, model_validator

from postformer.design import registry
from postformer.design.base import Design, DesignError, word
from postformer.design.depth import AnyDepth, Fixed
from postformer.design.linear import Linears, Lora

VERSION = 1


def _mixer(value: Any) -> Any:
    if isinstance(value, Design):
        return value
    if not isinstance(value, dict) or "kind" not in value:
        raise ValueError("a mixer is a mapping with a 'kind', e.g. {kind: attention}")
    try:
        cls = registry.resolve(value["kind"])
    except DesignError as e:
        raise ValueError(e.message) from e
    return cls.Design.model_validate(value)


if TYPE_CHECKING:
    AnyMixer = Any
else:
    AnyMixer = Annotated[SerializeAsAny[Design], BeforeValidator(_mixer), WithJsonSchema({"x-postformer": "mixer"})]
"""A mixer's design of whatever registered kind."""


class Norm(Design):
    kind: Literal["rms", "layer", "zero-centred-rms", "none"] = "rms"
    eps: float = Field(default=1e-6, gt=0)
    affine: bool = True
    bias: bool = True
    """Only for `layer`: with a bias."""


AnyNorm = Annotated[Norm, word("kind")]


class Embedding(Design):
    tie: bool = True
    scale: float | Literal["sqrt-width"] = 1.0
    norm: AnyNorm = Norm(kind="none")
    position: Literal["none", "sinusoidal"] = "none"
    """sinusoidal: sines and cosines of the position are added (1706.03762)"""


class Head(Design):
    softcap: float | None = Field(default=None, gt=0)
    """logits <- cap * tanh(logits / cap)"""


class Sublayer(Design):
    """One residual branch: x + scale * post_norm(mixer(norm(input)))."""

    use: str | AnyMixer
    norm: AnyNorm | None = None
    """None: the model's norm."""
    post_norm: AnyNorm = Norm(kind="none")
    input: tuple[str, ...] = ("x",)
    """What is concatenated: x (the stream), embedding, or names of publications."""
    out: Literal["width"] | None = None
    """width: a linear map of this site after the mixer."""
    residual: Literal["add", "none", "next"] = "add"
    """next: not added to the stream but to the next sublayer's input."""
    scale: float | Literal["learned"] | None = None
    publish: dict[str, str] = Field(default_factory=dict)
    """name -> what of the mixer's publications"""
    depth: AnyDepth = Fixed()
    """How often it runs at each token"""


class Shared(Design):
    """A block whose parameters exist once per copy; state per site."""

    layer: tuple[Sublayer, ...]
    copies: int = Field(default=1, ge=1)


class Model(Design):
    """The architecture, desugared: `stack` is the flat list of layer names."""

    width: int = Field(gt=0)
    vocab: int = Field(default=256, gt=1)
    embedding: Embedding = Embedding()
    head: Head = Head()
    norm: AnyNorm = Norm()
    linear: Linears = Linears()
    """Of all mixers, by role"""
    mixers: dict[str, AnyMixer]
    layers: dict[str, tuple[Sublayer, ...]]
    shared: dict[str, Shared] = Field(default_factory=dict)
    stack: tuple[str, ...]
    stack_norm: AnyNorm | None = None
    """After the last layer; None: the model's norm."""

    @model_validator(mode="after")
    def _named(self) -> Model:
        if not self.stack:
            raise ValueError("the stack is empty; give it at least one layer")
        for role in Linears.model_fields:
            if isinstance(lora := self.linear.of(role), Lora) and lora.rank > self.width:
                raise ValueError(f"linear.{role}.rank is {lora.rank}, more than the width of {self.width}: such an "
                                 "update is not of low rank. Give a smaller rank, or use kind: dense")
        return self

    def mixer_of(self, use: str | Design) -> Design:
        return use if isinstance(use, Design) else self.mixers[use]

    def canonical(self) -> dict[str, Any]:
        """The design with names inlined and defaults left out: equal for two spellings of one architecture, and
        unchanged when a later grammar adds a field whose default means what was meant before."""
        called = [s.use for name in self.stack for s in self.layers[name] if isinstance(s.use, str)]
        shared = {name: str(i) for i, name in enumerate(n for n in dict.fromkeys(called) if n in self.shared)}

        def sub(s: Sublayer) -> dict[str, Any]:
            use = {"shared": shared[s.use]} if isinstance(s.use, str) and s.use in shared else \
                self.mixer_of(s.use).essence()
            return {**s.essence(), "norm": (s.norm or self.norm).essence(), "use": use}

        d = {k: v for k, v in self.essence().items() if k not in ("mixers", "layers", "norm", "shared")}
        if shared:
            d["shared"] = {i: {"layer": [sub(s) for s in self.shared[n].layer], "copies": self.shared[n].copies}
                           for n, i in shared.items()}
        d["stack"] = [[sub(s) for s in self.layers[name]] for name in self.stack]
        d["stack_norm"] = (self.stack_norm or self.norm).essence()
        return d


class Size(Design):
    """How large a recipe is under one of its further names."""

    width: int
    layers: int = Field(ge=1)


class Recipe(Design):
    """A named design with the paper it comes from."""

    version: Literal[1] = VERSION
    name: str
    paper: str | None = None
    """arXiv id"""
    summary: str = ""
    sizes: dict[str, Size] = {}
    """Sizes that have names: "125m" of recipe a is loaded as "a-125m"."""
    model: Model

    @property
    def id(self) -> str:
        """sha256 of the canonical JSON of the architecture (name and comments do not count)."""
        text = json.dumps(self.model.canonical(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def cost(self) -> Any:
        """Params, FLOPs and state bytes, from the design alone (`design.cost.Cost`)."""
        from postformer.design.plan import cost

        return cost(self.model)
