"""Every verb, through the process a user starts."""

import re
import resource
import subprocess
import sys

import pytest

SMALL = ("-s", "train.batch_size=4", "-s", "train.length=32", "-s", "train.steps=12", "-s", "train.checkpoint_every=5")


def test_help_is_instant():
    best = min(_seconds([sys.executable, "-m", "postformer", "--help"]) for _ in range(5))
    assert best < 0.45, f"--help took {best:.2f} s"  # 0.2 s of an idle core; the suite shares its cores


def _seconds(command):
    """Of processor time: the wall clock would measure what else runs."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_imports_nothing_heavy():
    code = ("import sys, postformer.cli.main;"
            "print([m for m in ('torch', 'numpy', 'pydantic', 'yaml') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_verb_has_help(cli):
    listed = re.findall(r"^│ (\w+)  ", cli("--help").out, re.M)
    assert set(listed) >= {"demo", "list", "explain", "verify", "train", "generate", "report", "doctor"}
    for verb in ("train", "verify"):
        assert "--json" in cli(verb, "--help").out


def test_list(cli):
    done = cli("list", "--json")
    assert done.code == 0
    assert len(done.json["recipes"]) >= 19
    assert "matrix" in done.json["kinds"]
    assert "parity" in done.json["tasks"]


def test_explain(cli):
    done = cli("explain", "gated-deltanet", "--json")
    assert done.code == 0
    assert "@article{" in done.out
    assert done.json["memories"]["memory"]["loss"] == "l2"
    small = cli("explain", "gated-deltanet", "--width", "64", "--layers", "2", "--json").json
    assert small["params"] < done.json["params"] / 10
    attention = cli("explain", "transformer", "--json").json["state_bytes"]
    assert attention["8192"] > 60 * attention["128"]
    assert "linear maps" not in done.out
    assert "linear maps: projection ternary; gate ternary" in cli("explain", "matmul-free").out


def test_explain_shows_depth(cli):
    where = "model.layers.memory/feedforward.1.depth"
    done = cli("explain", "gated-deltanet", "-s", f"{where}={{kind: mod, capacity: 0.25}}", "--json")
    assert "feedforward (swiglu) [run by 0.25 of tokens, skip: freeze]" in done.out
    assert "mod at its capacity" in done.out
    (depth,) = done.json["depth"].values()
    assert depth["capacity"] == 0.25
    plain = cli("explain", "gated-deltanet", "--json")
    assert plain.json["depth"] == {}
    assert "at its capacity" not in plain.out
    assert done.json["flops_per_token"]["128"] < 0.8 * plain.json["flops_per_token"]["128"]


def test_verify_passes_and_fails_with_its_own_code(cli, tmp_path):
    done = cli("verify", "gla", "--only", "causal", "--json")
    assert done.code == 0
    assert done.json["passed"] is True
    (tmp_path / "sitecustomize.py").write_text(FAULTY, encoding="utf-8")
    (tmp_path / "faulty.yaml").write_text("name: faulty\nmodel: {width: 32, memory: {kind: faulty}, num_layers: 1}\n")
    done = cli("verify", "faulty.yaml", "--json", PYTHONPATH=str(tmp_path))
    assert done.code == 7
    assert "causal" in "".join(c["name"] for r in done.json["recipes"] for c in r["checks"] if c["passed"] is False)


FAULTY = """
import sys
if "verify" in sys.argv:
    from typing import Literal
    from postformer.contract.mixer import Mixer, Out
    from postformer.design import Design, register

    class FaultyDesign(Design):
        kind: Literal["faulty"] = "faulty"

    @register(FaultyDesign)
    class Faulty(Mixer):
        def __init__(self, design, site):
            super().__init__()
            self.out = site.linear("out", site.width, site.dim_out)
        def mix(self, x, state, ctx):
            return Out(self.out(x + x.mean(1, keepdim=True)))
"""


def test_train_generate_report(cli, text, tmp_path):
    done = cli("train", "gated-deltanet", "--width", "32", "--layers", "2", "--data", text, "--out", "run", *SMALL,
               "--json")
    assert done.code == 0, done.err
    assert done.json["status"] == "finished"
    assert done.json["validation"]["bits_per_byte"] < 8
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 12
    made = cli("generate", "run", "--prompt", "line", "--tokens", "20", "--json")
    assert made.code == 0
    assert made.out.startswith("line")
    again = cli("generate", "run", "--prompt", "line", "--tokens", "20", "--json")
    assert again.json["text"] == made.json["text"]
    page = cli("report", "run", "--json")
    assert page.code == 0
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "gated-deltanet" in html
    assert "<svg" in html


def test_train_a_task(cli, tmp_path):
    done = cli("train", "deltaproduct", "--width", "32", "--layers", "1", "--data", "task:group-s3", "--out", "run",
               *SMALL, "--json")
    assert done.code == 0, done.err
    assert any("accuracy" in k for k in str(done.json["validation"]).split("'"))


def test_dry_run_trains_nothing(cli, text, tmp_path):
    done = cli("train", "mamba2", "--width", "32", "--layers", "2", "--data", text, "--out", "run", "--dry-run", *SMALL,
               "--json")
    assert done.code == 0, done.err
    assert done.json["params"] > 10_000
    assert not (tmp_path / "run").exists()


def test_resume_by_the_command_that_the_message_names(cli, text, tmp_path):
    args = ("train", "transformer", "--width", "32", "--layers", "1", "--data", text, "--out", "run", *SMALL)
    assert cli(*args, "-s", "train.time_limit=0.01").code in (0, 130)
    done = cli("train", "--resume", "run", "--json")
    assert done.code == 0, done.err
    assert done.json["status"] == "finished"


@pytest.mark.slow
def test_doctor(cli):
    done = cli("doctor", "--json")
    assert done.code == 0
    assert done.json["self_test"] is True
