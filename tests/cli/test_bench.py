"""postformer bench through the command line, at tiny sizes."""

import json
from pathlib import Path

import pytest

from postformer.kernels import native

pytestmark = pytest.mark.skipif(native.native().library is None, reason="no compiled kernels here")
TINY = [part for change in (
    "seconds=0.05", "threads=[1]", "kernels={batch: 1, length: 20, heads: 1, dim: 8, rounds: 2, cases: [scan, add]}",
    "lengths={recipes: [mamba2], tokens: [16, 32], width: 16, rounds: 1}") for part in ("-s", change)]


def bench(inside, *args):
    return inside("bench", "kernels", "lengths", *TINY, "--quiet", *args)


def test_measure_keep_and_check(inside, tmp_path):
    done = bench(inside, "--keep", "--last", "kept/last.json", "--json")
    assert done.code == 0, done.err
    assert {"kernels", "lengths", "ratios", "rates", "report"} <= set(done.json)
    assert "training" not in done.json
    for word in ("of the floor", "compiled (scan_backward, scan_forward)", "exponent", "matrix product"):
        assert word in done.out
    written = json.loads((tmp_path / "runs/bench/bench.json").read_text())
    assert written["kernels"] == done.json["kernels"]
    page = (tmp_path / "runs/bench/report.html").read_text(encoding="utf-8")
    assert "Elementwise scan" in page
    assert "Time against length" in page
    kept = json.loads((tmp_path / "kept/last.json").read_text())
    assert set(kept["ratios"]) == set(done.json["ratios"])
    assert kept["command"].startswith("postformer bench kernels lengths")

    low = {name: value / 1000 for name, value in kept["ratios"].items()}
    (tmp_path / "low.json").write_text(json.dumps(kept | {"ratios": low}))
    done = bench(inside, "--check", "--last", "low.json")
    assert done.code == 0, done.err
    assert f"{len(low)} ratios compared, 0 fell" in done.out

    name = next(iter(kept["ratios"]))
    high = low | {name: 1e6}
    (tmp_path / "high.json").write_text(json.dumps(kept | {"ratios": high}))
    done = bench(inside, "--check", "--keep", "--last", "high.json", "--json")
    assert done.code == 7
    assert f"FELL {name}" in done.out
    assert list(done.json["check"]["fallen"]) == [name]
    assert json.loads((tmp_path / "high.json").read_text())["ratios"] == high  # a failed check keeps nothing


def test_what_it_refuses_before_it_measures(inside):
    for args, words in ((("--check",), "benchmarks/bench.json does not exist"), (("--device", "tpu"), "device"),
                        (("-s", "kernels.size=3"), "kernels.size"), (("speed",), "no part 'speed'")):
        done = inside("bench", *args)
        assert done.code == 2, done.err
        assert words in done.err
        assert "Traceback" not in done.err


def test_a_fallback_has_an_exit_code_of_its_own(inside, monkeypatch):
    gone = native.Native(None, "no compiler, says the test")
    monkeypatch.setattr(native, "native", lambda: gone)
    monkeypatch.setattr(native, "_built", lambda: False)
    monkeypatch.setattr("postformer.study.bench.backend.native", lambda: gone)
    done = inside("bench", "kernels", *TINY, "--quiet", "--keep", "--last", "last.json", "--json")
    assert done.code == 7
    assert "no compiler, says the test" in done.out
    assert len(done.json["failures"]) == 2
    assert "did not finish" in Path(done.json["report"]).read_text(encoding="utf-8")
    assert "last.json is left as it was" in done.err
