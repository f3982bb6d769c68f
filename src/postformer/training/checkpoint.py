"""Checkpoints: a directory with the weights (loadable alone), the optimiser's tensors and the counters.

    step-N/model.safetensors    weights and buffers, by their names in the model
    step-N/train.safetensors    optimiser state, `parameter|state`
    step-N/state.json           step, tokens, ...; size and sha256 of the two files

Written beside its place and renamed, so that a directory called step-N is always whole. Nothing random is stored: all
random numbers of step s are drawn from generators seeded by (seed, s).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from postformer.training.errors import CheckpointError
from postformer.training.files import fsync, space_needed, write_json

WEIGHTS, TRAIN, STATE = "model.safetensors", "train.safetensors", "state.json"
FORMAT = 1


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the model by name; of a tensor with several names (tied weights), the first only."""
    found: dict[str, Tensor] = {}
    seen = set()
    for name, value in model.state_dict().items():
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and key in seen:
            continue
        seen.add(key)
        found[name] = value.detach()
    return found


def load_weights(model: nn.Module, file: str | Path) -> dict[str, str]:
    """Copy the tensors of a weights file into a model of the same design; returns the file's metadata.

    Raises CheckpointError if the file is missing or truncated, or does not fit the model.
    """
    tensors, metadata = read_tensors(Path(file))
    own = weights(model)
    missing, unknown = own.keys() - tensors.keys(), tensors.keys() - own.keys()
    different = [
        f"{name} is {list(tensors[name].shape)} in the file and {list(own[name].shape)} in the model"
        for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape
    ]
    if missing or unknown or different:
        parts = [f"{len(found)} {what} ({', '.join(sorted(found)[:3])})" for found, what in (
            (missing, "tensors are missing"), (unknown, "are unknown to the model"), (different, "differ")) if found]
        raise CheckpointError(f"{file} does not fit this model: {'; '.join(parts)}.",
                              "Load it into the design it was trained with: recipe.yaml beside it says which.")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(tensors[name])
    return metadata


def start_from(model: nn.Module, path: str | Path) -> list[str]:
    """Copy into a model what a run directory, a checkpoint or a weights file has under the same names -> what was and
    was not, in words.

    Raises CheckpointError, before anything is changed, if nothing fits or a tensor has another shape.
    """
    file = _weights_of(Path(path))
    tensors, own = read_tensors(file)[0], weights(model)
    shared = [name for name in own if name in tensors]
    different = [f"{name} is {list(tensors[name].shape)} there and {list(own[name].shape)} here" for name in shared
                 if own[name].shape != tensors[name].shape]
    if different:
        raise CheckpointError(
            f"{file} cannot be the start of this model: {len(different)} tensors differ ({'; '.join(different[:3])}).",
            "Give this run the vocabulary, width and layers of that one, or leave train.start out.")
    if not shared:
        raise CheckpointError(f"{file} has no tensor of this model: it holds {', '.join(sorted(tensors)[:3])}.",
                              "Start from a run of the same kinds of memory, or leave train.start out.")
    with torch.no_grad():
        for name in shared:
            own[name].copy_(tensors[name])
    notes = [f"{len(shared)} of {len(own)} tensors start from {file}"]
    for what, names in (("stay as the seed drew them", own.keys() - tensors.keys()),
                        ("of that file have no place here", tensors.keys() - own.keys())):
        if names:
            notes.append(f"{len(names)} tensors {what}: {', '.join(sorted(names)[:3])}{', ...' * (len(names) > 3)}")
    return notes


def _weights_of(path: Path) -> Path:
    """The weights file of a run directory (newest checkpoint) or of a checkpoint; a file as it is."""
    if path.is_file():
        return path
    if (path / WEIGHTS).exists():
        return path / WEIGHTS
    found = steps(path / "checkpoints")
    if not found:
        what = f"holds neither a checkpoint nor {WEIGHTS}" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}.",
                              "Give train.start a run directory that training wrote to, or a weights file.")
    return path / "checkpoints" / f"step-{found[-1]}" / WEIGHTS


