"""Training: one trainer, its optimisers and checkpoints, and runs that record themselves.

    from postformer import data, design, training

    recipe = design.load("gated-deltanet")
    config = training.TrainConfig(steps=1000, batch_size=16, length=256)
    result = training.train_language(recipe, data.load_corpus("stdlib"), config, "runs/first")
    result.validation["bits_per_byte"]
"""

from postformer.training.checkpoint import load_weights, save_weights
from postformer.training.config import OptimiserConfig, ScheduleConfig, TrainConfig
from postformer.training.errors import (
    CheckpointError,
    DiskFull,
    Diverged,
    Interrupted,
    OutOfMemory,
    RunExists,
    RunLocked,
    TrainingError,
)
from postformer.training.evaluate import evaluate_split, evaluate_task
from postformer.training.planning import Plan, plan
from postformer.training.record import Result, read_result, read_run
from postformer.training.run import corpus_source, load_run, resume, task_source, train_language, train_task
from postformer.training.stages import Stage, read_stages, resume_stages, staged, train_stages
from postformer.training.trainer import Trainer

__all__ = [
    "CheckpointError",
    "DiskFull",
    "Diverged",
    "Interrupted",
    "OptimiserConfig",
    "OutOfMemory",
    "Plan",
    "Result",
    "RunExists",
    "RunLocked",
    "ScheduleConfig",
    "Stage",
    "TrainConfig",
    "Trainer",
    "TrainingError",
    "corpus_source",
    "evaluate_split",
    "evaluate_task",
    "load_run",
    "load_weights",
    "plan",
    "read_result",
    "read_run",
    "read_stages",
    "resume",
    "resume_stages",
    "save_weights",
    "staged",
    "task_source",
    "train_language",
    "train_stages",
    "train_task",
]
