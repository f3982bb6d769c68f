"""Wrong input: one clear line with the remedy, the documented exit code, nothing lost."""

import shutil

import pytest

SMALL = ("-s", "train.batch_size=4", "-s", "train.length=32", "-s", "train.steps=6", "-s", "train.checkpoint_every=3")
TINY = ("--width", "32", "--layers", "1")


def one_line(done, code, *words):
    assert done.code == code, (done.code, done.err)
    lines = [line for line in done.err.strip().splitlines() if line.startswith("postformer: ")]
    assert len(lines) == 1, done.err
    assert "Traceback" not in done.err
    for word in words:
        assert word in lines[0], lines[0]


def recipe(tmp_path, memory="{kind: attention}", width=32):
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\nmodel:\n  width: {width}\n  mixers:\n    memory: {memory}\n  stack: [memory]\n")
    return path


@pytest.mark.parametrize(("memory", "words"), [
    ("{kind: attention, windw: 5}", ["mine.yaml:5", "model.mixers.memory.windw", "5", "Did you mean 'window'?"]),
    ("{kind: attentoin}", ["Did you mean 'attention'?"]),
    ("{kind: matrix, loss: l2}", ["l2norm"]),
    ("{kind: matrix, loss: l3}", ["'l3'", "Allowed: dot, l2"]),
    ("{kind: attention, window: -1}", ["window", "greater than or equal to 1"]),
    ("{kind: attention, heads: {query: 5}}", ["32", "5"]),
])
def test_wrong_recipe(cli, tmp_path, memory, words):
    one_line(cli("explain", recipe(tmp_path, memory)), 2, *words)


def test_missing_recipe(cli):
    one_line(cli("explain", "gated-deltane"), 2, "Did you mean 'gated-deltanet'?")
    one_line(cli("explain", "nowhere.yaml"), 2, "nowhere.yaml")


def test_missing_and_empty_data(cli, tmp_path):
    one_line(cli("train", "transformer", *TINY, "--data", "nowhere.txt", *SMALL), 2, "nowhere.txt")
    (tmp_path / "empty.txt").write_text("")
    one_line(cli("train", "transformer", *TINY, "--data", "empty.txt", *SMALL), 2, "empty")


def test_corpus_shorter_than_a_sequence(cli, tmp_path):
    (tmp_path / "short.txt").write_text("a few\nwords\nonly\n" * 12)
    done = cli("train", "transformer", *TINY, "--data", "short.txt", *SMALL, "-s", "train.length=4096")
    one_line(done, 2, "4,096", "larger corpus")


def test_wrong_training_setting(cli, text):
    one_line(cli("train", "transformer", *TINY, "--data", text, *SMALL, "-s", "train.batchsize=3"), 2, "batchsize")


def test_truncated_checkpoint_keeps_the_older_one(cli, text, tmp_path):
    assert cli("train", "transformer", *TINY, "--data", text, "--out", "run", *SMALL).code == 0
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir(), key=lambda p: int(p.name.split("-")[1]))[-1]
    weights = newest / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    one_line(cli("generate", "run"), 6, "model.safetensors")
    shutil.rmtree(newest)
    assert cli("generate", "run", "--tokens", "3").code == 0


def test_a_directory_with_another_run_is_refused(cli, text, tmp_path):
    assert cli("train", "transformer", *TINY, "--data", text, "--out", "run", *SMALL).code == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    one_line(cli("train", "mamba2", *TINY, "--data", text, "--out", "run", *SMALL), 2, "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_full_disk(cli, text, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(FULL, encoding="utf-8")
    done = cli("train", "transformer", *TINY, "--data", text, "--out", "run", *SMALL, PYTHONPATH=str(tmp_path))
    one_line(done, 5, "no space left", "Free some space", "intact")


FULL = """
import errno, sys
if "train" in sys.argv:
    import safetensors.torch

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")
    safetensors.torch.save_file = full
"""
