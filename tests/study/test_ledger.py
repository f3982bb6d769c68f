"""The ledger: outcomes once, trials held by the living, the test split guarded, text that says everything."""

import os
import subprocess
import sys

import pytest

from postformer.study.asking import design, entries
from postformer.study.cell import SWEEP_SEED, Cell
from postformer.study.ledger import Ledger, LedgerError, Outcome, TestSplitRead

ENTRY = entries("standard", "mqar", ["tokens=4000", "batch_size=4", "rates=[0.001, 0.003, 0.01]", "extend=0",
                                     "finalists=1"])["mqar"]


@pytest.fixture
def cell():
    name, recipe = design("gated-deltanet")
    return Cell(name, ENTRY, ENTRY.sized(recipe), 2)


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as made:
        yield made


def done(score, tokens=100, loss=1.0):
    settings = {f"{a}x{b}/token_accuracy": score for a, b in ((8, 2), (32, 8), (64, 16))} | {"loss": loss}
    return Outcome("finished", {"result": {"validation": settings, "tokens": tokens, "reason": None}})


FAILED = Outcome("failed", {"error": "no", "log": "x"})


def test_an_outcome_is_written_once(ledger, cell):
    trial = cell.wanted({})[0]
    ledger.add([trial])
    assert ledger.finish(trial, done(0.5))
    assert not ledger.finish(trial, done(0.7))
    assert ledger.outcomes()[trial.id] == done(0.5)


def test_two_runners_share_the_trials(tmp_path, cell):
    trials = cell.wanted({})
    with Ledger(tmp_path / "l") as one, Ledger(tmp_path / "l") as two:
        one.add(trials)
        two.add(trials)
        taken = [one.take(trials), two.take(trials), one.take(trials)]
        assert sorted(t.id for t in taken) == sorted(t.id for t in trials)
        assert two.take(trials) is None
        one.release(taken[0])
        assert two.take(trials) == taken[0]
    with Ledger(tmp_path / "l") as three:  # a runner that ended gave back what it held
        assert three.take(trials) == trials[0]


def test_what_a_killed_runner_held_is_free(tmp_path, cell):
    """Its process is gone, so its lease counts no more; a living one's does."""
    trial = cell.wanted({})[0]
    code = ("import sys; from postformer.study.ledger import Ledger; from postformer.study.trial import Trial\n"
            "ledger = Ledger(sys.argv[1]); trial = Trial.model_validate_json(sys.argv[2]); ledger.add([trial])\n"
            "print(ledger.take([trial]).id, flush=True); input()")
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "l"), trial.model_dump_json(exclude_unset=True)],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline().strip() == trial.id
        with Ledger(tmp_path / "l") as ledger:
            assert ledger.take([trial]) is None
            other.kill()
            other.wait()
            assert ledger.take([trial]) == trial


def test_leases_of_other_machines_lapse(ledger, cell):
    trial = cell.wanted({})[0]
    ledger.add([trial])
    ledger.take([trial])
    for age, free in ((1, False), (1000, True)):
        ledger.db.execute("UPDATE leases SET owner = 'elsewhere:1:x', renewed = strftime('%s') - ?", (age,))
        assert (ledger.take([trial]) is not None) == free


def test_the_test_split_is_read_once_and_never_tuned_to(ledger, cell):
    sweep = cell.wanted({})
    ledger.add(sweep)
    with pytest.raises(TestSplitRead, match="chooses a learning rate"):
        ledger.open_test(sweep[0])
    final = cell.finals({t.id: done(0.5) for t in sweep})[0]
    ledger.add([final])
    ledger.open_test(final)
    ledger.open_test(final)  # killed before anyone saw a figure: it may be made again
    ledger.finish(final, done(0.5))
    with pytest.raises(TestSplitRead, match="has read the test split"):
        ledger.open_test(final)
    with pytest.raises(TestSplitRead, match="Keep the rates"):
        ledger.add([cell.trial("sweep", 0.02, SWEEP_SEED, 1000)])
    ledger.add(cell.finals({t.id: done(0.5) for t in sweep}))  # more seeds are no tuning
    second = cell.trial("final", 0.01, 0, 4000)
    ledger.add([second])
    with pytest.raises(TestSplitRead, match="may not judge a second one"):
        ledger.open_test(second)
    other = Cell("transformer", ENTRY, ENTRY.sized("transformer"), 2)
    ledger.add(other.wanted({}))


