"""The bench at tiny sizes: what it writes, what fails it, and when ratios have fallen."""

import importlib.metadata
import json
import math

import jsonschema
import pytest
import torch

from postformer.design import names
from postformer.kernels import native
from postformer.study import bench
from postformer.study.bench import backend, check, clock, decoding, kernels, models, peers

TINY = ["seconds=0.05", "threads=[1]", "kernels={batch: 1, length: 20, heads: 1, dim: 8, rounds: 2}",
        "lengths={recipes: [mamba2], tokens: [16, 32, 64], width: 16, rounds: 2}",
        "training={recipes: [mamba2], batch: 1, length: 16, short: 8, width: 64, layers: 1, rounds: 2}",
        "decoding={recipes: [transformer, mamba2], contexts: [70, 300], peer_context: 70, tokens: 3, width: 64, "
        "layers: 1, rounds: 2}"]
COMPILED = pytest.mark.skipif(native.native().library is None, reason="no compiled kernels here")

NUMBER = {"type": "number", "exclusiveMinimum": 0}
SIDE = {"oneOf": [
    {"type": "object", "required": ["min", "median", "rounds", "backend"],
     "properties": {"min": NUMBER, "median": NUMBER, "rounds": {"type": "integer", "minimum": 1},
                    "backend": {"type": "string", "minLength": 4}}},
    {"type": "object", "required": ["absent"], "properties": {"absent": {"type": "string", "minLength": 4}}}]}
COMPARED = {"type": "object", "required": ["sides", "ratios"], "properties": {
    "sides": {"type": "object", "required": ["ours"], "additionalProperties": SIDE},
    "ratios": {"type": "object", "additionalProperties": NUMBER}, "share": NUMBER}}


def rows(*more, **properties):
    return {"type": "array", "minItems": 1, "items": {
        "allOf": [{"type": "object", "required": [*properties], "properties": properties}, *more]}}


SCHEMA = {"type": "object", "required": [
    "schema", "kind", "title", "command", "started", "ended", "environment", "config", "threads", "peers", "rates",
    "kernels", "lengths", "training", "decoding", "failures"],
    "properties": {
        "schema": {"const": 1}, "kind": {"const": "bench"}, "failures": {"type": "array"},
        "environment": {"type": "object", "required": ["processor", "cores", "torch", "compiled kernels", "gpu"],
                        "additionalProperties": {"type": "string"}},
        "rates": {"type": "object", "minProperties": 1, "additionalProperties": {
            "type": "object", "required": ["gemm_flops_per_s", "copy_bytes_per_s"], "additionalProperties": NUMBER}},
        "kernels": rows(COMPARED, case={"type": "string"}, threads={"type": "integer"}, floor={"type": "object"},
                        share=NUMBER, agrees={"type": "object", "additionalProperties": {"maximum": 1e-3}}),
        "lengths": rows(recipe={"type": "string"}, exponent={"type": "number"}, kept_exponent={"type": "number"},
                        backend={"type": "string"}, points={"type": "array", "minItems": 3, "items": {
                            "type": "object", "required": ["tokens", "min", "median", "kept_bytes"]}}),
        "training": rows(COMPARED, recipe={"type": "string"}, tokens={"type": "integer"}, share=NUMBER),
        "decoding": rows(COMPARED, recipe={"type": "string"}, context={"type": "integer"},
                         state_bytes={"type": "integer"})}}


@pytest.fixture(scope="module")
def found():
    return bench.run_bench(bench.configured(TINY))


@COMPILED
def test_what_it_writes(found):
    found = json.loads(json.dumps(found, allow_nan=False))
    jsonschema.validate(found, SCHEMA)
    assert found["failures"] == []
    by_case = {row["case"]: row for row in found["kernels"]}
    assert set(by_case) == set(kernels.CASES)
    for name, row in by_case.items():
        assert row["sides"]["ours"]["backend"].startswith("compiled ("), name
        assert row["sides"]["PyTorch"]["backend"] == "PyTorch operations"
    assert "gdr_backward" in by_case["dplr"]["sides"]["ours"]["backend"]


@COMPILED
def test_peers_compute_the_same_and_both_sides_are_as_large(found):
    pytest.importorskip("transformers")
    by_case = {row["case"]: row for row in found["kernels"]}
    for name in ("delta-head", "delta-channel", "add", "selective-short", "convolution"):
        assert by_case[name]["agrees"]["transformers"] < 1e-4
    (trained,) = found["training"]
    assert trained["sides"]["ours"]["params"] == trained["sides"]["transformers"]["params"]


@pytest.mark.parametrize("name", bench.configured().training.recipes)
def test_models_of_equal_size(name):
    pytest.importorskip("transformers")
    from postformer.design import load

    assert load(name, models.CHANGES.get(name, []), 128, 4).cost().params == models.count(peers.model(name, 128, 4))


