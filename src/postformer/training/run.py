"""Runs: train a recipe on a corpus or a task in a directory that becomes the full record of it.

    recipe.yaml         the resolved design
    run.json            seed, data, training configuration, command line, environment
    metrics.jsonl       one line per step
    train.log           what was printed
    checkpoints/step-N  the newest two
    result.json         how it ended
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from postformer.data import Batches, Corpus, load_corpus
from postformer.design import Cost, DesignError, Recipe
from postformer.objective import Batch, NextToken
from postformer.task import Setting, Task, seeded, setting_length, setting_name
from postformer.task import load as load_named_task
from postformer.training import checkpoint, record
from postformer.training.config import TrainConfig
from postformer.training.errors import Diverged, Interrupted, TrainingError
from postformer.training.evaluate import evaluate_split, evaluate_task
from postformer.training.files import Lock, space_needed, write_json
from postformer.training.memory import check_memory, out_of_memory, peak_memory
from postformer.training.record import RESULT, Result
from postformer.training.trainer import Outcome, Trainer

FINAL = 4
"""How many times more validation batches the last evaluation takes."""


@dataclass(frozen=True)
class Source:
    """What a run learns from: the part of run.json that says so, batches by step, and the evaluation."""

    data: dict[str, Any]
    batch_at: Callable[[int], Batch]
    evaluate: Callable[[nn.Module, bool], dict[str, float]]
    vocab: int
    context: int
    """Tokens of one sequence, for the cost figures."""
    bytes_per_token: int | None = None
    around: Callable[[nn.Module], nn.Module] = lambda model: model
    """See `Task.around`"""


def train_language(
    recipe: Recipe, corpus: Corpus, config: TrainConfig, directory: str | Path, *, progress: str = "auto",
    resume: bool = False,
) -> Result:
    """Train next-byte prediction on corpus.train, evaluated on corpus.validation; the test split is not read.

    `resume`: continue if the directory already holds this run. progress: auto, bar, plain or quiet.
    Raises RunExists, Interrupted (saved), Diverged, OutOfMemory, DiskFull, CheckpointError; ValueError for a design
    whose vocabulary is too small.
    """
    return run_source(recipe, corpus_source(corpus, config), config, Path(directory), progress, resume)


def train_task(
    recipe: Recipe, task: str | Task, train_settings: Setting | Sequence[Setting] | None, config: TrainConfig,
    directory: str | Path, *, options: dict[str, Any] | None = None, progress: str = "auto", resume: bool = False,
) -> Result:
    """Train on a task: each batch takes one of `train_settings` (None: the task's own mixture), evaluated on its
    standard settings; config.length is not used.

    task: a name with `options` for its constructor, or a Task (a run of one can be resumed only by giving it again).
    Raises as `train_language`, and TaskError for an impossible setting.
    """
    source = task_source(task, train_settings, config, options)
    return run_source(recipe, source, config, Path(directory), progress, resume)


def resume(directory: str | Path, *, corpus: Corpus | None = None, task: Task | None = None,
           time_limit: float | None = None, progress: str = "auto") -> Result:
    """Continue the run in a directory from its newest checkpoint; a finished run returns its result.

    corpus or task: if the one recorded cannot be loaded by name. time_limit: of this session, in seconds; that of
    earlier ones is not inherited. Raises as `train_language`.
    """
    directory = Path(directory)
    if (whole := _stages_of(directory)) is not None:
        from postformer.training.stages import resume_stages  # which imports this module

        return resume_stages(whole, time_limit=time_limit, progress=progress)
    run = record.read_run(directory)
    done = record.read_result(directory)
    if done is not None and done.status == "finished" and (done.step >= done.steps or done.reason == "solved"):
        return done
    recipe = record.read_recipe(directory, run["recipe_id"])
    config, data = TrainConfig.model_validate(run["config"] | {"time_limit": time_limit}), run["data"]
    if data["kind"] == "corpus":
        corpus = corpus or load_corpus(data["name"])
        if corpus.digest != data["digest"]:
            raise TrainingError(
                f"the corpus {data['name']} is not what this run was started with (its content has changed).",
                "Restore the files, or start a new run on the corpus as it is now.")
        source = corpus_source(corpus, config)
    else:
        if task is None and not data["named"]:
            raise TrainingError(f"the task {data['name']} of this run was given as an object.",
                                "Give it again: postformer.training.resume(directory, task=...).")
        source = task_source(task or data["name"], data["settings"], config, data["options"])
        source.data["named"] = data["named"]
    return run_source(recipe, source, config, directory, progress, True)


def load_run(directory: str | Path, step: int | None = None, *, task: Task | None = None) -> tuple[Recipe, nn.Module]:
    """The design of a run and its model with the weights of a checkpoint (None: the newest), inside the task's own
    reading if it has one (see `Task.around`).

    task: if the one recorded cannot be loaded by name. Raises CheckpointError or TrainingError if there is none.
    """
    directory = record.newest(Path(directory))
    data = record.read_run(directory)["data"]
    recipe = record.read_recipe(directory)
    found = checkpoint.steps(directory / "checkpoints")
    if not found:
        raise TrainingError(f"{directory} has no checkpoint yet.", "Train it first, or resume it.")
    model = build_model(recipe, 0)
    if task is None and data["kind"] == "task" and data["named"]:
        task = load_named_task(data["name"], **data["options"])
    model = model if task is None else task.around(model)
    checkpoint.load_weights(model, directory / "checkpoints" / f"step-{step or found[-1]}" / checkpoint.WEIGHTS)
    return recipe, model


def _stages_of(directory: Path) -> Path | None:
    """The training of stages that a directory holds or is a stage of: a stage is continued as a part of it."""
    if (directory / record.STAGES).exists():
        return directory
    if (directory / record.RUN).exists() and "stage" in record.read_run(directory):
        whole = directory.resolve().parent
        if not (whole / record.STAGES).exists():
            raise TrainingError(f"{directory} is a stage of a training that is not around it (no {record.STAGES}).",
                                "Move it back into the training's directory and resume that.")
        return whole
    return None


def corpus_source(corpus: Corpus, config: TrainConfig) -> Source:
    """Batches and evaluation of a corpus of bytes."""
    train = Batches(corpus.train, config.length, config.batch_size, config.seed)

    def evaluate(model: nn.Module, final: bool) -> dict[str, float]:
        batches = config.evaluate_batches * (FINAL if final else 1)
        # The same windows for every seed of a comparison.
        found = evaluate_split(model, corpus.validation, config.length, config.batch_size, batches=batches)
        return {name: found[name] for name in ("loss", "bits_per_byte")}

    data = {"kind": "corpus", "name": corpus.name, "digest": corpus.digest, "source": corpus.source,
            "licence": corpus.licence}
    return Source(data, lambda step: Batch.windows(train.at(step)), evaluate, 256, config.length, 1)


def task_source(task: str | Task, settings: Setting | Sequence[Setting] | None, config: TrainConfig,
                options: dict[str, Any] | None = None) -> Source:
    """Batches and evaluation of a task."""
    named = isinstance(task, str)
    made = load_named_task(task, **(options or {})) if isinstance(task, str) else task
    if settings is None:
        chosen: list[Setting] = list(made.difficulties.train)
    elif isinstance(settings, (int, tuple)) and (isinstance(settings, int) or all(map(_is_int, settings))):
        chosen = [settings]  # type: ignore[list-item]
    else:
        chosen = [tuple(s) if isinstance(s, list) else s for s in settings]  # type: ignore[union-attr]
    for setting in chosen:
        made.check(setting)
    stock = made.on("train")

    def batch_at(step: int) -> Batch:
        generator = seeded(config.seed, "train", step)
        setting = chosen[int(torch.randint(len(chosen), (), generator=generator))]
        batch = stock.batch(setting, config.batch_size, generator)
        return Batch(batch.tokens, batch.targets, batch.ctx)

    def evaluate(model: nn.Module, final: bool) -> dict[str, float]:
        every = final or config.until is not None
        wanted = made.difficulties.evaluate if every else made.difficulties.inside or made.difficulties.evaluate
        batches = max(1, config.evaluate_batches // len(wanted)) * (FINAL if final else 1)
        found = evaluate_task(model, made, wanted, batch_size=config.batch_size, batches=batches)
        inside = [found[setting_name(s)] for s in made.difficulties.inside or wanted]
        means = {name: sum(f[name] for f in inside) / len(inside) for name in inside[0]}
        worst = {"higher": min, "lower": max}[made.better](scores[made.metric] for scores in found.values())
        each = {f"{s}/{name}": value for s, scores in found.items() for name, value in scores.items()}
        reached = worst if made.better == "higher" else -worst
        return means | each | ({"reached": reached} if every else {})

    data = {"kind": "task", "name": task if named else made.name, "named": named, "options": options or {},
            "settings": [list(s) if isinstance(s, tuple) else s for s in chosen]}
    context = max(map(setting_length, chosen))
    return Source(data, batch_at, evaluate, made.vocab, context, around=made.around)


def build_model(recipe: Recipe, seed: int) -> nn.Module:
    """The model of a recipe with initial weights drawn from the seed."""
    from postformer.model import build

    return build(recipe.model, seed=seed)


def initial_model(recipe: Recipe, config: TrainConfig) -> nn.Module:
    """`build_model` on the device of a run. Raises OutOfMemory, if possible before anything is allocated."""
    device = device_of(config)
    check_size(recipe, device)
    with out_of_memory(config):
        return build_model(recipe, config.seed).to(device)


def check_size(recipe: Recipe, device: torch.device) -> None:
    """Raises OutOfMemory for a design that is known not to fit."""
    if (cost := declared_cost(recipe)) is not None:
        check_memory(cost.params, device)


def declared_cost(recipe: Recipe) -> Cost | None:
    """The cost of a design; None where the class of one of its memories declares none (which it need not)."""
    try:
        return recipe.cost()
    except DesignError:
        return None


def device_of(config: TrainConfig) -> torch.device:
    """auto: a CUDA GPU if there is one, else the CPU. Raises ValueError for a device that is not there."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there[config.device]:
        raise ValueError(f"device {config.device} is not available here; use device=auto or cpu")
    return torch.device(config.device)


def check_vocabulary(recipe: Recipe, needed: int) -> None:
    """Raises ValueError if the model cannot express the tokens."""
    if recipe.model.vocab < needed:
        raise ValueError(f"the data has {needed} token ids and the model's vocabulary is {recipe.model.vocab}: set "
                         f"model.vocab={needed}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int)


def run_source(recipe: Recipe, source: Source, config: TrainConfig, directory: Path, progress: str, resume: bool, *,
               begin: Callable[[], tuple[nn.Module, list[str]]] | None = None,
               stage: dict[str, Any] | None = None) -> Result:
    """`train_language` on any source. begin: makes the model to begin with, inside the source's reading, and lines to
    print about it; called only while there is no checkpoint. stage: of a training of several, for the record."""
    check_vocabulary(recipe, source.vocab)
    device = device_of(config)
    check_size(recipe, device)  # before the directory is claimed for a run that cannot begin
    config = config.model_copy(update={"threads": config.threads or torch.get_num_threads(), "device": device.type})
    fresh = not (directory / record.RUN).exists()
    started, inside, notes = None, None, []
    begun = bool(checkpoint.steps(directory / "checkpoints"))
    if begin is not None and not begun:
        inside, notes = begin()
    elif config.start is not None and not begun:
        started = initial_model(recipe, config)
        notes = checkpoint.start_from(started, config.start)
    run = record.claim(directory, recipe, record.describe_run(recipe, config, source.data, device, stage), resume)
    lock = Lock(directory)
    try:
        if not fresh:
            old = TrainConfig.model_validate(run["config"])
            config = config.model_copy(update={"threads": old.threads})
        model = (inside or source.around(started or initial_model(recipe, config))).to(device)
        trainer = Trainer(
            model, NextToken(), source.batch_at, config, directory=directory, evaluate=source.evaluate,
            bytes_per_token=source.bytes_per_token, progress=progress, identity=record.identity(run),
            metadata={"name": recipe.name, "recipe_id": recipe.id}, notes=notes,
        )
        trainer.restore()
        (directory / RESULT).unlink(missing_ok=True)  # of an earlier session; this one writes its own
        return _finish(trainer, recipe, source, directory)
    finally:
        lock.release()


def _finish(trainer: Trainer, recipe: Recipe, source: Source, directory: Path) -> Result:
    status, reason, outcome = "failed", None, None
    try:
        outcome = trainer.train()
        status, reason = "finished", None if outcome.stopped == "finished" else outcome.stopped
    except (Exception, KeyboardInterrupt) as error:
        kinds = {Interrupted: "interrupted", KeyboardInterrupt: "interrupted", Diverged: "diverged"}
        status = kinds.get(type(error), "failed")
        reason = error.message if isinstance(error, TrainingError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(Exception):  # the error on its way says more, whatever fails here
            _write(_result(trainer, recipe, source, directory, status, reason, None), directory)
        raise
    result = _result(trainer, recipe, source, directory, status, reason, outcome)
    _write(result, directory)
    return result


def _write(result: Result, directory: Path) -> None:
    with space_needed(directory, RESULT):
        write_json(directory / RESULT, result.model_dump(mode="json"))


def _result(trainer: Trainer, recipe: Recipe, source: Source, directory: Path, status: str, reason: str | None,
            outcome: Outcome | None) -> Result:
    cost, position = declared_cost(recipe), trainer.position
    last = trainer.metrics.last if trainer.metrics else None
    return Result(
        name=recipe.name, recipe_id=recipe.id, seed=trainer.config.seed, status=status,  # type: ignore[arg-type]
        reason=reason, step=position.step, steps=trainer.steps, tokens=position.tokens,
        elapsed_s=round(position.elapsed, 3), loss=last["loss"] if last else None,
        validation=position.validation, params=sum(p.numel() for p in trainer.model.parameters()),
        flops_per_token=cost.flops(source.context) / source.context if cost else None,
        state_bytes=cost.state_bytes(source.context) if cost else None, context=source.context,
        tokens_per_s=outcome.tokens_per_s if outcome else trainer.median_speed(),
        peak_memory_mb=round(peak_memory(trainer.device) / 2**20, 1), directory=str(directory),
    )
