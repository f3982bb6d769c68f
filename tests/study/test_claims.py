import json
import re

import pytest
import torch
from pydantic import ValidationError

from postformer import task
from postformer.design import load, names
from postformer.study.claims import REMARKS, Claim, base, claims, cost, duality, pairs, positions, trained
from postformer.study.claims.results import Results

NONE = Results(None)
IDS = [f"T{i}" for i in range(1, 16)]


def made(key, settings, scores, metric="token_accuracy", better="higher", state=None, params=1000, flops=2000):
    """Results of one task. settings: {setting: inside}; scores: {design: {setting: values by seed}}; the rest may be
    {design: value}, state also {design: {setting: bytes}}."""
    keys = {s: "x".join(map(str, s)) if isinstance(s, tuple) else str(s) for s in settings}

    def of(given, design):
        return given.get(design) if isinstance(given, dict) else given

    cells = []
    for design, at in scores.items():
        count = max(map(len, at.values()))
        sizes = of(state or {}, design) or 64
        cells.append({
            "design": design, "task": key, "params": of(params, design), "flops_per_token": of(flops, design),
            "state_bytes": {keys[s]: sizes[s] if isinstance(sizes, dict) else sizes for s in settings},
            "seeds": [{"seed": i, "test": {keys[s]: {metric: v[i]} for s, v in at.items()}} for i in range(count)],
            "failures": [],
        })
    return {
        "designs": [{"key": design} for design in scores],
        "tasks": [{"key": key, "metric": metric, "better": better, "settings": [
            {"setting": list(s) if isinstance(s, tuple) else s, "name": keys[s], "inside": inside,
             "chance": 8.0 if better == "lower" else 0.05, "shortcut": 3.0 if better == "lower" else 0.08}
            for s, inside in settings.items()]}],
        "cells": cells,
    }


def around(mean, spread=0.01):
    return [mean - spread, mean, mean + spread]


def judged(maker, results):
    found = maker(Results(results), True)
    json.dumps(found.model_dump(mode="json"), allow_nan=False)
    return found


# The list


@pytest.fixture(scope="module")
def every():
    return claims(quick=True)


def test_all_claims_in_order_and_as_json(every):
    assert [claim.id for claim in every] == IDS
    for claim in every:
        assert Claim.model_validate_json(json.dumps(claim.model_dump(mode="json"), allow_nan=False)) == claim
        assert all(text.strip() for text in (claim.title, claim.statement, claim.source, claim.test, claim.reason))
        assert all(re.fullmatch(r"\d{4}\.\d{5}", paper) for paper in claim.papers)
        assert claim.papers or claim.from_notes
    assert all(remark.endswith((".", ").")) for remark in REMARKS)
    with pytest.raises(ValidationError):
        every[0].verdict = "holds"


def test_what_needs_results_says_which_command_makes_them(every):
    waiting = [claim for claim in every if claim.verdict == "needs results"]
    assert [claim.id for claim in waiting] == ["T3", "T4", "T5", "T6", "T12", "T13", "T14"]
    for claim in waiting:
        form = r"postformer gauntlet ([\w. -]+?) --tier standard --tasks ([\w-]+) --claims"
        command = re.fullmatch(form, claim.command)
        assert command
        designs, asked = command.groups()
        assert set(designs.split()) <= set(names())
        assert asked in (*task.names(), "s3")
    assert [claim.id for claim in every if claim.verdict == "not testable here"] == ["T7", "T8", "T15"]


def test_a_claim_of_ones_own(monkeypatch):
    monkeypatch.setattr(base, "_MAKERS", {})
    own = Claim(id="X2", title="t", statement="s", source="me", test="none", verdict="holds", reason="r")
    base.claim("X10")(lambda results, quick: own)
    base.claim("X2")(lambda results, quick: own.model_copy(update={"reason": str(quick)}))
    assert [found.reason for found in claims(quick=True)] == ["True", "r"]
    with pytest.raises(ValueError, match="these are no results of a gauntlet: 'tasks' is missing"):
        claims({"designs": []})


# T1, T2


def test_the_slope_of_a_power():
    x = [2.0, 4.0, 8.0]
    assert base.slope(x, [3 * v**1.5 for v in x]) == pytest.approx(1.5)
    assert base.slope(x, [7.0] * 3) == 0


