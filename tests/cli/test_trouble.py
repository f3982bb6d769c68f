"""Whose an error is, what is said about it, and the machine's line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from postformer.cli import console, trouble

PLUGIN = '''
def wrong(text):
    raise ValueError(text)

def library(text):
    import json
    json.loads(text)
'''


@pytest.fixture
def plugin(tmp_path):
    """A user's module, in a directory that is called as we are."""
    folder = tmp_path / "postformer"
    folder.mkdir()
    file = folder / "theirs.py"
    file.write_text(PLUGIN)
    space = {}
    exec(compile(PLUGIN, str(file), "exec"), space)
    return file, space


def verb(action):
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def only(json: console.Json = False) -> None:
        action()
    return app


@pytest.mark.parametrize("name", ["wrong", "library"])
def test_an_error_of_a_users_code_is_not_called_wrong_input_nor_ours(plugin, monkeypatch, capsys, name):
    file, space = plugin
    monkeypatch.setattr(sys, "argv", ["postformer", "--json"])
    with pytest.raises(ValueError), trouble.guarded():  # noqa: PT011 - its text is another's
        space[name]("not what it seems")
    out, err = capsys.readouterr()
    line = 3 if name == "wrong" else 7
    assert f"{file}:{line} raised" in err
    assert "postformer's own" not in err
    assert json.loads(out)["exit_code"] == 1


def test_an_error_of_our_own_is_called_so(monkeypatch, capsys):
    monkeypatch.setattr(console, "plain", None)
    with pytest.raises(TypeError), trouble.guarded():
        console.finish({}, True)
    assert "error of postformer's own" in capsys.readouterr().err


def test_a_value_error_of_ours_is_wrong_input(capsys):
    from postformer.sampling import Policy

    with pytest.raises(SystemExit) as caught, trouble.guarded():
        Policy(-1)
    assert caught.value.code == 2
    assert "temperature" in capsys.readouterr().err


def test_a_type_error_that_a_check_of_ours_raises_is_wrong_input(capsys):
    from postformer.design import Design, register

    with pytest.raises(SystemExit) as caught, trouble.guarded():
        register(Design)(int)
    assert caught.value.code == 2
    assert "names no kind" in capsys.readouterr().err


def test_a_failure_ends_with_json(inside):
    for args, code, words in ((("explain", "nowhere.yaml"), 2, "nowhere.yaml"), (("train",), 2, "name a recipe"),
                              (("train", "transformer", "--colour"), 2, "--colour"), (("nothing",), 2, "nothing")):
        done = inside(*args, "--json")
        assert (done.code, done.json["exit_code"]) == (code, code)
        assert words in done.json["error"]
        assert done.err
        assert inside(*args).out == ""


def test_numbers_that_json_does_not_have(capsys):
    console.finish({"a": float("inf"), "b": [float("nan"), 1.5, {2: Path("x")}], "c": True}, True)
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "a": None, "b": [None, 1.5, {"2": "x"}], "c": True}


def test_interrupting_is_said_and_has_its_code(inside):
    def stop():
        raise KeyboardInterrupt

    done = inside("--json", verbs=verb(stop))
    assert (done.code, done.json) == (130, {"error": "interrupted", "exit_code": 130})


def test_help_lists_every_exit_code(inside):
    done = inside("--help")
    assert done.code == 0
    for code in ("0 done", "1 an unexpected error", "2 wrong", "3 not", "4 out", "5 disk", "6 bad", "7 a check", "130"):
        assert code in " ".join(done.out.split())


@pytest.mark.skipif(os.name == "nt", reason="pipes of another kind")
@pytest.mark.parametrize("args", [("--help",), ("list",), ("explain", "gated-deltanet", "--json")])
def test_a_reader_that_has_gone_is_no_failure(args):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "postformer", *args], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(os.name == "nt", reason="pipes of another kind")
def test_nobody_reads_errors_either(tmp_path):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "postformer", "explain", "nowhere", "--json"], stdout=write,
                          stderr=write, cwd=tmp_path)
    os.close(write)
    assert done.returncode == 2


@pytest.mark.skipif(os.name == "nt", reason="signals of another kind")
def test_an_interrupted_training_says_so_once(text, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "postformer", "train", "transformer", "--width", "32", "--layers", "1", "--data",
         str(text), "--out", "run", "-s", "train.steps=100000", "-s", "train.length=32", "--json"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "POSTFORMER_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"})
    metrics, began = tmp_path / "run" / "metrics.jsonl", time.monotonic()
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() - began < 60:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.count("Resume with") == 1, err
    assert json.loads(out.splitlines()[-1])["exit_code"] == 130
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "interrupted"
