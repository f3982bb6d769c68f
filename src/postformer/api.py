"""The verbs in Python: `postformer.load("gated-deltanet").train("stdlib", tokens=2_000_000).generate("def ")`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
              progress: str = "auto", stages: str | Path | Sequence[Any] | None = None, **settings: Any) -> Run:
        """Train on text (stdlib, enwik8, a file or directory) or on task:NAME. settings: fields of TrainConfig, e.g.
        tokens=2_000_000; defaults as those of the command line.

        directory: of the run; default runs/NAME-DATA. resume: continue if it already holds this run. stages: a file or
        a list of training stages, see `training.stages`; settings are then for all of them.
        """
        from postformer.training.stages import staged, train_stages
        from postformer.training.work import configured, run_directory, work

        where = Path(directory or run_directory(self.name, data))
        if stages is not None:
            job = work(self.recipe, data)
            plan = staged(job.recipe, stages, settings)
            return Run(where, train_stages(job, plan, where, progress=progress, resume=resume))
        config = configured(settings)
        return Run(where, work(self.recipe, data).train(config, where, progress=progress, resume=resume))

    def __repr__(self) -> str:
        from postformer.design import DesignError

        model = self.recipe.model
        try:
            size = f"{self.cost.params:,} params"
        except DesignError:  # a memory need not declare its cost
            size = "cost not declared"
        return f"<{self.name}: width {model.width}, {len(model.stack)} layers, {size}>"


class Run:
    """A run directory, with the model that was trained in it."""

    def __init__(self, directory: str | Path, result: Result | None = None) -> None:
        from postformer.training.run import load_run

        self.directory, self.result = Path(directory), result
        self.recipe, self.model = load_run(self.directory)

    def generate(self, prompt: str, tokens: int = 200, *, temperature: float = 0.8, top_p: float = 0.95,
                 seed: int = 0, stop: str | Sequence[str] = (), **policy: Any) -> str:
        """The prompt and its continuation; arguments and errors as of `stream`."""
        made = b"".join(self.stream(prompt, tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop,
                                    **policy))
        return (prompt.encode("utf-8", "surrogateescape") + made).decode("utf-8", "replace")

    def stream(self, prompt: str, tokens: int = 200, *, temperature: float = 0.8, top_p: float = 0.95,
               seed: int = 0, stop: str | Sequence[str] = (), **policy: Any) -> Iterator[bytes]:
        """The continuation, piece by piece as it is made, up to the first of the strings in `stop`, which is left out.

        policy: more fields of `sampling.Policy`: top_k, min_p, repetition_penalty. Raises ValueError, before anything
        is made, for a run that was not trained on text and values out of range.
        """
        import torch

        from postformer.data.codec import VOCAB, decode_bytes, encode
        from postformer.sampling import Policy, StopText, stream
        from postformer.training import read_run
        from postformer.training.record import newest

        data, vocab = read_run(newest(self.directory))["data"], self.recipe.model.vocab
        if data["kind"] != "corpus":
            raise ValueError(f"{self.directory} was trained on the task {data['name']}, not on text; "
                             "generate needs a run that was trained on text")
        if vocab != VOCAB:
            raise ValueError(f"{self.directory} has a vocabulary of {vocab}, and text is made of {VOCAB} bytes: train "
                             f"it with model.vocab={VOCAB} to generate text")
        if not prompt:
            raise ValueError("the prompt is empty; give at least one character")
        if tokens < 1:
            raise ValueError(f"tokens must be at least 1, not {tokens}")
        unknown = sorted(set(policy) - set(Policy.__dataclass_fields__))
        if unknown:
            raise ValueError(f"nothing about drawing tokens is called {', '.join(unknown)}; there are "
                             f"{', '.join(Policy.__dataclass_fields__)}, seed and stop")
        generator = torch.Generator().manual_seed(seed)
        text = StopText([stop] if isinstance(stop, str) else stop)
        pieces = stream(self.model, encode(prompt)[None], Policy(temperature, top_p=top_p, **policy), tokens,
                        generator=generator)
        return text.cut(decode_bytes(piece.token) for piece in pieces)

    def report(self, out: str | Path | None = None) -> Path:
        """One HTML page about the run."""
        from postformer.report import render

        return render(self.directory, out)


def load(recipe: str | Path | dict[str, Any], overrides: Sequence[str] = (), width: int | None = None,
         layers: int | None = None) -> Architecture:
    """A recipe by shipped name, file or mapping; see `postformer.design.load`."""
    return Architecture(load_recipe(recipe, overrides, width, layers))
