"""postformer train: one recipe on text or a task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from postformer.cli.console import Device, Json, Layers, Quiet, Set, Width, finish, split_overrides


def train(
    recipe: Annotated[str | None, typer.Argument(help="A recipe's name or file; none with --resume.")] = None,
    data: Annotated[str, typer.Option(help="stdlib, enwik8, a file, a directory, or task:NAME.")] = "stdlib",
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/NAME-DATA.")] = None,
    tokens: Annotated[str, typer.Option(help="Training tokens, e.g. 2M; see also -s train.steps=N.")] = "2M",
    width: Width = None, layers: Layers = None, set_: Set = None,
    dry_run: Annotated[bool, typer.Option(help="Only tell params, peak memory and time.")] = False,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this directory from its last checkpoint.")]
    = None,
    device: Device = "auto", quiet: Quiet = False, json: Json = False,
) -> None:
    """Train a recipe. -s train.FIELD=VALUE sets the training (batch_size, length, optimiser.learning_rate, ...)."""
    import torch

    from postformer.design import load
    from postformer.training import TrainConfig
    from postformer.training import resume as resume_run
    from postformer.training.planning import plan
    from postformer.training.run import corpus_source, task_source, train_language, train_task

    torch.set_float32_matmul_precision("high")
    progress = "quiet" if quiet else "auto"
    if resume is not None:
        _report(resume_run(resume, progress=progress), resume, json)
        return
    if recipe is None:
        raise typer.BadParameter("name a recipe; `postformer list` shows them")
    design, settings = split_overrides(set_)
    task = data.removeprefix("task:") if data.startswith("task:") else None
    loaded_task = None
    if task is not None:
        from postformer.task import load as load_task

        loaded_task = load_task(task)
        if not any(o.startswith("model.vocab=") for o in design):
            design.append(f"model.vocab={loaded_task.vocab}")
    made = load(recipe, design, width, layers)
    if "steps" not in settings:
        settings.setdefault("tokens", _count(tokens))
    config = TrainConfig.model_validate({"device": device, "checkpoint_every": 200, "evaluate_every": 200} | settings)
    where = out or Path("runs") / f"{made.name}-{Path(data.replace('task:', '')).name}"
    if task is not None:
        if dry_run:
            _plan(plan(made, task_source(task, None, config, None), config), json)
            return
        result = train_task(made, task, None, config, where, progress=progress)
    else:
        from postformer.data import load_corpus

        corpus = load_corpus(data)
        if not quiet:
            print(f"{corpus.name}: {len(corpus.train):,} bytes to train on, {len(corpus.validation):,} to validate; "
                  f"{corpus.licence}")
        if dry_run:
            _plan(plan(made, corpus_source(corpus, config), config), json)
            return
        result = train_language(made, corpus, config, where, progress=progress)
    _report(result, where, json)


def _count(text: str) -> int:
    """2M -> 2000000"""
    scale = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}.get(text[-1:].lower())
    try:
        value = float(text[:-1]) * scale if scale else float(text)
    except ValueError:
        raise typer.BadParameter(f"--tokens is {text!r}; write a number such as 500000, 500k or 2M") from None
    if value < 1:
        raise typer.BadParameter("--tokens must be at least 1")
    return int(value)


def _plan(plan: Any, json: bool) -> None:
    for line in plan.lines():
        print(line)
    finish({k: getattr(plan, k) for k in plan.__dataclass_fields__}, json)


def _report(result: Any, where: Path, json: bool) -> None:
    values = result.model_dump(mode="json")
    validation = values.get("validation") or {}
    shown = ", ".join(f"{k} {v:.4f}" for k, v in validation.items() if isinstance(v, float))
    print(f"{values.get('status', 'done')}: {shown}" if shown else str(values.get("status", "done")))
    print(f"run: {where}    page: postformer report {where}    text: postformer generate {where}")
    finish({"run": str(where), **values}, json)
