"""Every entry that says so can be learned: the recipe it names reaches 0.9 at the easiest setting."""

import pytest

from postformer.study.cell import Cell
from postformer.study.entry import TIERS, Entry, tier
from postformer.task import setting_name
from postformer.training import evaluate_task, load_run, train_task

ENTRIES = {f"{name}-{key}": entry for name in TIERS for key, entry in tier(name).items()}
LONG = ("paper", "recall", "palimpsest")
CLAIMED = {key: entry for key, entry in ENTRIES.items() if entry.learned and not key.startswith(LONG)}
"""Those that take seconds or a minute"""


@pytest.mark.parametrize("name", CLAIMED)
def test_it_is_learned(name, tmp_path):
    entry: Entry = CLAIMED[name]
    learned = entry.learned
    task = entry.make()
    cell = Cell(learned.recipe, entry, entry.sized(learned.recipe), 1)
    trial = cell.trial("final", learned.rate, 0, learned.tokens)
    train_task(trial.made, entry.task, None, trial.config(), tmp_path / "run", options=entry.options, progress="quiet")
    found = evaluate_task(load_run(tmp_path / "run")[1], task, [learned.setting], batch_size=64, batches=8,
                          stream="test")[setting_name(learned.setting)][task.metric]
    assert learned.reached(task, found)
    if task.better == "higher":
        assert found > (1 + task.chance(learned.setting)) / 2


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_make_sense(name):
    """Its task is made, its rates ascend, and one that nobody learned says what was seen."""
    entry = ENTRIES[name]
    task = entry.make()
    assert task.difficulties.train
    assert task.difficulties.evaluate
    assert list(entry.rates) == sorted(entry.rates)
    assert entry.learned or entry.note, "no recipe is known to learn it: say what was tried"
    if entry.learned:
        easiest = (task.difficulties.inside or task.difficulties.evaluate)[0]
        assert entry.learned.setting in task.difficulties.evaluate
        assert entry.learned.setting == easiest
        assert entry.learned.tokens <= entry.tokens
