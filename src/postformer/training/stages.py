"""Training in ordered stages: each with changes to the configuration and, before it, a surgery on the model.

    train: {batch_size: 16, length: 256}           # of all stages, where they do not say otherwise
    stages:
      - train: {steps: 1000}
      - surgery: {kind: grow, how: stack, factor: 4}
        train: {steps: 4000, optimiser: {learning_rate: 1.0e-3}}

Each stage is a run of its own in DIRECTORY/stage-N, with a design, a schedule and an optimiser of its own; from the
second on it starts from the last weights of the one before, after the surgery. A stage that states no seed takes the
training's plus 1000 for each stage before it, so that no stage sees the batches of another again. DIRECTORY/stages.json
says what was asked for; a training that was stopped goes on in the stage it was in.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from postformer import surgery
from postformer.design import DesignError, Recipe
from postformer.design.base import nearest
from postformer.surgery import Surgery
from postformer.training import checkpoint, record, run
from postformer.training.config import TrainConfig
from postformer.training.errors import RunExists, TrainingError
from postformer.training.files import Lock, space_needed, write_json
from postformer.training.record import STAGES, Result
from postformer.training.run import Source
from postformer.training.work import Work, configured, work

FORMAT = 1
APART = 1000
"""Between the seeds of two stages"""
FIELDS = ("surgery", "train")


@dataclass(frozen=True)
class Stage:
    """One stage, resolved: what its model is, how it is trained, and what happens to the model before."""

    recipe: Recipe
    config: TrainConfig
    surgery: Surgery | None = None

    def said(self) -> dict[str, Any]:
        """As stages.json has it, for `staged`."""
        found: dict[str, Any] = {"surgery": self.surgery.said()} if self.surgery is not None else {}
        return found | {"train": self.config.model_dump(mode="json", exclude_defaults=True)}


def read_stages(file: str | Path) -> dict[str, Any]:
    """What a YAML file of stages says. Raises DesignError."""
    try:
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise DesignError(f"cannot read the stages: {error.strerror or error}", file=str(file)) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        raise DesignError(f"not valid YAML: {getattr(error, 'problem', error)}", file=str(file),
                          line=mark.line + 1 if mark else None) from None
    return _whole(found, str(file))


def staged(recipe: Recipe, stages: str | Path | Mapping[str, Any] | Sequence[Any],
           settings: Mapping[str, Any] | None = None) -> list[Stage]:
    """Every stage with its design and configuration, before any is trained.

    stages: a file, what such a file says, or its list alone. settings: fields of TrainConfig for all stages, over the
    file's `train`, under each stage's own. Raises DesignError, which names the stage.
    """
    file = str(stages) if isinstance(stages, (str, Path)) else ""
    raw = read_stages(stages) if isinstance(stages, (str, Path)) else _whole(stages, "")
    common = _merged(raw.get("train") or {}, settings or {})
    found: list[Stage] = []
    try:
        for k, said in enumerate(raw["stages"]):
            found.append(_stage(recipe if not found else found[-1].recipe, said, common, k))
    except DesignError as error:
        raise DesignError(error.message, path=error.path, file=file) from None
    return found


def _whole(raw: Any, file: str) -> dict[str, Any]:
    """The mapping with `stages`, from it or from the list alone."""
    raw = {"stages": list(raw)} if isinstance(raw, (list, tuple)) else raw
    if not isinstance(raw, Mapping) or not isinstance(raw.get("stages"), (list, tuple)) or not raw["stages"]:
        raise DesignError("a training of stages is a mapping with a list of 'stages', e.g. stages: [{train: {steps: "
                          "100}}, {surgery: {kind: grow, factor: 2}, train: {steps: 400}}]", file=file)
    if unknown := sorted(set(raw) - {"stages", "train"}):
        raise DesignError(f"unknown field '{unknown[0]}'.{nearest(unknown[0], ('stages', 'train'))}", file=file)
    for path, said in [("train", raw.get("train") or {})] + [(f"stages.{k}", s) for k, s in enumerate(raw["stages"])]:
        if not isinstance(said, Mapping):
            raise DesignError(f"this is a mapping (got {said!r})", path=path, file=file)
    return dict(raw)


def _stage(recipe: Recipe, said: Mapping[str, Any], common: Mapping[str, Any], k: int) -> Stage:
    path = f"stages.{k}"
    if unknown := sorted(set(said) - set(FIELDS)):
        raise DesignError(f"unknown field '{unknown[0]}'.{nearest(unknown[0], FIELDS)} Fields of the training stand "
                          "under `train`", path=path)
    own = said.get("train") or {}
    if not isinstance(own, Mapping):
        raise DesignError(f"the changes of a stage are a mapping, e.g. {{steps: 1000}} (got {own!r})",
                          path=f"{path}.train")
    if k and own.get("start") is not None:
        raise DesignError("a stage starts from the one before it; leave start out", path=f"{path}.train.start")
    settings = _merged(common, own)
    if settings.get("steps") is None and settings.get("tokens") is None:
        raise DesignError("say how long this stage is: steps or tokens", path=f"{path}.train")
    if k:
        settings.pop("start", None)
        if "seed" not in own:
            settings["seed"] = settings.get("seed", 0) + APART * k
    cut = None
    if said.get("surgery") is not None:
        cut = surgery.load(said["surgery"], f"{path}.surgery")
        try:
            recipe = cut.recipe(recipe)
        except DesignError as error:
            inner = error.path.removeprefix("surgery.") if error.path.startswith("surgery.") else ""
            where = f"{path}.surgery" + (f".{inner}" if inner else "")
            raise DesignError(error.message, path=where) from None
        if k == 0:
            raise DesignError("nothing is trained before the first stage: describe its design in the recipe, or begin "
                              "with train.start in a stage before", path=f"{path}.surgery")
    return Stage(recipe, configured(settings, f"{path}.train"), cut)


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """One mapping over another, field by field; the length is one field, said as steps or as tokens."""
    found = dict(under)
    if over.get("steps") is not None or over.get("tokens") is not None:
        found.pop("steps", None)
        found.pop("tokens", None)
    for name, value in over.items():
        both = isinstance(value, Mapping) and isinstance(found.get(name), Mapping)
        found[name] = _merged(found[name], value) if both else value
    return found


def train_stages(job: Work, stages: Sequence[Stage], directory: str | Path, *, progress: str = "auto",
                 resume: bool = False) -> Result:
    """Train a recipe through its stages -> the result of the last one that was trained.

    It is the last of all unless a stage stopped at its time limit. `resume`: continue if the directory already holds
    this training. Raises as `train_language`.
    """
    directory = Path(directory)
    asked = {
        "format": FORMAT, "name": job.recipe.name, "recipe_id": job.recipe.id, "data": job.data,
        "recipe": job.recipe.dump(), "stages": [stage.said() for stage in stages],
    }
    directory.mkdir(parents=True, exist_ok=True)
    lock = Lock(directory)
    try:
        _claim(directory, asked, resume)
        result: Result | None = None
        for k, stage in enumerate(stages):
            here = directory / f"stage-{k}"
            if (done := record.read_result(here)) is not None and ended(done):
                result = done
                continue
            config, source, begin = stage.config, job.source(stage.config), None
            if k:
                before = directory / f"stage-{k - 1}"
                begin = partial(_begin, stages[k - 1].recipe, stage, source, before)
                # The sums of all stages are those of the first one's threads, whichever session comes to them.
                threads = config.threads or record.read_run(before)["config"]["threads"]
                config = config.model_copy(update={"threads": threads})
            marks = {"index": k, "of": len(stages), "surgery": None if stage.surgery is None else stage.surgery.said()}
            result = run.run_source(stage.recipe, source, config, here, progress, True, begin=begin, stage=marks)
            if not ended(result):
                break
        assert result is not None
        return result
    finally:
        lock.release()


def resume_stages(directory: str | Path, *, time_limit: float | None = None, progress: str = "auto") -> Result:
    """Continue the training of stages in a directory. Raises as `train_language`."""
    directory = Path(directory)
    asked = _read(directory)
    job = work(Recipe.model_validate(asked["recipe"]), asked["data"])
    stages = staged(job.recipe, [_spelled_out(said) for said in asked["stages"]])
    if time_limit is not None:
        stages = [Stage(s.recipe, s.config.model_copy(update={"time_limit": time_limit}), s.surgery) for s in stages]
    return train_stages(job, stages, directory, progress=progress, resume=True)


def _spelled_out(said: dict[str, Any]) -> dict[str, Any]:
    """A stage of stages.json: what is not there is TrainConfig's default, not that of a training by hand."""
    config = TrainConfig.model_validate(said["train"]).model_dump(mode="json")
    return said | {"train": config | {"time_limit": None}}