@pytest.mark.parametrize(("powers", "verdict"), [
    (((2, 1), (1, 0)), "holds"), (((2, 1), (0.3, 0)), "undecided"), (((1.4, 1), (1, 0)), "undecided")])
def test_the_clock_must_tell_attention_from_a_recurrence(monkeypatch, powers, verdict):
    modes = iter(powers)

    def seconds(runs, repeats):
        attention, recurrent = next(modes)
        return {(name, n): 1e-6 * n ** (attention if name == "attention" else recurrent) for name, n in runs}

    monkeypatch.setattr(cost, "_seconds", seconds)
    monkeypatch.setattr(cost, "COUNTED", (32, 64, 512))
    found = cost.quadratic(NONE, True)
    assert found.verdict == verdict
    counted = {f.name: f.value for f in found.figures if "counted" in f.name}
    assert list(counted.values()) == pytest.approx([2, 1, 1, 0], abs=0.02)
    assert ("The clock differs" in found.reason) == (verdict != "holds")


def test_wrong_counts_refute_it_whatever_the_clock_says(monkeypatch):
    monkeypatch.setattr(cost, "_seconds", lambda runs, repeats: dict.fromkeys(runs, 1.0))
    monkeypatch.setattr(cost, "_flops", lambda run: 100)
    assert cost.quadratic(NONE, True).verdict == "does not hold"


def test_counted_operations_are_those_of_the_formula():
    heads, dim = cost.PREFILL
    # Every query and each key that it sees: a product of `dim` for the score and one for the value.
    assert cost._flops(cost._prefill(64, "reference")["attention"]) == heads * 4 * dim * 64 * 65 // 2
    heads, dim = cost.DECODE
    assert cost._flops(cost._decode(64, "reference")["attention"]) == heads * 4 * dim * 64


def test_bytes_of_keys_and_values_by_hand():
    assert cost.kv_bytes(80, 8, 128, 2) == 327_680
    assert cost.growth(load("transformer")) == (2 * 8 * 2 * 64 * 4, 8, 8)
    assert cost.growth(load("jamba")) == (2 * 1 * 2 * 64 * 4, 1, 8)
    assert cost.growth(load("sliding-window"))[:2] == (0, 0)
    assert cost.growth(load("mamba2"))[:2] == (0, 0)
    for name in ("transformer", "jamba", "sliding-window"):
        whole = load(name).cost()
        assert whole.state_bytes(10**6 + 1) - whole.state_bytes(10**6) == cost.growth(load(name))[0]


def test_a_cache_of_another_size_refutes_the_arithmetic(every, monkeypatch):
    assert every[1].verdict == "holds"
    monkeypatch.setattr(cost, "kv_bytes", lambda *sizes: 327_000)
    assert cost.key_value_cache(NONE, True).verdict == "does not hold"


# T9, T10, T11


def test_averaging_by_hand():
    assert positions.averaging(3, 1, 1.0).tolist() == pytest.approx([1 / 3] * 3)
    # Twice: the last row of C^2 is the mean of the rows of C.
    assert positions.averaging(3, 2, 1.0).tolist() == pytest.approx([11 / 18, 5 / 18, 2 / 18])
    assert positions.averaging(3, 1, 0.5).tolist() == pytest.approx([1 / 6, 1 / 6, 4 / 6])
    assert positions.averaging(4, 5, 0.0).tolist() == [0, 0, 0, 1]


def test_valleys_and_slopes():
    u, up = torch.tensor([3.0, 2, 1, 1, 1, 1, 2, 3]), torch.arange(8.0)
    assert positions.valley(u)
    assert not positions.valley(up)
    assert not positions.valley(up.flip(0))
    assert positions.rising(up)
    assert not positions.rising(u)


def test_influence_is_the_norm_of_the_jacobian():
    # One seed and many probes against the Jacobian itself.
    found = positions.influence("gated-deltanet", 8, 2, 1, width=32, rows=1, probes=400)
    from postformer.model import build

    model = build(load("gated-deltanet", ["model.vocab=256"], 32, 2).model, 0).requires_grad_(False)
    x = model.embed(torch.randint(256, (1, 8), generator=torch.Generator().manual_seed(0)))
    jacobian = torch.autograd.functional.jacobian(lambda at: model.run(at)[0].y[0, -1], x)  # [width, 1, 8, width]
    norms = jacobian.square().sum((0, 1, 3)).sqrt()
    assert found.tolist() == pytest.approx((norms / norms.sum()).tolist(), rel=0.15)


