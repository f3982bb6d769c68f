"""The tester tested: every planted fault is found, by the check that is about it, and its healthy twin passes."""

import pytest

from postformer.verify import verify

# The checks by a few words of their names.
PARALLEL, DIFFERENCES = "parallel = token by token, fp64", "finite differences"
CAUSAL, CAUSAL_GRADIENT = "a later token changes nothing", "no gradient from an output"
PIECES, STEPS, EMITTED, AGES = "pieces = whole, outputs", "prefill + single steps", "emitted states", "different age"
BATCH, PACKED, LEVELS, FORGOTTEN = "company in the batch", "packed documents", "a boundary below", "finished document"
BOUNDED = "where segments, documents"
PADDING, GATED, EXTREME, PURE = "garbage at tokens", "read-only tokens", "finite outputs and gradients", "the same with"
SIZES, FLOPS, TRAITS = "declared params and state", "declared FLOPs", "declared traits"
SAVED, BF16, OWNED = "saved and loaded", "under bf16 autocast", "every parameter is made"


def failed(recipe):
    return [r.name for r in verify(recipe).results if r.passed is False]


def named(failures, words):
    return any(words in name for name in failures)


ORDERS = [{"erase_before_decay": e, "read_before_update": r} for e in (False, True) for r in (False, True)]
HEALTHY = [("delta", order) for order in ORDERS]
HEALTHY += [("leaky", {}), ("leaky", {"learned": True}), ("scan", {}), ("list", {})]


@pytest.mark.parametrize(("kind", "fields"), HEALTHY, ids=lambda v: v if isinstance(v, str) else str([*v.values()]))
def test_the_healthy_twin_passes(planted, kind, fields):
    found = verify(planted(kind, **fields))
    assert [(r.name, r.note) for r in found.results if r.passed is not True] == []
    assert len(found.results) >= 23


@pytest.mark.parametrize("order", ORDERS[1:], ids=lambda o: str([*o.values()]))
def test_a_document_reset_spelled_as_a_gate_leaks(planted, order):
    found = failed(planted("delta", "gate-reset", **order))
    for words in (PACKED, FORGOTTEN, PADDING):
        assert named(found, words), (words, found)
    assert len(found) == 3


def test_a_reset_gate_in_the_default_order_is_lost_at_a_token_that_does_not_exist(planted):
    assert [PADDING in name for name in failed(planted("delta", "gate-reset"))] == [True]


# fault -> the checks that must fail, and how many others may (None: any number; the fault touches everything).
BUILDS = "builds and runs"
FAULTS = [
    ("delta", "no-reset", [PACKED, FORGOTTEN, PADDING], 0),
    ("scan", "no-reset", [PACKED, FORGOTTEN, PADDING], 0),
    ("scan", "any-boundary", [LEVELS], 0),
    ("scan", "future-tap", [CAUSAL, CAUSAL_GRADIENT, PIECES, STEPS], None),
    ("scan", "call-mean", [CAUSAL, CAUSAL_GRADIENT, PIECES, STEPS], None),
    ("scan", "one-token", [PIECES, STEPS, BOUNDED], 3),
    ("scan", "call-grid", [PIECES, STEPS], None),
    ("scan", "pad-decay", [PADDING, GATED], 0),
    ("scan", "pad-write", [PADDING, GATED], 0),
    ("scan", "last-valid", [PADDING], 0),
    ("scan", "soft-gates", [GATED], 0),
    ("scan", "backend", [PARALLEL], 0),
    ("scan", "backend-gradient", [PARALLEL, DIFFERENCES], 0),
    ("scan", "no-grad", [DIFFERENCES], 0),
    ("scan", "overflow", [PIECES, EXTREME], 1),
    ("scan", "clamped", [PIECES], 0),
    ("scan", "first-row-position", [AGES, PADDING, BOUNDED], 2),
    ("scan", "own-position", [PURE, PIECES, STEPS, AGES], None),
    ("scan", "emit-late", [EMITTED], 0),
    ("scan", "emit-none", [EMITTED], 0),
    ("scan", "prefill-in-place", [STEPS, PIECES], None),
    ("scan", "says-stateless", [TRAITS], 0),
    ("leaky", "int-state", [BUILDS], 0),
    ("leaky", "scalar-state", [BUILDS], 0),
    ("leaky", "python-counter", [PURE, PIECES, STEPS, AGES], None),
    ("leaky", "in-place", [BUILDS], 0),
    ("leaky", "mutates-input", [PURE], 0),
    ("leaky", "learns-in-call", [PURE], 0),
    ("leaky", "batch-mean", [BATCH, AGES], None),
    ("leaky", "half", [BF16, DIFFERENCES], 0),
    ("leaky", "training", [PURE], 0),
    ("leaky", "grad-mode", [PURE], 2),
    ("leaky", "dropout", [PURE, PARALLEL], None),
    ("leaky", "stray-vector", [OWNED], 0),
    ("delta", "stray-matrix", [OWNED], 0),
    ("leaky", "wrong-params", [SIZES], 0),
    ("leaky", "wrong-state", [SIZES], 0),
    ("leaky", "wrong-flops", [FLOPS], 0),
    ("list", "uncut", [PACKED], 1),
    ("list", "reads-capacity", [STEPS, AGES], None),
    ("list", "keeps-padding", [PADDING, BOUNDED], 0),
    ("list", "always-consumes", [STEPS], 0),
    ("list", "says-constant", [TRAITS], 0),
]


@pytest.mark.parametrize(("kind", "fault", "checks", "others"), FAULTS, ids=[f"{k}-{f}" for k, f, *_ in FAULTS])
def test_a_planted_fault_is_found_by_the_check_about_it(planted, kind, fault, checks, others):
    found = failed(planted(kind, fault))
    for words in checks:
        assert named(found, words), (words, found)
    assert others is None or len(found) <= len(checks) + others, found


def test_a_cost_that_is_not_declared_is_said_and_no_fault(planted):
    result = verify(planted("leaky", "no-cost"))
    assert result.passed
    notes = [r.note for r in result.results if r.passed is None]
    assert sum("declares no cost" in note for note in notes) == 2


def test_a_step_that_returns_no_pair_is_told(planted):
    (line,) = verify(planted("leaky", "only-y")).results
    assert line.passed is False
    assert "Leaky.step must return (y [B, D_out], state), not Tensor" in line.note


def test_a_reset_to_zero_of_a_learned_start_is_found(planted):
    found = failed(planted("leaky", "zero-reset", learned=True))
    assert named(found, PACKED)
    assert named(found, PADDING)


def test_the_note_names_what_is_wrong(planted):
    notes = {r.name: r.note for fault in ("stray-vector", "wrong-params", "mutates-input")
             for r in verify(planted("leaky", fault)).results if r.passed is False}
    text = " ".join(notes.values())
    assert "stack.layers.0.sublayers.0.mixer.scale" in text
    assert "params: declared 4897, built 4896" in text
    assert "stack.layers.0.sublayers.0.mixer overwrites its input" in text