@COMPILED
def test_decoding_has_the_declared_state_and_reads_no_long_context(found):
    for row in found["decoding"]:
        assert row["state_bytes"] == row["declared_bytes"]
    by = {(row["recipe"], row["context"]): row for row in found["decoding"]}
    assert by["mamba2", 70]["state_bytes"] == by["mamba2", 300]["state_bytes"]
    assert by["transformer", 300]["state_bytes"] > 4 * by["transformer", 70]["state_bytes"]
    assert "decoding.peer_context=300" in by["mamba2", 300]["sides"]["transformers"]["absent"]


def test_ratios_and_floors_are_of_the_figures(found):
    named = bench.ratios(found)
    row = next(r for r in found["kernels"] if r.get("ratios"))
    side, value = next(iter(row["ratios"].items()))
    assert value == row["sides"][side]["min"] / row["sides"]["ours"]["min"]
    assert named[f"kernels/{row['case']}/threads all/{side}"] == value
    rates = found["rates"]["1"]
    floor = row["floor"]
    assert floor["arithmetic"] == pytest.approx(2 * floor["multiply_adds"] / rates["gemm_flops_per_s"])
    assert floor["traffic"] == pytest.approx(floor["bytes"] / rates["copy_bytes_per_s"])
    assert row["share"] == max(floor["arithmetic"], floor["traffic"]) / row["sides"]["ours"]["min"]


def test_the_floor_of_the_gated_delta_rule_is_that_of_chunks_of_64():
    sizes = bench.configured().kernels
    flops = 2 * kernels.BACKWARD * kernels.CASES["delta-head"].multiply_adds(sizes)
    assert flops == pytest.approx(3.3e9, rel=0.05)


# What fails it


def without_library(monkeypatch):
    monkeypatch.setattr(native, "native", lambda: native.Native(None, "no compiler, says the test"))
    monkeypatch.setattr(native, "_built", lambda: False)
    monkeypatch.setattr(backend, "native", native.native)


def test_a_silent_fallback_fails_every_part(monkeypatch):
    without_library(monkeypatch)
    config = bench.configured([*TINY, "decoding.recipes=[mamba2]", "decoding.contexts=[70]",
                               "kernels.cases=[delta-head, scan]"])
    found = bench.run_bench(config)
    assert len(found["failures"]) == 5
    for failure in found["failures"]:
        assert "asked for" in failure["why"]
    assert all("min" not in s for row in found["kernels"] for s in row["sides"].values())
    assert bench.ratios(found) == {}


def test_pytorch_operations_are_measured_where_they_are_asked_for(monkeypatch):
    without_library(monkeypatch)
    found = bench.run_bench(bench.configured([*TINY, "backend=parallel", "kernels.cases=[delta-head]"]), ["kernels"])
    (row,) = found["kernels"]
    assert row["sides"]["ours"]["backend"] == "PyTorch operations"
    assert found["failures"] == []


def test_operators_for_gpus_are_seen_too():
    with torch.library._scoped_library("postformer", "FRAGMENT") as library:
        library.define("a_triton_test(Tensor x) -> Tensor")
        library.impl("a_triton_test", torch.Tensor.clone, "CompositeExplicitAutograd")
        assert backend.observe(lambda: torch.ops.postformer.a_triton_test(torch.ones(2)), "native")[1] == (
            "compiled (a_triton_test)")


@COMPILED
def test_a_kernel_that_falls_back_alone_fails():
    with pytest.raises(backend.Fallback, match="none of them ran"):
        backend.observe(lambda: torch.ones(3).sum(), "native")
    assert backend.observe(lambda: 1, "native", compiled=False) == (1, "PyTorch operations")


def test_wrong_numbers_fail(monkeypatch):
    case = kernels.CASES["scan"]
    wrong = kernels.Case(case.title, case.inputs, case.ours, case.multiply_adds,
                         {"theirs": lambda x, _: 1.01 * case.ours(x)}, ("theirs",), compiled=())
    monkeypatch.setitem(kernels.CASES, "scan", wrong)
    monkeypatch.setattr(kernels.peers, "backend", lambda _: "a test")
    found = bench.run_bench(bench.configured([*TINY, "kernels.cases=[scan]", "backend=parallel"]), ["kernels"])
    assert "differs from theirs" in found["failures"][0]["why"]
    assert math.isnan(kernels.difference([torch.tensor([1.0])], [torch.tensor([float("nan")])]))


def test_a_state_of_other_bytes_than_declared_fails(monkeypatch):
    monkeypatch.setattr(decoding, "size", lambda state: 7)
    found = bench.run_bench(bench.configured([*TINY, "decoding.recipes=[mamba2]"]), ["decoding"])
    assert "the design declares" in found["failures"][0]["why"]