def ended(result: Result) -> bool:
    """Whether a stage needs no more steps."""
    return result.status == "finished" and (result.step >= result.steps or result.reason == "solved")


def _claim(directory: Path, asked: dict[str, Any], resume: bool) -> None:
    """Write stages.json, or find the same training in it."""
    if (directory / STAGES).exists():
        found = _read(directory)
        if _essence(found) != _essence(asked):
            raise RunExists(f"{directory} already holds another training of stages.",
                            "Give this one another directory, or remove that one.")
        if not resume:
            raise RunExists(f"{directory} already holds this very training, started {found['started']}.",
                            f"Resume it: postformer train --resume {directory}. For a fresh start, give another "
                            "directory or remove this one.")
        return
    if strangers := sorted(p.name for p in directory.iterdir() if not p.name.startswith(".")):
        raise RunExists(f"{directory} is not empty (it has {strangers[0]}) and holds no training of stages.",
                        "Give the training a directory of its own.")
    with space_needed(directory, STAGES):
        started = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(directory / STAGES, {**asked, "command": shlex.join(sys.argv), "started": started})


def _read(directory: Path) -> dict[str, Any]:
    file = directory / STAGES
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"it has format {found['format']}, and this version reads {FORMAT}")
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{file} cannot be read: {error}.", "The training cannot be resumed; each stage-N in it "
                            "still holds a run that can be read.") from error


