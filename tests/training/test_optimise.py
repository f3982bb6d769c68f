import math

import pytest
import torch
from fake import FakeModel
from pydantic import ValidationError

from postformer.objective import Batch, NextToken
from postformer.training import OptimiserConfig, ScheduleConfig, TrainConfig, Trainer
from postformer.training.optimise import Optimisers, schedule


def test_weight_decay_and_optimiser_follow_the_roles():
    groups = Optimisers(FakeModel(), OptimiserConfig(kind="muon", weight_decay=0.1, muon_learning_rate=0.02)).describe()
    found = {name: (g["optimiser"], g["weight_decay"], g["learning_rate"]) for g in groups for name in g["names"]}
    assert found == {
        "embedding.weight": ("AdamW", 0.0, 1e-3), "inner.bias": ("AdamW", 0.0, 1e-3),
        "inner.weight": ("Muon", 0.1, 0.02), "recurrent.weight": ("Muon", 0.1, 0.02),
    }
    groups = Optimisers(FakeModel(), OptimiserConfig()).describe()
    assert {g["optimiser"] for g in groups} == {"AdamW"}
    assert {tuple(g["names"]): g["weight_decay"] for g in groups} == {
        ("embedding.weight", "inner.bias"): 0.0, ("inner.weight", "recurrent.weight"): 0.1}


def test_decay_moves_only_what_decays():
    model = FakeModel()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimisers = Optimisers(model, OptimiserConfig(learning_rate=0.5, weight_decay=0.1))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimisers.step(0.5)
    for name, p in model.named_parameters():
        factor = 1 - 0.5 * 0.5 * 0.1 if name in ("inner.weight", "recurrent.weight") else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor)


def test_schedules():
    cosine = [schedule(s, 11, ScheduleConfig(warmup=2, final=0.1)) for s in range(11)]
    assert cosine[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert cosine[6] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert cosine[-1] == pytest.approx(0.1)
    wsd = [schedule(s, 10, ScheduleConfig(kind="wsd", warmup=0, decay=0.4, final=0.0)) for s in range(10)]
    assert wsd == pytest.approx([1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])
    constant = [schedule(s, 4, ScheduleConfig(kind="constant", warmup=0.5)) for s in range(4)]
    assert constant == pytest.approx([1 / 3, 2 / 3, 1, 1])
    for kind in ("cosine", "wsd", "constant"):
        assert schedule(0, 1, ScheduleConfig(kind=kind)) == 1.0  # a run of one step learns
        values = [schedule(s, 50, ScheduleConfig(kind=kind, warmup=100)) for s in range(50)]
        assert all(0 < v <= 1 for v in values)


def test_accumulation_gives_the_same_gradient_also_with_unequal_scoring():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (6, 9), generator=generator)
    targets = torch.randint(0, 256, (6, 9), generator=generator)
    targets[0, 1:] = -100
    targets[4:] = -100
    norms, losses = [], []
    for parts in (1, 3, 6):
        trainer = Trainer(FakeModel(), NextToken(), lambda step: Batch(tokens, targets),
                          TrainConfig(steps=2, batch_size=6, accumulate=parts), progress="quiet")
        line = trainer.advance(0)
        norms.append(line["grad_norm"])
        losses.append(line["loss"])
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_bfloat16_trains_close_to_float32(batch_at):
    losses = []
    for dtype in ("float32", "bfloat16"):
        model = FakeModel()
        trainer = Trainer(model, NextToken(), batch_at, TrainConfig(steps=5, dtype=dtype), progress="quiet")
        losses.append([trainer.advance(s)["loss"] for s in range(5)])
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("fields", [
    {"steps": 1, "optimizer": {}}, {"steps": 1, "optimiser": {"lr": 1}}, {}, {"steps": 1, "tokens": 1},
    {"steps": 1, "batch_size": 2, "accumulate": 3}, {"steps": 1, "optimiser": {"betas": (0.9, 1.0)}},
    {"steps": 1, "clip": 0}, {"steps": 0}, {"steps": 1, "optimiser": {"learning_rate": float("nan")}},
])
def test_impossible_configurations_are_refused(fields):
    with pytest.raises(ValidationError):
        TrainConfig(**fields)


def test_tokens_become_steps():
    assert TrainConfig(tokens=1000, batch_size=2, length=100).total_steps == 5
    assert TrainConfig(tokens=1001, batch_size=2, length=100).total_steps == 6