def test_without_transformers_its_columns_say_so(monkeypatch):
    real = importlib.metadata.version

    def missing(name):
        if name == "transformers":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(peers, "version", missing)
    config = bench.configured([*TINY, "kernels.cases=[add]", "decoding.recipes=[mamba2]", "backend=parallel"])
    found = bench.run_bench(config, ["kernels", "training", "decoding"])
    said = [row["sides"]["transformers"]["absent"] for part in ("kernels", "training") for row in found[part]]
    said += [row["sides"]["transformers"]["absent"] for row in found["decoding"]]
    assert said == ["not installed; pip install 'postformer[hf]'"] * 4
    assert found["peers"]["transformers"] == said[0]
    assert found["failures"] == []
    assert "attention" in found["kernels"][0]["ratios"]


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no GPU"):
        bench.run_bench(bench.configured(device="cuda"))
    assert "--device cuda" in peers.about("cpu")[peers.FLA]


@pytest.mark.parametrize(("changes", "words"), [
    (["kernels.rounds=0"], "kernels.rounds.*greater"), (["kernels.round=3"], "Did you mean 'rounds'"),
    (["device=tpu"], "device"), (["kernel.rounds=3"], "Did you mean 'kernels'")])
def test_settings_that_say_nothing(changes, words):
    with pytest.raises(ValueError, match=words):
        bench.configured(changes)


def test_names_that_do_not_exist():
    with pytest.raises(ValueError, match=r"'delta'.*delta-head"):
        bench.run_bench(bench.configured([*TINY, "kernels.cases=[delta]"]), ["kernels"])
    with pytest.raises(ValueError, match="no part 'kernel'"):
        bench.run_bench(bench.configured(TINY), ["kernel"])


# Times


def test_sides_take_turns_and_a_slow_one_stops():
    order = []

    def side(name, seconds):
        def run():
            order.append(name)
            return seconds
        return run

    found = clock.by_turns({"a": side("a", 1.0), "b": side("b", 4.0), "c": side("c", 20.0)}, 4, 6.0)
    assert "".join(order) == "abc" + "ab" + "ab" + "a" + "a"
    assert (len(found["a"]), len(found["b"]), found["c"]) == (4, 2, [20.0])
    assert clock.summary([3.0, 1.0, 2.0]) == {"min": 1.0, "median": 2.0, "rounds": 3}


def test_threads_are_those_that_were_asked_for_and_come_back():
    before = torch.get_num_threads()
    with clock.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    assert bench.configured(["threads=[1, all, 1]"]).counts() == sorted({1, bench.config.cores()})


def test_exponents_and_kept_memory():
    assert models.exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)
    layer = torch.nn.Linear(8, 8)
    x = torch.randn(100, 8)
    assert models.kept_bytes(lambda: layer(x).tanh(), layer) == 2 * 100 * 8 * 4  # its input, and tanh's output


def test_linear_recipes_are_those_of_matrices_and_vectors():
    found = models.linear_recipes()
    assert {"mamba", "mamba2", "gated-deltanet", "kda", "rwkv7", "retnet"} <= set(found) <= set(names())
    assert not {"transformer", "griffin", "lstm", "titans-lmm", "kalman", "jamba", "qwen3-next"} & set(found)


# The check


def test_a_fall_of_over_15_percent():
    kept = {"kernels/a/x": 2.0, "kernels/b/x": 2.0, "kernels/c/x": 2.0, "kernels/d/x": 1.0, "training/e/x": 3.0}
    now = {"kernels/a/x": 1.71, "kernels/b/x": 1.69, "kernels/c/x": 2.5, "kernels/new/x": 1.0}
    verdict = check.compare(now, kept)
    assert verdict["fallen"] == {"kernels/b/x": (2.0, 1.69)}
    assert verdict["risen"] == {"kernels/c/x": (2.0, 2.5)}
    assert verdict["gone"] == ["kernels/d/x"]
    assert verdict["compared"] == 3
    assert check.compare({"kernels/a/x": float("nan")}, kept)["fallen"]


def test_ratios_are_kept_and_only_compared_at_the_same_sizes(found, tmp_path):
    path = tmp_path / "deep" / "last.json"
    check.keep(found, path)
    kept = check.last(path, found["config"])
    assert check.compare(bench.ratios(found), kept["ratios"])["fallen"] == {}
    assert kept["environment"] == found["environment"]
    other = bench.configured([*TINY, "kernels.length=21"]).model_dump(mode="json")
    with pytest.raises(ValueError, match=r"other settings \(kernels.length\)"):
        check.last(path, other)


@pytest.mark.parametrize(("text", "words"), [(None, "--keep"), ("{", "no JSON"), ("{}", "--last")])
def test_no_ratios_to_check_against(tmp_path, text, words):
    path = tmp_path / "last.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=words):
        check.last(path, bench.configured().model_dump(mode="json"))
