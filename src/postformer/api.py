"""The verbs in Python: `postformer.load("gated-deltanet").train("stdlib", tokens=2_000_000).generate("def ")`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from postformer.design import Recipe
from postformer.design import load as load_recipe
from postformer.design.cost import Cost

if TYPE_CHECKING:
    from postformer.model import LanguageModel
    from postformer.training import Result
    from postformer.verify import Verification


class Architecture:
    """A recipe and what can be done with it."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def id(self) -> str:
        """sha256 of the canonical design."""
        return self.recipe.id

    @property
    def cost(self) -> Cost:
        """Params, FLOPs and state bytes, from the design alone."""
        return self.recipe.cost()

    def build(self, seed: int = 0) -> LanguageModel:
        """A freshly initialised model (torch.nn.Module)."""
        from postformer.model import build

        return build(self.recipe.model, seed)

    def verify(self) -> Verification:
        """Check that the design keeps the contract."""
        from postformer.verify import verify

        return verify(self.recipe)

    def train(self, data: str = "stdlib", directory: str | Path | None = None, *, resume: bool = False,
              progress: str = "auto", **settings: Any) -> Run:
        """Train on text (stdlib, enwik8, a file or directory). settings: fields of TrainConfig, e.g. tokens=2_000_000.

        directory: of the run; default runs/NAME-DATA. resume: continue if it already holds this run.
        """
        from postformer.data import load_corpus
        from postformer.training import TrainConfig, train_language

        if not {"steps", "tokens"} & set(settings):
            settings["tokens"] = 2_000_000
        where = Path(directory or Path("runs") / f"{self.name}-{Path(data).name}")
        result = train_language(self.recipe, load_corpus(data), TrainConfig.model_validate(settings), where,
                                progress=progress, resume=resume)
        return Run(where, result)

    def __repr__(self) -> str:
        model = self.recipe.model
        return f"<{self.name}: width {model.width}, {len(model.stack)} layers, {self.cost.params:,} params>"


class Run:
    """A run directory, with the model that was trained in it."""

    def __init__(self, directory: str | Path, result: Result | None = None) -> None:
        from postformer.training.run import load_run

        self.directory, self.result = Path(directory), result
        self.recipe, self.model = load_run(self.directory)

    def generate(self, prompt: str, tokens: int = 200, *, temperature: float = 0.8, top_p: float = 0.95,
                 seed: int = 0) -> str:
        """The prompt and its continuation."""
        import torch

        from postformer.data.codec import decode, encode
        from postformer.sampling import Policy, generate

        made = generate(self.model, encode(prompt)[None], Policy(temperature, top_p=top_p), tokens,
                        generator=torch.Generator().manual_seed(seed))
        return decode(made.tokens[0])

    def report(self, out: str | Path | None = None) -> Path:
        """One HTML page about the run."""
        from postformer.report import render

        return render(self.directory, out)


def load(recipe: str | Path | dict[str, Any], overrides: Sequence[str] = (), width: int | None = None,
         layers: int | None = None) -> Architecture:
    """A recipe by shipped name, file or mapping; see `postformer.design.load`."""
    return Architecture(load_recipe(recipe, overrides, width, layers))