def test_text_says_everything(ledger, cell, tmp_path):
    sweep = cell.wanted({})
    ledger.add(sweep)
    ledger.note("started", "today")
    for trial in sweep:
        ledger.finish(trial, done(0.5))
    final = cell.finals(ledger.outcomes())[0]
    ledger.add([final])
    ledger.open_test(final)
    ledger.finish(final, FAILED)
    text = ledger.export()
    with Ledger(tmp_path / "other") as other:
        assert other.merge(text) == len(sweep) + 1
        assert other.export() == text
        assert other.merge(text) == 0
        assert other.outcomes() == ledger.outcomes()
        with pytest.raises(TestSplitRead):
            other.add([cell.trial("sweep", 0.02, SWEEP_SEED, 1000)])


def test_a_broken_text_changes_nothing(ledger, cell, tmp_path):
    ledger.add(cell.wanted({}))
    text = ledger.export()
    with Ledger(tmp_path / "other") as other:
        before = other.export()
        with pytest.raises(LedgerError, match="line 5 is none"):
            other.merge(text + '{"trial": {"design": 1}}\n')
        assert other.export() == before


def test_what_is_no_ledger_is_refused(tmp_path):
    (tmp_path / "l").write_text("not a database, and long enough to be looked at as one" * 10)
    with pytest.raises(LedgerError, match="move it away"):
        Ledger(tmp_path / "l")
    with Ledger(tmp_path / "m") as ledger:
        ledger.db.execute("UPDATE about SET value = '99' WHERE key = 'version'")
    with pytest.raises(LedgerError, match="version 99"):
        Ledger(tmp_path / "m")


def test_the_best_rate_by_validation(cell):
    sweep = cell.wanted({})
    assert [t.tokens for t in sweep] == [1000] * 3
    assert len(cell.wanted({sweep[0].id: done(0.9)})) == 3
    scores = dict(zip((t.id for t in sweep), (done(0.5), done(0.9), done(0.8))))
    finals = cell.finals(scores)
    assert [(t.rate, t.seed, t.tokens, t.stage) for t in finals] == [(0.003, s, 4000, "final") for s in (0, 1)]
    tie = dict(zip((t.id for t in sweep), (done(1.0, 90), done(1.0, 50), done(1.0, 70))))
    assert cell.rate(tie) == 0.003  # solved first
    none = dict(zip((t.id for t in sweep), (done(0.0, loss=3.0), done(0.0, loss=2.5), done(0.0, loss=2.0))))
    assert cell.rate(none) == 0.01  # none has begun to solve it
    failing = dict(zip((t.id for t in sweep), (FAILED, done(0.1), FAILED)))
    assert cell.rate(failing) == 0.003
    none = dict.fromkeys((t.id for t in sweep), FAILED)
    assert cell.rate(none) is None
    assert cell.failed(none)
    assert cell.wanted(none) == sweep


def test_many_rates_are_halved(cell):
    entry = ENTRY.model_copy(update={"rates": tuple(1e-3 * i for i in range(1, 9)), "tokens": 16000, "extend": 0})
    many = Cell("gated-deltanet", entry, cell.recipe, 1)
    outcomes = {}
    for expected in ((8, 1000), (4, 2000), (2, 4000)):
        new = [t for t in many.wanted(outcomes) if t.id not in outcomes]
        assert (len(new), {t.tokens for t in new}) == (expected[0], {expected[1]})
        outcomes |= {t.id: done(t.rate) for t in new}
    assert many.rate(outcomes) == pytest.approx(8e-3)
    assert [t.tokens for t in many.wanted(outcomes) if t.stage == "final"] == [16000]


