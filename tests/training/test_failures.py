"""Whatever stops a run: one clear error with a remedy, and nothing that was saved is lost."""

import errno
import json

import pytest
import torch
from fake import FakeModel
from torch import nn

from postformer.objective import NextToken
from postformer.training import (
    CheckpointError,
    DiskFull,
    Diverged,
    OutOfMemory,
    RunExists,
    TrainConfig,
    Trainer,
    checkpoint,
    load_weights,
)
from postformer.training.files import Lock


def trainer(directory, batch_at, model=None, **changes):
    config = TrainConfig(**{"steps": 6, "batch_size": 4, "checkpoint_every": 2} | changes)
    return Trainer(model or FakeModel(), NextToken(), batch_at, config, directory=directory, progress="quiet")


class Breaking(FakeModel):
    """Does something to the loss of one step."""

    def __init__(self, step, what):
        super().__init__()
        self.at, self.what, self.step = step, what, 0

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        self.step += 1
        return self.what(out) if self.step == self.at else out


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run(tmp_path, batch_at, value):
    model = Breaking(4, lambda out: out._replace(logits=out.logits * value))
    run = trainer(tmp_path, batch_at, model)
    with pytest.raises(Diverged) as caught:
        run.train()
    text = str(caught.value)
    assert "step 4" in text
    assert "learning rate" in text
    assert "last gradient norm" in text
    assert str(tmp_path / "checkpoints" / "step-2") in text
    assert "smaller learning rate" in caught.value.remedy
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert checkpoint.steps(tmp_path / "checkpoints") == [2]


def test_a_gradient_that_is_no_number_stops_the_run(tmp_path, batch_at):
    def poison(out):
        out.logits.register_hook(lambda g: g * float("inf"))
        return out

    with pytest.raises(Diverged, match="gradient's norm"):
        trainer(tmp_path, batch_at, Breaking(1, poison)).train()


@pytest.mark.parametrize("error", [
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
])
def test_out_of_memory_names_the_remedies(tmp_path, batch_at, error):
    def fail(out):
        raise error

    with pytest.raises(OutOfMemory) as caught:
        trainer(tmp_path, batch_at, Breaking(1, fail)).train()
    for remedy in ("accumulate=2", "gradient_checkpointing", "bfloat16", "batch_size"):
        assert remedy in caught.value.remedy


def test_other_errors_are_not_called_out_of_memory(tmp_path, batch_at):
    def fail(out):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        trainer(tmp_path, batch_at, Breaking(1, fail)).train()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   RuntimeError("I/O error: No space left on device (os error 28)")])
def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path, batch_at, monkeypatch, error):
    original, calls = checkpoint.save_file, []

    def save_file(tensors, file, metadata=None):
        calls.append(file)
        if len(calls) == 4:  # the optimiser state of the second checkpoint
            file.write_bytes(b"half")
            raise error
        original(tensors, file, metadata=metadata)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(DiskFull, match="no space left") as caught:
        trainer(tmp_path, batch_at).train()
    assert "resume" in caught.value.remedy
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-2"]
    monkeypatch.undo()
    again = trainer(tmp_path, batch_at)
    assert again.restore()
    assert again.position.step == 2
    again.train()
    assert checkpoint.steps(tmp_path / "checkpoints") == [4, 6]


def test_a_full_disk_while_metrics_are_written(tmp_path, batch_at, monkeypatch):
    run = trainer(tmp_path, batch_at)
    original = json.dumps

    def full(value, **options):
        if isinstance(value, dict) and value.get("step") == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(value, **options)

    monkeypatch.setattr("postformer.training.metrics.json.dumps", full)
    with pytest.raises(DiskFull, match="metrics"):
        run.train()


@pytest.mark.parametrize("file", ["model.safetensors", "train.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncate", "remove", "flip"])
def test_a_damaged_checkpoint_is_named_and_an_older_one_offered(tmp_path, batch_at, file, damage):
    trainer(tmp_path, batch_at).train()
    path = tmp_path / "checkpoints" / "step-6" / file
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(content[:len(content) // 2])
    else:
        path.write_bytes(b"\xff" + content[1:])
    again = trainer(tmp_path, batch_at, model=FakeModel(seed=1))
    before = [p.clone() for p in again.model.parameters()]
    with pytest.raises(CheckpointError) as caught:
        again.restore()
    assert str(path) in str(caught.value)
    assert str(tmp_path / "checkpoints" / "step-4") in caught.value.remedy
    assert all(torch.equal(a, b) for a, b in zip(before, again.model.parameters()))
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    (tmp_path / "checkpoints" / "step-6").rename(tmp_path / "aside")
    assert again.restore()
    assert again.position.step == 4


def test_a_checkpoint_of_another_design(tmp_path, batch_at):
    trainer(tmp_path, batch_at).train()
    with pytest.raises(CheckpointError, match="does not fit this model"):
        trainer(tmp_path, batch_at, model=FakeModel(width=8)).restore()


def test_weights_load_alone_and_tied_ones_are_stored_once(tmp_path, batch_at):
    run = trainer(tmp_path, batch_at)
    run.train()
    other = FakeModel(seed=5)
    load_weights(other, tmp_path / "checkpoints" / "step-6" / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), other.parameters()))
    assert other.head.weight is other.embedding.weight
    assert "head.weight" not in checkpoint.weights(other)


def test_two_processes_do_not_train_in_one_directory(tmp_path):
    lock = Lock(tmp_path)
    with pytest.raises(RunExists, match="another process"):
        Lock(tmp_path)
    lock.release()
    Lock(tmp_path).release()


def test_nothing_to_train(batch_at):
    model = FakeModel().requires_grad_(False)
    with pytest.raises(ValueError, match="requires_grad"):
        Trainer(model, NextToken(), batch_at, TrainConfig(steps=1))


def test_a_time_limit_ends_a_session_and_saves(tmp_path, batch_at):
    run = trainer(tmp_path, batch_at, time_limit=1e-6)
    assert run.train().stopped == "time limit"
    assert checkpoint.steps(tmp_path / "checkpoints") == [1]
    again = trainer(tmp_path, batch_at)
    again.restore()
    assert again.train().stopped == "finished"
    assert again.position.step == 6


def test_checkpoints_by_the_clock_where_no_number_of_steps_is_given(tmp_path, batch_at, monkeypatch):
    monkeypatch.setattr("postformer.training.trainer.CHECKPOINT_SECONDS", 0.0)
    trainer(tmp_path, batch_at, checkpoint_every=None).train()
    assert checkpoint.steps(tmp_path / "checkpoints") == [5, 6]


def test_frozen_parameters_stay(batch_at):
    model = FakeModel()
    model.inner.weight.requires_grad_(False)
    before = model.inner.weight.clone()
    Trainer(model, NextToken(), batch_at, TrainConfig(steps=2), progress="quiet").train()
    assert torch.equal(model.inner.weight, before)
    assert isinstance(model.inner, nn.Linear)
