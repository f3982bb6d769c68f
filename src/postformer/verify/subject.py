"""What is verified: a small model of the design, in fp64, with every parameter moved off its starting value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from postformer.block.depth import adapted
from postformer.contract.context import Context
from postformer.contract.mixer import Out, Traits, joined
from postformer.design import Recipe, load, registry
from postformer.design.base import Design
from postformer.design.plan import Planned, planned, shared_places
from postformer.model import LanguageModel, build
from postformer.model.language import LMState

WIDTH, WINDOW, SEGMENT, CHUNK, PERIOD, MOST = 32, 8, 16, 8, 5, 3


def reduced(recipe: Recipe) -> Recipe:
    """The design at verification size: width 32, one of each kind of layer (at least two), windows cut."""
    distinct = len(dict.fromkeys(recipe.model.stack))
    small = load(recipe, width=min(WIDTH, recipe.model.width), layers=min(len(recipe.model.stack), max(2, distinct)))
    return small.model_copy(update={"model": _narrow(small.model)})


def _narrow(value: Any) -> Any:
    """Windows cut to 8 tokens, segments to 16, chunks to 8, periods to 5 wherever a design has them: short sequences
    leave them. At most three repetitions: a first, a last, and one between."""
    if isinstance(value, Design):
        changes = {name: _narrow(getattr(value, name)) for name in type(value).model_fields}
        for name, most in (("window", WINDOW), ("segment", SEGMENT), ("chunk", CHUNK), ("every", PERIOD),
                           ("target", PERIOD), ("most", MOST)):
            if isinstance(size := getattr(value, name, None), (int, float)) and not isinstance(size, bool):
                changes[name] = min(size, most)
        return value.model_copy(update={k: v for k, v in changes.items() if v is not getattr(value, k)})
    if isinstance(value, dict):
        return {k: _narrow(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(_narrow(v) for v in value)
    return value


def _sought(value: Any) -> set[int]:
    """Tokens that end something somewhere in a design, and bytes that end words and sentences."""
    if isinstance(value, Design):
        own = set(getattr(value, "after", ())) | set(b" .")
        return own.union(*(_sought(getattr(value, name)) for name in type(value).model_fields))
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return set().union(*map(_sought, parts))


@dataclass
class Subject:
    """A model, run on embedded tokens x [B, T, D]."""

    recipe: Recipe
    model: LanguageModel
    traits: Traits

    @property
    def width(self) -> int:
        return self.recipe.model.width

    def __call__(self, x: Tensor, state: LMState | None = None, ctx: Context | None = None) -> tuple[Out, LMState]:
        return self.model.run(x, state, ctx, self.tokens(x))

    def tokens(self, x: Tensor) -> Tensor:
        """What tokens x [B, T, D] is said to be the embedding of: half of them such as the design looks for."""
        raw = (x[..., 0].detach().abs() * 997).long()
        sought = torch.tensor(sorted(_sought(self.recipe.model)) or [0], device=x.device)
        return torch.where(raw % 2 == 0, raw // 2 % self.recipe.model.vocab, sought[raw // 2 % len(sought)])

    def input(self, batch: int, length: int, seed: int) -> Tensor:
        """Random embedded tokens, of the model's dtype."""
        like = next(self.model.parameters())
        made = torch.randn(batch, length, self.width, generator=torch.Generator().manual_seed(seed),
                           dtype=torch.float64)
        return made.to(like.dtype)


def subject(recipe: Recipe, dtype: torch.dtype = torch.float64, seed: int = 0) -> Subject:
    """Build and scramble: every parameter gets noise, so that no gate sits at its start, and every saved buffer."""
    model = build(recipe.model, seed).to(dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        learned = list(model.parameters())
        saved = [value for name, value in model.state_dict(keep_vars=True).items()
                 if not isinstance(value, nn.Parameter) and value.is_floating_point()]
        for p in learned + saved:
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
            p.add_(noise * (0.2 if p.ndim < 2 else 0.5 * p.shape[-1] ** -0.5))
    traits = stack_traits(recipe)
    # Where training chooses by what evaluation cannot see, the contract is one of evaluation.
    return Subject(recipe, model if traits.same_in_training else model.eval(), traits)


def stack_traits(recipe: Recipe) -> Traits:
    """What the whole stack can do: what all of its mixers can."""
    model = recipe.model

    def able(items: Sequence[Planned]) -> Traits:
        each = [registry.resolve(i.design.kind).traits(i.design) if i.shared is None else
                able(shared_places(model, *i.shared, len(model.stack))) for i in items]
        return joined([adapted(traits, i.sublayer.depth) for traits, i in zip(each, items)])

    return able([item for layer in planned(model) for item in layer])