def _essence(asked: Mapping[str, Any]) -> str:
    stages = [{**said, "train": {k: v for k, v in said["train"].items() if k not in record.INCIDENTAL}}
              for said in asked["stages"]]
    return json.dumps([asked["recipe_id"], asked["data"], stages], sort_keys=True)


def _begin(before: Recipe, stage: Stage, source: Source, directory: Path) -> tuple[nn.Module, list[str]]:
    """The model a stage starts with, inside the source's reading, and what to say about it. Only files are read, so
    that it is the same whether the stage before ran in this session or in another."""
    last = checkpoint.steps(directory / "checkpoints")[-1]
    file = directory / "checkpoints" / f"step-{last}" / checkpoint.WEIGHTS
    model: Any = run.build_model(before, stage.config.seed)
    whole = source.around(model)
    checkpoint.load_weights(whole, file)
    notes = [f"starts from {file}"]
    if stage.surgery is None:
        return whole, notes
    grown = stage.surgery.operate(model)
    after = source.around(grown)
    own = {id(value) for value in grown.state_dict(keep_vars=True).values()}
    trained = whole.state_dict()
    with torch.no_grad():
        for name, value in after.state_dict(keep_vars=True).items():
            if id(value) not in own:  # of the reading, which has weights of its own
                value.copy_(trained[name])
    notes.append(f"surgery: {stage.surgery.in_words()}: {len(before.model.stack)} layers become "
                 f"{len(stage.recipe.model.stack)}, {_params(model)} parameters {_params(grown)}; what stays: "
                 f"{stage.surgery.preserves()}; the optimiser starts afresh")
    return after, notes


def _params(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()):,}"
