import pytest
import torch

from postformer import task
from postformer.task import IGNORE, METRICS, Difficulties, Task, TaskBatch, TaskError, registry

NAMES = ["group-a4xz5", "group-a5", "group-s3", "group-s4", "group-s5", "group-z60", "mqar", "parity"]
NAMES += ["bytes", "recall-perplexity"]
NAMES += ["forgetting-mqar", "in-context-recall", "noisy-recall", "fuzzy-recall", "selective-copying", "memorization"]
NAMES += ["compression"]
NAMES += ["aggregate-count", "aggregate-mode", "aggregate-user", "composition", "copy", "dyck", "lost-in-the-middle"]
NAMES += ["modular-arithmetic", "modular-arithmetic-brackets", "needle", "passkey", "phone-book", "pointer-chasing"]
NAMES += ["documents", "reverse"]


class Echo(Task):
    """Repeat the token; scored at odd positions."""

    name = "echo-test"
    vocab = 4
    difficulties = Difficulties(train=(4, 6), inside=(4,), outside=(8,))

    def describe(self):
        return "Repeat the token."

    def chance(self, setting):
        return 1 / 4

    def check(self, setting):
        if setting < 2:
            raise TaskError("too short")

    def generate(self, setting, batch_size, generator):
        tokens = torch.randint(4, (batch_size, setting), generator=generator)
        targets = tokens.clone()
        targets[:, ::2] = IGNORE
        return TaskBatch(tokens, targets)


@pytest.fixture
def clean_registry(monkeypatch):
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))


def test_the_score_by_hand():
    targets = torch.tensor([[IGNORE, 1, 2, IGNORE], [3, IGNORE, IGNORE, 0]])
    batch = TaskBatch(torch.zeros_like(targets), targets)
    echo = Echo()
    assert echo.score(torch.tensor([[9, 1, 2, 9], [3, 9, 9, 0]]), batch) == dict.fromkeys(METRICS, 1.0)
    assert echo.score(torch.tensor([[0, 1, 0, 0], [3, 0, 0, 0]]), batch) == {
        "token_accuracy": 0.75,
        "exact_match": 0.5,
        "last_accuracy": 0.5,
    }
    assert echo.score(torch.tensor([[0, 0, 2, 0], [0, 0, 0, 0]]), batch) == {
        "token_accuracy": 0.5,
        "exact_match": 0.0,
        "last_accuracy": 1.0,
    }


def test_an_ignored_target_is_never_right_by_predicting_it():
    targets = torch.tensor([[IGNORE, 1]])
    score = Echo().score(torch.tensor([[IGNORE, 0]]), TaskBatch(targets, targets))
    assert score == dict.fromkeys(METRICS, 0.0)


def test_what_cannot_be_scored_is_refused():
    targets = torch.tensor([[IGNORE, 1], [IGNORE, IGNORE]])
    batch = TaskBatch(targets, targets)
    with pytest.raises(TaskError, match="no scored position"):
        Echo().score(targets, batch)
    with pytest.raises(TaskError, match=r"logits.argmax\(-1\)"):
        Echo().score(torch.zeros(2, 2, 4), batch)


def test_training_draws_from_the_whole_mixture():
    echo = Echo()
    lengths = [echo.train_batch(3, task.seeded(0, "train", step)).tokens.shape[1] for step in range(40)]
    assert set(lengths) == {4, 6}
    assert 8 <= lengths.count(4) <= 32
    assert echo.difficulties.evaluate == (4, 8)


def test_seeded_depends_on_every_key():
    def draw(*keys):
        return torch.rand(4, generator=task.seeded(*keys)).tolist()

    assert draw(0, "train", 1) == draw(0, "train", 1)
    different = [draw(0, "train", 1), draw(1, "train", 1), draw(0, "validation", 1), draw(0, "train", 2), draw(0, "1")]
    assert len({tuple(numbers) for numbers in different}) == 5


def test_registering_and_loading(clean_registry):
    task.register(Echo)
    task.register(Echo)  # a notebook's cell run twice
    assert isinstance(task.load("echo-test"), Echo)
    assert "echo-test" in task.names()
    task.register("another-name")(Echo)
    assert isinstance(task.load("another-name"), Echo)
    with pytest.raises(TaskError, match="already registered by"):
        task.register("mqar")(Echo)
    with pytest.raises(TaskError, match="has no `name`"):
        task.register(lambda: Echo())


def test_an_installed_package_adds_tasks(monkeypatch):
    class Point:
        name = "from-a-package"

        def load(self):
            return Echo

    asked = []
    monkeypatch.setattr(registry, "entry_points", lambda group: asked.append(group) or [Point()])
    registry._installed.cache_clear()
    try:
        assert isinstance(task.load("from-a-package"), Echo)
        assert "from-a-package" in task.names()
        assert asked == ["postformer.tasks"]
    finally:
        registry._installed.cache_clear()


def test_unknown_names_and_options_name_the_nearest():
    with pytest.raises(TaskError, match=r"no task is named 'group-s33' \(did you mean 'group-s3'\?\); there are: "):
        task.load("group-s33")
    with pytest.raises(TaskError, match=r"task mqar has no option 'vocabulary' \(did you mean 'vocab'\?\)"):
        task.load("mqar", vocabulary=64)
    assert isinstance(TaskError("x"), ValueError)


def test_settings_are_written_as_one_word():
    assert task.setting_name(16) == "16"
    assert task.setting_name((64, 8)) == "64x8"


@pytest.mark.parametrize("name", NAMES)
def test_every_task_keeps_the_contract(name):
    loaded = task.load(name)
    assert loaded.name == name
    assert "arXiv" in loaded.describe()
    assert loaded.describe().count("\n") == 0
    assert loaded.difficulties.inside
    assert loaded.difficulties.outside
    for setting in loaded.difficulties.train + loaded.difficulties.evaluate:
        batch = loaded.batch(setting, 5, task.seeded(0))
        length = setting if isinstance(setting, int) else setting[0]
        assert batch.tokens.shape == batch.targets.shape == (5, length)
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64
        assert batch.tokens.min() >= 0
        assert batch.tokens.max() < loaded.vocab
        assert batch.scored.any(1).all()
        assert batch.targets[batch.scored].min() >= 0
        assert batch.targets.max() < loaded.vocab
        assert batch.targets[~batch.scored].eq(IGNORE).all()
        assert loaded.score(batch.targets, batch) == dict.fromkeys(METRICS, 1.0)
        chance, shortcut = loaded.chance(setting), loaded.shortcut(setting)
        assert 0 < chance <= shortcut < 1 if loaded.better == "higher" else 0 < shortcut <= chance
        again = loaded.batch(setting, 5, task.seeded(0))
        assert torch.equal(again.tokens, batch.tokens)
        assert torch.equal(again.targets, batch.targets)
        assert not torch.equal(loaded.batch(setting, 5, task.seeded(1)).tokens, batch.tokens)
    with pytest.raises(TaskError, match="at least 1"):
        loaded.batch(loaded.difficulties.train[0], 0, task.seeded(0))


@pytest.mark.parametrize("name", NAMES)
def test_the_global_random_state_plays_no_part(name):
    loaded = task.load(name)
    state = torch.random.get_rng_state()
    loaded.train_batch(4, task.seeded(0))
    assert torch.equal(state, torch.random.get_rng_state())