def test_the_middle_is_lost_before_training(every):
    found = every[8]
    assert found.verdict == "holds"
    figures = {f.name: f.value for f in found.figures}
    assert figures["transformer: least eighth"] < 1 < figures["transformer: first eighth"]
    for recipe in positions.DECAYING:
        assert figures[f"{recipe}: least eighth"] == figures[f"{recipe}: first eighth"] < 1


def test_a_memory_without_decay_refutes_that_all_rise(monkeypatch):
    monkeypatch.setattr(positions, "DECAYING", ("linear-attention",))
    found = positions.lost_in_the_middle(NONE, True)
    assert found.verdict == "does not hold"
    assert "linear-attention does not rise" in found.reason.lower()


def test_pairs_are_the_most_similar_and_attention_finds_them():
    x, truth = pairs.problems(20, 12, seed=0)
    assert set(x.unique().tolist()) == {-1, 1}
    for vectors, (later, earlier) in zip(x.tolist(), truth.tolist(), strict=True):
        dots = {(i, j): sum(a * b for a, b in zip(vectors[i], vectors[j], strict=True))
                for i in range(12) for j in range(i)}
        assert sorted(dots.values())[-2] < dots[later, earlier] == max(dots.values())
    assert pairs.accuracy(pairs.by_attention(x), truth) == 1
    assert pairs.accuracy(truth.roll(1, 0), truth) < 0.5


def test_the_memory_fails_for_its_size_alone(monkeypatch):
    x, truth = pairs.problems(100, 16, seed=1)
    small = pairs.accuracy(pairs.by_memory(x, delta=False), truth)
    monkeypatch.setattr(pairs, "CODE", 4096)
    assert pairs.accuracy(pairs.by_memory(x, delta=False), truth) > 0.9 > small


def test_three_forms_of_one_memory(every):
    assert every[10].verdict == "holds"
    rule = duality.memory(torch.float64, 5)
    assert rule.g is not None
    assert rule.k_add is not None
    assert rule.v_add is not None
    q, g, k, v = rule.q, rule.g.exp(), rule.k_add, rule.v_add
    state, rows = torch.zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=torch.float64), []
    for t in range(5):
        state = g[:, :, t, :, None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        rows.append((q[:, :, t, :, None] * state).sum(2))
    assert torch.allclose(duality.quadratic(rule), torch.stack(rows, 2), atol=1e-12)


def test_a_quadratic_form_that_forgets_to_decay_is_found(monkeypatch):
    honest = duality.quadratic
    monkeypatch.setattr(duality, "quadratic", lambda rule: honest(rule._replace(g=torch.zeros_like(rule.g))))
    assert duality.duality(NONE, True).verdict == "does not hold"


# T3 to T6, T12 to T14: made-up results


def copied(attention, fixed, seeds=3):
    values = {"transformer": attention, "mamba2": fixed}
    return made("copy", {16: True, 32: True, 64: False}, {
        name: {16: [1.0] * seeds, 32: around(value)[:seeds], 64: [0.0] * seeds} for name, value in values.items()},
        "exact_match", state={"transformer": {16: 160, 32: 320, 64: 640}, "mamba2": 100})


@pytest.mark.parametrize(("results", "verdict"), [
    (copied(0.98, 0.4), "holds"), (copied(0.2, 0.95), "does not hold"), (copied(0.98, 0.98), "undecided"),
    (copied(0.3, 0.2), "undecided"), (copied(0.98, 0.4, seeds=2), "undecided")])
def test_copying(results, verdict):
    found = judged(trained.copying, results)
    assert found.verdict == verdict
    assert {f.name: f.value for f in found.figures}["transformer, state"] == 320
    assert ("fewer than 3 seeds" in found.reason) == (len(results["cells"][0]["seeds"]) == 2)


def test_copying_needs_both_sides():
    results = copied(0.98, 0.4)
    results["cells"] = results["cells"][:1]
    found = judged(trained.copying, results)
    assert found.verdict == "needs results"
    assert "--tasks copy" in found.command


def recalled(accuracies):
    sizes = {f"design{i}": 100 * 2**i for i in range(len(accuracies))}
    scores = {name: {(32, 8): around(a)} for name, a in zip(sizes, accuracies, strict=True)}
    return made("mqar", {(32, 8): True}, scores, state=sizes)


@pytest.mark.parametrize(("accuracies", "verdict"), [
    ((0.1, 0.2, 0.5, 0.6, 0.8, 0.85), "holds"), ((0.8, 0.7, 0.5, 0.4, 0.3, 0.2), "does not hold"),
    ((0.5, 0.3, 0.6, 0.4, 0.55, 0.52), "undecided"), ((0.99, 0.98, 0.97, 0.96, 0.95, 0.94), "undecided"),
    ((0.1, 0.2, 0.3), "needs results")])
def test_recall_and_memory(accuracies, verdict):
    assert judged(trained.recall_and_memory, recalled(accuracies)).verdict == verdict


def test_a_design_that_declares_no_state_is_left_out():
    results = recalled((0.1, 0.2, 0.5, 0.6, 0.8, 0.85))
    results["cells"][0]["state_bytes"] = {}
    assert "5 designs" in judged(trained.recall_and_memory, results).reason


def test_the_rank_correlation_by_hand():
    assert trained.ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1, 3.5, 2]
    rho, p = trained.rank_correlation([1, 2, 3, 4, 5], [1, 2, 3, 5, 4])
    assert rho == pytest.approx(1 - 6 * 2 / (5 * 24))
    assert p == pytest.approx(5 / 120, abs=0.01)  # the identity and four exchanges of neighbours, of 120 orders
    assert trained.rank_correlation([1, 2, 3], [4, 4, 4])[0] == 0


