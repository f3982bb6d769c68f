"""Evaluation: bits per byte of a split, accuracy on a task. Both change nothing in the model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from postformer.data import Batches
from postformer.model import evaluating
from postformer.objective import Batch, NextToken
from postformer.task import Setting, Task, seeded, setting_name


def evaluate_split(
    model: nn.Module, split: np.ndarray, length: int, batch_size: int, *, batches: int | None = None, seed: int = 0
) -> dict[str, float]:
    """-> {"loss": nats per byte, "bits_per_byte", "bytes": how many were scored}.

    split [N] uint8 in windows of `length` bytes, each seen without what came before it. `batches` None: the whole
    split, every byte scored once; else so many batches of windows drawn by `seed`, always the same ones.
    """
    source = Batches(split, length, batch_size, seed)
    windows = source.sequential() if batches is None else ((source.at(i), 0) for i in range(batches))
    objective, device = NextToken(), next(model.parameters()).device
    total, count = 0.0, 0
    with evaluating(model), torch.no_grad():
        for tokens, _ in windows:
            _, metrics = objective.loss(model, Batch.windows(tokens).to(device))
            total += float(metrics["loss"]) * metrics["tokens"]
            count += metrics["tokens"]
    return {"loss": total / count, "bits_per_byte": total / count / math.log(2), "bytes": count}


def evaluate_task(
    model: nn.Module, task: Task, settings: Sequence[Setting], *, batch_size: int, batches: int, seed: int = 0,
    stream: str = "validation",
) -> dict[str, dict[str, float]]:
    """-> for each setting's name, the means of what `task.measure` returns.

    Batch i of a setting depends on (seed, stream, setting, i): other streams ("test") are other problems.
    """
    device, found, problems = next(model.parameters()).device, {}, task.on(stream)
    with evaluating(model), torch.no_grad():
        for setting in settings:
            sums: dict[str, float] = {}
            for i in range(batches):
                batch = problems.batch(setting, batch_size, seeded(seed, stream, setting_name(setting), i)).to(device)
                logits = model(batch.tokens, None, batch.ctx, select=batch.scored).logits
                for name, value in task.measure(logits, batch).items():
                    sums[name] = sums.get(name, 0.0) + value / batches
            found[setting_name(setting)] = sums
    return found
