"""A run that is killed and resumed is the run that was never stopped, bit for bit."""

import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import session
import torch
from fake import FakeModel
from safetensors.torch import load_file

from postformer.objective import NextToken
from postformer.training import Interrupted, TrainConfig, Trainer, checkpoint, metrics


@pytest.fixture(scope="module")
def processes():
    """Start sessions as processes of their own, forked from one that has imported everything (which takes seconds)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["session"])
    path = [str(Path(__file__).parent), *filter(None, sys.path)]
    with pytest.MonkeyPatch.context() as patch:  # Python 3.11's server takes its path from the environment only
        patch.setenv("PYTHONPATH", os.pathsep.join(path))
        multiprocessing.forkserver.ensure_running()

    def start(directory, kind, pause=0.0):
        process = context.Process(target=session.main, args=(directory, kind, pause))
        process.start()
        return process

    return start


def wait_for(directory, step, process):
    """Until the run has written a line for this step."""
    file = directory / "metrics.jsonl"
    while process.is_alive():
        if file.exists() and file.read_text().count("\n") >= step:
            return
        time.sleep(0.002)


def bits(directory):
    folder = directory / "checkpoints" / "step-30"
    return {f"{file}:{name}": tensor.numpy().tobytes()
            for file in ("model.safetensors", "train.safetensors") for name, tensor in load_file(folder / file).items()}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_killed_at_random_steps(tmp_path, processes, kind):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    first = processes(whole, kind)
    for step in sorted(random.Random(kind).sample(range(2, 29), 3)):
        process = processes(broken, kind, 0.01)
        wait_for(broken, step, process)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    last = processes(broken, kind)
    for process in (first, last):
        process.join()
        assert process.exitcode == 0
    assert bits(whole) == bits(broken)
    a, b = (metrics.read(d / "metrics.jsonl") for d in (whole, broken))
    assert [line["step"] for line in b] == list(range(1, 31))
    timeless = [[{k: v for k, v in line.items() if k not in ("elapsed_s", "tokens_per_s")} for line in x]
                for x in (a, b)]
    assert timeless[0] == timeless[1]


def test_kill_while_a_checkpoint_is_written_leaves_the_old_one(tmp_path, batch_at):
    (tmp_path / "checkpoints" / ".step-8.tmp").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-8.tmp" / "model.safetensors").write_bytes(b"half")
    assert checkpoint.steps(tmp_path / "checkpoints") == []
    config = TrainConfig(steps=12, checkpoint_every=4)
    trainer = Trainer(FakeModel(), NextToken(), batch_at, config, directory=tmp_path, progress="quiet")
    assert not trainer.restore()
    trainer.train()
    assert checkpoint.steps(tmp_path / "checkpoints") == [8, 12]  # and only the newest two are kept
    assert not (tmp_path / "checkpoints" / ".step-8.tmp").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_resume(tmp_path, processes, number):
    process = processes(tmp_path, "adamw", 0.05)
    wait_for(tmp_path, 3, process)
    os.kill(process.pid, number)
    process.join()
    out = (tmp_path / "message").read_text()
    step = checkpoint.steps(tmp_path / "checkpoints")[-1]
    assert process.exitcode == 130
    assert f"stopped at step {step} of 30" in out
    assert f"--resume {tmp_path}" in out
    assert len(metrics.read(tmp_path / "metrics.jsonl")) == step


def test_interrupt_in_this_process_restores_the_handlers(tmp_path, batch_at):
    def interrupting(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return batch_at(step)

    before = signal.getsignal(signal.SIGINT)
    trainer = Trainer(FakeModel(), NextToken(), interrupting, TrainConfig(steps=9), directory=tmp_path,
                      progress="quiet")
    with pytest.raises(Interrupted, match="step 3 of 9"):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_line_cut_short_and_lines_after_the_checkpoint_are_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": s, "tokens_per_s": 1.0}) + "\n" for s in range(1, 7)) + '{"step": 7, ')
    opened = metrics.MetricsFile(file, 4)
    opened.append({"step": 5, "tokens_per_s": 2.0})
    assert opened.speeds == [1.0] * 4 + [2.0]
    opened.close()
    assert [line["step"] for line in metrics.read(file)] == [1, 2, 3, 4, 5]


def test_the_random_numbers_of_the_caller_are_left_alone(batch_at):
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    Trainer(FakeModel(), NextToken(), batch_at, TrainConfig(steps=2), progress="quiet").train()
    assert torch.equal(torch.rand(2), wanted)


def test_dropout_resumes_too(tmp_path, batch_at):
    class Dropping(FakeModel):
        def forward(self, tokens, *args, **kwargs):
            out = super().forward(tokens, *args, **kwargs)
            return out._replace(logits=torch.nn.functional.dropout(out.logits, 0.2, self.training))

    def trainer(directory, steps):
        directory.mkdir(exist_ok=True)
        config = TrainConfig(steps=6, schedule={"kind": "constant"}, checkpoint_every=1)
        made = Trainer(Dropping(), NextToken(), batch_at, config, directory=directory, progress="quiet")
        made.restore()
        made.steps = steps
        made.train()
        return made.model

    trainer(tmp_path / "a", 3)
    torch.rand(100)
    a, b = trainer(tmp_path / "a", 6), trainer(tmp_path / "b", 6)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