def tracked(low, high, key="parity", spread=0.01):
    return made(key, {16: True, 64: False}, {
        "mamba2": {16: around(1), 64: around(low, spread)},
        "deltaproduct": {16: around(1), 64: around(high, spread)}}, "last_accuracy")


@pytest.mark.parametrize(("low", "high", "verdict"), [
    (0.5, 0.98, "holds"), (0.95, 0.98, "does not hold"), (0.5, 0.6, "undecided")])
@pytest.mark.parametrize("key", ["parity", "s3"])
def test_state_tracking(low, high, verdict, key):
    assert judged(trained.state_tracking, tracked(low, high, key)).verdict == verdict


def test_state_tracking_is_about_lengths_beyond_training():
    results = made("parity", {16: True, 64: False, 256: False}, {
        "mamba2": {16: around(1), 64: around(0.5), 256: around(0.5)},
        "deltaproduct": {16: around(1), 64: around(0.98), 256: around(0.6)}}, "last_accuracy")
    assert judged(trained.state_tracking, results).verdict == "holds"  # at the shortest of them
    results = tracked(0.5, 0.98)
    results["tasks"][0]["settings"][1]["inside"] = True
    assert judged(trained.state_tracking, results).verdict == "needs results"


def composed(hybrid, delta, space, params=1000):
    return made("composition", {(17, 2): True, (33, 4): True, (65, 4): False}, {
        name: {(17, 2): around(1), (33, 4): around(value), (65, 4): around(0.1)}
        for name, value in {"qwen3-next": hybrid, "gla": delta / 2, "gated-deltanet": delta, "mamba": space}.items()},
        params=params)


@pytest.mark.parametrize(("values", "verdict"), [
    ((0.9, 0.6, 0.3), "holds"), ((0.5, 0.9, 0.3), "does not hold"), ((0.9, 0.6, 0.6), "undecided")])
def test_the_hierarchy(values, verdict):
    assert judged(trained.hierarchy, composed(*values)).verdict == verdict


@pytest.mark.parametrize("params", [
    {"qwen3-next": 2000, "gated-deltanet": 1000, "gla": 1000, "mamba": 1000},
    {"qwen3-next": None, "gated-deltanet": 1000, "gla": 1000, "mamba": 1000}])
def test_the_hierarchy_is_at_equal_size(params):
    found = judged(trained.hierarchy, composed(0.9, 0.6, 0.3, params))
    assert found.verdict == "undecided"
    assert "match them" in found.reason


def counted(sparse, dense):
    return made("aggregate-count", {(32, 12): True, (64, 12): True, (64, 24): True, (128, 48): False}, {
        name: {(32, 12): around(0.9), (64, 12): around(a), (64, 24): around(b), (128, 48): around(0.1)}
        for name, a, b in zip(("transformer", "mamba2"), sparse, dense, strict=True)})


@pytest.mark.parametrize(("sparse", "dense", "verdict"), [
    ((0.9, 0.8), (0.6, 0.5), "holds"), ((0.9, 0.8), (0.9, 0.8), "does not hold"),
    ((0.9, 0.8), (0.6, 0.8), "undecided"), ((0.9, 0.5), (0.6, 0.8), "does not hold")])
