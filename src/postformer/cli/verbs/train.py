"""postformer train: one recipe on text or a task."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from postformer.cli.console import Device, Json, Layers, Quiet, Set, Width, finish, split_overrides


def train(
    context: typer.Context,
    recipe: Annotated[str | None, typer.Argument(help="A recipe's name or file; none with --resume.")] = None,
    data: Annotated[str, typer.Option(help="stdlib, enwik8, a file, a directory, or task:NAME.")] = "stdlib",
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/NAME-DATA.")] = None,
    tokens: Annotated[str, typer.Option(help="Training tokens, e.g. 2M; see also -s train.steps=N.")] = "2M",
    stages: Annotated[Path | None, typer.Option(help="A YAML file of training stages, each with its own training and "
                                                "a surgery before it (growth).")] = None,
    width: Width = None, layers: Layers = None, set_: Set = None,
    dry_run: Annotated[bool, typer.Option(help="Only tell params, peak memory and time.")] = False,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this directory from its last checkpoint.")]
    = None,
    device: Device = "auto", quiet: Quiet = False, json: Json = False,
) -> None:
    """Train a recipe. -s train.FIELD=VALUE sets the training (batch_size, length, optimiser.learning_rate, ...)."""
    if resume is not None:
        _alone(context, resume)
    elif recipe is None:
        raise typer.BadParameter("name a recipe; `postformer list` shows them")
    design, settings = split_overrides(set_)
    count = _count(tokens)
    import torch

    from postformer.design import load
    from postformer.training import plan
    from postformer.training import resume as resume_run
    from postformer.training.stages import staged, train_stages
    from postformer.training.work import configured, run_directory, work

    torch.set_float32_matmul_precision("high")
    progress = "quiet" if quiet else "auto"
    if resume is not None:
        _report(resume_run(resume, progress=progress), resume, json)
        return
    assert recipe is not None
    made = load(recipe, design, width, layers)
    where = out or run_directory(made.name, data)
    if stages is not None:
        if _given(context, "tokens"):
            raise typer.BadParameter(f"--tokens cannot be given with --stages: {stages} says how long each stage is")
        job = work(made, data)
        steps = staged(job.recipe, stages, {"device": device} | settings)
        _corpus(job, quiet)
        if dry_run:
            _plans([plan(s.recipe, job.source(s.config), s.config) for s in steps], json)
            return
        _report(train_stages(job, steps, where, progress=progress), where, json)
        return
    if "steps" not in settings:
        settings.setdefault("tokens", count)
    config = configured({"device": device} | settings)
    job = work(made, data)
    _corpus(job, quiet)
    if dry_run:
        _plan(plan(job.recipe, job.source(config), config), json)
        return
    _report(job.train(config, where, progress=progress), where, json)


def _alone(context: typer.Context, resume: Path) -> None:
    """A run is continued as it was begun: what else is asked for would be ignored, so it is refused."""
    beside = {"resume", "quiet", "json"}
    for option in context.command.params:
        if option.name not in beside and _given(context, option.name or ""):
            said = option.opts[-1] if option.opts[-1].startswith("-") else f"the recipe {context.params[option.name]}"
            raise typer.BadParameter(f"{said} cannot be given with --resume: the run in {resume} goes on as it was "
                                     "begun. Leave it out, or start a new run in another directory without --resume")


def _given(context: typer.Context, option: str) -> bool:
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def _count(text: str) -> int:
    """2M -> 2000000"""
    scale = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}.get(text[-1:].lower())
    try:
        value = float(text[:-1]) * scale if scale else float(text)
    except ValueError:
        raise typer.BadParameter(f"--tokens is {text!r}; write a number such as 500000, 500k or 2M") from None
    if not 1 <= value < math.inf:
        raise typer.BadParameter(f"--tokens is {text!r}; it is a number from 1 on, such as 500000, 500k or 2M")
    return int(value)


def _corpus(job: Any, quiet: bool) -> None:
    if (corpus := job.corpus) is not None and not quiet:
        print(f"{corpus.name}: {len(corpus.train):,} bytes to train on, {len(corpus.validation):,} to validate; "
              f"{corpus.licence}")


def _plan(plan: Any, json: bool) -> None:
    for line in plan.lines():
        print(line)
    finish({k: getattr(plan, k) for k in plan.__dataclass_fields__}, json)


def _plans(plans: list[Any], json: bool) -> None:
    for k, plan in enumerate(plans):
        print(f"stage {k}")
        for line in plan.lines():
            print(f"  {line}")
    finish({"stages": [{k: getattr(plan, k) for k in plan.__dataclass_fields__} for plan in plans]}, json)


def _report(result: Any, where: Path, json: bool) -> None:
    values = result.model_dump(mode="json")
    validation = values.get("validation") or {}
    shown = ", ".join(f"{k} {v:.4f}" for k, v in validation.items() if isinstance(v, float))
    print(f"{values.get('status', 'done')}: {shown}" if shown else str(values.get("status", "done")))
    print(f"run: {where}    page: postformer report {where}    text: postformer generate {where}")
    finish({"run": str(where), **values}, json)