def save_weights(model: nn.Module, file: Path, metadata: Mapping[str, str]) -> None:
    """Write the weights of a model as safetensors (without further care for crashes)."""
    # Clones: safetensors refuses views of one storage, and reads devices other than the CPU one by one.
    tensors = {name: value.to("cpu", copy=True).contiguous() for name, value in weights(model).items()}
    save_file(tensors, file, metadata={"format": "pt", **metadata})


def save(directory: Path, step: int, model: nn.Module, optimiser: Mapping[str, Tensor], state: Mapping[str, Any],
         metadata: Mapping[str, str] | None = None, keep: int = 2) -> Path:
    """Write checkpoint `step` under directory and drop all but the newest `keep`.

    Raises DiskFull (earlier checkpoints stay).
    """
    final, temporary = directory / f"step-{step}", directory / f".step-{step}.tmp"
    with space_needed(directory, f"checkpoint step-{step}"):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            save_weights(model, temporary / WEIGHTS, metadata or {})
            tensors = {name: value.to("cpu").contiguous() for name, value in optimiser.items()}
            save_file(tensors, temporary / TRAIN, metadata={"format": "pt"})
            files = {}
            for name in (WEIGHTS, TRAIN):
                fsync(temporary / name)
                files[name] = {"bytes": (temporary / name).stat().st_size, "sha256": _digest(temporary / name)}
            write_json(temporary / STATE, {"format": FORMAT, "step": step, **state, "files": files})
            for name in files:  # safetensors makes them readable for the owner only
                shutil.copymode(temporary / STATE, temporary / name)
            fsync(temporary)
            if final.exists():  # the same step again, after a resume without new steps
                shutil.rmtree(final)
            temporary.rename(final)
            fsync(directory)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    for old in steps(directory)[:-keep]:
        shutil.rmtree(directory / f"step-{old}", ignore_errors=True)
    return final


def steps(directory: Path) -> list[int]:
    """Steps with a checkpoint, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(m[1]) for path in directory.iterdir() if (m := re.fullmatch(r"step-(\d+)", path.name)))


def load(path: Path, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Copy the weights into the model -> (optimiser tensors, state).

    Everything is checked before anything is changed. Raises CheckpointError naming the file and what else can be used.
    """
    state = read_state(path)
    for name, wanted in state["files"].items():
        file = path / name
        size = file.stat().st_size if file.exists() else None
        if size != wanted["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes instead of {wanted['bytes']} (truncated)"
            raise CheckpointError(f"{file} {found}.", _older(path))
        if _digest(file) != wanted["sha256"]:
            raise CheckpointError(f"{file} has changed since it was written (its sha256 differs).", _older(path))
    optimiser, _ = read_tensors(path / TRAIN)
    load_weights(model, path / WEIGHTS)
    return optimiser, state


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint, checked."""
    file = path / STATE
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        version, _, _ = state["format"], state["step"], state["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else "cannot be read (truncated or altered)"
        raise CheckpointError(f"{file} {what}.", _older(path)) from error
    if version != FORMAT:
        raise CheckpointError(f"{file} has format {version}; this version reads {FORMAT}.",
                              "Resume the run with the version of postformer that wrote it.")
    return state


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises CheckpointError if it is missing or broken."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"{file} does not exist.", _older(file.parent)) from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}.", _older(file.parent)) from error


def _older(path: Path) -> str:
    match = re.fullmatch(r"step-(\d+)", path.name)
    others = [s for s in steps(path.parent) if not match or s != int(match[1])]
    whole = []
    for step in others:
        with contextlib.suppress(OSError, ValueError, KeyError):
            state = json.loads((path.parent / f"step-{step}" / STATE).read_text(encoding="utf-8"))
            if all((path.parent / f"step-{step}" / n).stat().st_size == f["bytes"] for n, f in state["files"].items()):
                whole.append(step)
    if not whole:
        return "There is no other whole checkpoint beside it: start the run again in a new directory."
    return (f"Use the checkpoint {path.parent / f'step-{whole[-1]}'} instead: move {path.name} out of "
            f"{path.parent.name}/ and resume; the steps since then are computed again, to the same result.")


def _digest(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