def test_density(sparse, dense, verdict):
    found = judged(trained.density, counted(sparse, dense))
    assert found.verdict == verdict
    assert "From 64x12 to 64x24" in found.reason


def test_density_asks_each_model_against_itself():
    """Seeds far apart, each worse where more matters: their ranges overlap, and yet all fall."""
    scores = {"mamba2": {(64, 12): [0.9, 0.7, 0.6], (64, 24): [0.8, 0.65, 0.3]}}
    few_many = {(64, 12): True, (64, 24): True}
    assert judged(trained.density, made("aggregate-count", few_many, scores)).verdict == "holds"
    scores["mamba2"][64, 24][1] = 0.71
    assert judged(trained.density, made("aggregate-count", few_many, scores)).verdict == "does not hold"
    scores["mamba2"][64, 24][0] = 0.95
    assert judged(trained.density, made("aggregate-count", few_many, scores)).verdict == "does not hold"


def test_density_needs_one_length_twice():
    results = counted((0.9, 0.8), (0.6, 0.5))
    results["tasks"][0]["settings"] = results["tasks"][0]["settings"][:2]
    assert judged(trained.density, results).verdict == "needs results"


def in_bits(key, values, metric, **more):
    return made(key, {128: True, 256: False}, {
        name: {128: around(value), 256: around(0.1)} for name, value in values.items()}, metric, "lower", **more)


@pytest.mark.parametrize(("bits", "verdict"), [
    ((0.7, 0.8, 0.9), "holds"), ((0.9, 0.8, 0.95), "does not hold"), ((0.8, 0.805, 0.9), "undecided")])
def test_recall_perplexity(bits, verdict):
    values = dict(zip(("transformer", "gated-deltanet", "mamba"), bits, strict=True))
    assert judged(trained.recall_perplexity, in_bits("recall-perplexity", values, "hit_bits")).verdict == verdict


@pytest.mark.parametrize(("transformer", "mamba", "flops", "verdict"), [
    (2.3, 2.1, {"transformer": 100, "mamba": 105}, "holds"),
    (2.1, 2.3, {"transformer": 90, "mamba": 100}, "does not hold"),
    (2.2, 2.2, {"transformer": 100, "mamba": 100}, "undecided"),
    (2.3, 2.1, {"transformer": 100, "mamba": 150}, "undecided"), (2.3, 2.1, {"transformer": 100}, "undecided")])
def test_bytes(transformer, mamba, flops, verdict):
    results = in_bits("bytes", {"transformer": transformer, "mamba": mamba}, "bits_per_byte", flops=flops)
    assert judged(trained.bytes_favour_state_space, results).verdict == verdict


@pytest.mark.parametrize("maker", [trained.recall_perplexity, trained.bytes_favour_state_space, trained.hierarchy,
                                   trained.density, trained.recall_and_memory, trained.state_tracking])
def test_tasks_without_a_result_decide_nothing(maker):
    for key in ("recall-perplexity", "bytes", "composition", "aggregate-count", "mqar", "parity"):
        results = made(key, {(64, 1): True, (64, 2): True, (128, 2): False}, {"transformer": {(64, 1): []}})
        assert judged(maker, results).verdict == "needs results"


@pytest.mark.parametrize(("maker", "results"), [
    (trained.recall_and_memory, recalled((0.01, 0.02, 0.03, 0.04, 0.05, 0.06))),
    (trained.hierarchy, composed(0.07, 0.045, 0.02)), (trained.density, counted((0.07, 0.07), (0.02, 0.02))),
    (trained.recall_perplexity,
     in_bits("recall-perplexity", {"transformer": 2.0, "gated-deltanet": 3.2, "mamba": 3.5}, "hit_bits")),
    (trained.bytes_favour_state_space, in_bits("bytes", {"transformer": 3.5, "mamba": 2.9}, "bits_per_byte"))])
def test_who_has_learned_nothing_decides_nothing(maker, results):
    """Otherwise, in this order, every one of them would hold."""
    assert judged(maker, results).verdict == "undecided"
    for setting in results["tasks"][0]["settings"]:
        setting["shortcut"] = setting["chance"] = 8.0 if results["tasks"][0]["better"] == "lower" else 0.0
    assert judged(maker, results).verdict == "holds"