def test_the_best_two_prove_themselves_with_all_tokens(cell):
    """The rate that wins a quarter is too high for the whole; a finalist that fails gives its place to the next."""
    entry = ENTRY.model_copy(update={"finalists": 2})
    two, outcomes = Cell("gated-deltanet", entry, cell.recipe, 2), {}

    def known(trials, score):
        outcomes.update({t.id: done(score(t.rate)) for t in trials})

    quarter = two.wanted({})
    assert two.unknown({}) == 4
    known(quarter, lambda rate: rate)
    finalists = [t for t in two.wanted(outcomes) if t.id not in outcomes]
    assert [(t.stage, t.rate, t.tokens) for t in finalists] == [("sweep", 0.01, 4000), ("sweep", 0.003, 4000)]
    assert two.rate(outcomes) is None
    assert two.unknown(outcomes) == 2
    known(finalists, lambda rate: -rate)
    assert two.rate(outcomes) == 0.003
    assert [t.rate for t in two.finals(outcomes)] == [0.003, 0.003]
    outcomes[finalists[1].id] = FAILED
    assert [t.rate for t in two.wanted(outcomes) if t.id not in outcomes] == [0.001]
    outcomes[finalists[0].id] = FAILED
    known(two.sweep(outcomes)[-1][2:], lambda rate: 0.5)
    assert two.rate(outcomes) == 0.001
    assert not two.failed(outcomes)


def test_with_finalists_a_sweep_goes_on_with_all_tokens(cell):
    entry = ENTRY.model_copy(update={"finalists": 2, "extend": 2})
    wide, outcomes = Cell("gated-deltanet", entry, cell.recipe, 1), {}
    for expected in ([1000] * 3, [4000] * 2, [4000], [4000]):
        new = [t for t in wide.wanted(outcomes) if t.id not in outcomes]
        assert [t.tokens for t in new] == expected
        outcomes |= {t.id: done(t.rate) for t in new}
    assert wide.rate(outcomes) == new[0].rate == 0.111


def test_a_sweep_goes_on_where_its_best_rate_lies_at_an_end(cell):
    entry = ENTRY.model_copy(update={"extend": 2})
    wide = Cell("gated-deltanet", entry, cell.recipe, 1)
    outcomes = {}

    def grow(score):
        new = [t for t in wide.wanted(outcomes) if t.id not in outcomes]
        outcomes.update({t.id: done(score(t.rate)) for t in new})
        return [(t.stage, t.rate) for t in new]

    assert len(grow(lambda rate: rate)) == 3  # the greatest is the best
    assert grow(lambda rate: rate) == [("sweep", 0.0333)]
    assert grow(lambda rate: 0.0) == [("sweep", 0.111)]
    assert grow(lambda rate: 0.0) == [("final", 0.0333)]
    outcomes.clear()
    assert len(grow(lambda rate: -rate)) == 3  # the least
    assert grow(lambda rate: -1) == [("sweep", 0.000333)]
    assert grow(lambda rate: 0.0) == [("final", 0.001)]  # one step beyond was worse: no further
    assert [t.rate for t in wide.sweep(outcomes)[-1]] == [0.001, 0.003, 0.01, 0.000333]


def test_ids_are_of_what_the_result_depends_on(cell):
    first = cell.wanted({})[0]
    again = Cell("another name", ENTRY.model_copy(update={"note": "x"}), cell.recipe, 3).wanted({})[0]
    assert first.id == again.id
    wider = ENTRY.model_copy(update={"evaluate_batches": 99})
    assert Cell("g", wider, cell.recipe, 2).wanted({})[0].id != first.id
    assert os.path.basename(first.id) == first.id
