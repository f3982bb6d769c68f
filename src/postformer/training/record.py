"""The record of a run: what run.json and result.json hold, and where and with what a run was made."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from postformer.design import Recipe, load
from postformer.training.config import Config, TrainConfig
from postformer.training.errors import RunExists, TrainingError
from postformer.training.files import space_needed, write_json, write_text

RUN, RESULT, RECIPE, STAGES = "run.json", "result.json", "recipe.yaml", "stages.json"
FORMAT = 1
INCIDENTAL = ("threads", "device", "time_limit", "checkpoint_every")
"""Fields of TrainConfig in which two sessions of one run may differ."""
NO_RUN = "Give the directory that training printed and wrote to."


class Result(Config):
    """How a run ended; result.json."""

    name: str
    recipe_id: str
    seed: int
    status: Literal["finished", "interrupted", "diverged", "failed"]
    reason: str | None = None
    """Why it ended before its last step."""
    step: int
    steps: int
    tokens: int
    elapsed_s: float
    loss: float | None
    """Of the last training step, nats per scored token."""
    validation: dict[str, float]
    """The newest evaluation: loss and bits_per_byte, or the scores of a task."""
    params: int
    flops_per_token: float | None
    """Forward, mean over one sequence of `context` tokens; None where the design does not declare it."""
    state_bytes: int | None
    """Per sequence, after `context` tokens."""
    context: int
    tokens_per_s: float
    """Median over the steps."""
    peak_memory_mb: float
    directory: str


def describe_run(recipe: Recipe, config: TrainConfig, data: dict[str, Any], device: torch.device,
                 stage: dict[str, Any] | None = None) -> dict[str, Any]:
    """The content of run.json; `config` has its threads and device resolved. stage: of a training of several."""
    return {
        "format": FORMAT, "name": recipe.name, "recipe_id": recipe.id, "seed": config.seed,
        "command": shlex.join(sys.argv), "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": data, "config": config.model_dump(mode="json"), "environment": environment(device),
        **({} if stage is None else {"stage": stage}),
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, threads and processors."""
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("postformer", "torch", "numpy", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found |= {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": str(device)}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def identity(run: dict[str, Any]) -> str:
    """Hash of what makes two sessions parts of one run: design, data and training, without threads and the like."""
    data = {k: v for k, v in run["data"].items() if k not in ("source", "licence")}
    # Without defaults: a run begun before a field existed is the same run after.
    said = TrainConfig.model_validate(run["config"]).model_dump(mode="json", exclude_defaults=True)
    config = {k: v for k, v in said.items() if k not in INCIDENTAL}
    stage = [run["stage"]] if "stage" in run else []
    text = json.dumps([run["recipe_id"], data, config, *stage], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def claim(directory: Path, recipe: Recipe, run: dict[str, Any], resume: bool) -> dict[str, Any]:
    """Make a run directory, or find the same run in it -> its run.json.

    Raises RunExists if it holds another run, the same one and `resume` is not set, or other files.
    """
    if (directory / RUN).exists():
        found = read_run(directory)
        if identity(found) != identity(run):
            raise RunExists(
                f"{directory} already holds another run ({_differences(found, run)}).",
                "Give this run another directory, or remove that one.",
            )
        if not resume:
            raise RunExists(
                f"{directory} already holds this very run, started {found['started']}.",
                f"Resume it: postformer train --resume {directory}  (or postformer.training.resume). "
                "For a fresh start, give another directory or remove this one.",
            )
        return found
    with space_needed(directory, RUN):
        directory.mkdir(parents=True, exist_ok=True)
        strangers = sorted(p.name for p in directory.iterdir() if p.name != RECIPE and not p.name.startswith("."))
        if strangers:
            raise RunExists(f"{directory} is not empty (it has {strangers[0]}) and holds no run.",
                            "Give the run a directory of its own.")
        write_text(directory / RECIPE, yaml.safe_dump(recipe.dump(), sort_keys=False, allow_unicode=True))
        write_json(directory / RUN, run)
    return run


def newest(directory: Path) -> Path:
    """The run in a directory: itself, or of a training of stages the last stage that has a checkpoint."""
    if not (directory / STAGES).exists():
        return directory
    stages = sorted(directory.glob("stage-*"), key=lambda path: int(path.name.removeprefix("stage-")))
    return ([path for path in stages if any((path / "checkpoints").glob("step-*"))] or stages or [directory])[-1]


def check_run(directory: Path) -> None:
    """Raises TrainingError if the directory holds no run."""
    if not directory.is_dir():
        raise TrainingError(f"there is no directory {directory}.", NO_RUN)
    if not (directory / RUN).exists():
        raise TrainingError(f"{directory} holds no run: there is no {RUN}.", NO_RUN)


def read_run(directory: Path) -> dict[str, Any]:
    """run.json. Raises TrainingError if there is none or it cannot be read."""
    check_run(directory)
    file = directory / RUN
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
        TrainConfig.model_validate(run["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{file} cannot be read: {error}.", "The run cannot be resumed; its checkpoints' weights "
                            "can still be loaded with recipe.yaml.") from error
    return run


def read_recipe(directory: Path, wanted: str | None = None) -> Recipe:
    """recipe.yaml of a run; `wanted`: the id that it must have."""
    recipe = load(directory / RECIPE)
    if wanted is not None and recipe.id != wanted:
        raise TrainingError(
            f"{directory / RECIPE} is not the design this run was started with (its id is {recipe.id[:12]}, "
            f"not {wanted[:12]}).", "Undo the changes to it; a changed design is a new run in a new directory.")
    return recipe


def read_result(directory: Path) -> Result | None:
    """result.json, or None if the run has not ended."""
    file = directory / RESULT
    return Result.model_validate_json(file.read_text(encoding="utf-8")) if file.exists() else None


def _differences(found: dict[str, Any], run: dict[str, Any]) -> str:
    parts = []
    if found["recipe_id"] != run["recipe_id"]:
        parts.append(f"the design is {found['name']} {found['recipe_id'][:8]} there, {run['name']} "
                     f"{run['recipe_id'][:8]} here")
    parts += [f"{section} {key} is {found[section].get(key)} there, {value} here"
              for section in ("data", "config") for key, value in run[section].items()
              if key not in INCIDENTAL and found[section].get(key) != value]
    return "; ".join(parts[:3]) or "an older format"
