"""TrainConfig: everything about a training run that is not the design and not the data."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Config(BaseModel):
    """Frozen; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class OptimiserConfig(Config):
    """adamw: AdamW (1711.05101) for everything. muon: Muon (momentum, orthogonalised) for 2-D hidden matrices and AdamW
    for embeddings, head, gates, norms and biases."""

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak, of AdamW."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled; only of parameters whose role decays."""
    muon_learning_rate: float | None = Field(default=None, gt=0)
    """Peak, of Muon; None: learning_rate. Updates are scaled to the size of AdamW's (2502.16982), so that one rate can
    serve both."""
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)

    @model_validator(mode="after")
    def _betas(self) -> OptimiserConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), not {self.betas}")
        return self


class ScheduleConfig(Config):
    """Learning rate over the steps, as a multiple of the peak; see `optimise.schedule`."""

    kind: Literal["cosine", "wsd", "two-stage", "constant"] = "cosine"
    warmup: float = Field(default=0.02, ge=0)
    """Below 1: a share of all steps; from 1 on: a number of steps."""
    final: float = Field(default=0.1, ge=0, le=1)
    """Multiple of the peak at the last step (constant: unused)."""
    decay: float = Field(default=0.2, gt=0, le=1)
    """wsd: share of all steps that decays."""
    second: float = Field(default=2 / 3, gt=0, le=1)
    """two-stage: multiple of the peak in the second half, which has no weight decay."""


class TrainConfig(Config):
    """How a model is trained. Give `steps` or `tokens`."""

    steps: int | None = Field(default=None, ge=1)
    """Optimiser steps."""
    tokens: int | None = Field(default=None, ge=1)
    """Instead of steps: at least so many tokens, batch_size * length a step."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences of one optimiser step."""
    length: int = Field(default=256, ge=1)
    """Tokens of one sequence."""
    accumulate: int = Field(default=1, ge=1)
    """Parts that the batch is computed in, one after the other: same gradient, less memory."""
    optimiser: OptimiserConfig = OptimiserConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the whole gradient; None: no clipping."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations (autocast). Parameters, optimiser and memory states stay float32."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of layers and compute the rest again in the backward pass: less memory, a third slower."""
    seed: int = Field(default=0, ge=0)
    """Of the initial weights, the batches and everything random; the batch of step s depends on (seed, s) alone."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations on the validation split; None: only at the end."""
    evaluate_batches: int = Field(default=16, ge=1)
    """Validation batches of one evaluation during training; the final one takes four times as many."""
    checkpoint_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; None: every ten minutes. There is always one at the end and when interrupted."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; None: as PyTorch is set. A resumed run takes those of its start, since the sums depend on it."""
    time_limit: float | None = Field(default=None, gt=0)
    """Seconds after which a session stops, evaluates and saves. The schedule does not know of it: for a run that should
    take a given time, choose `steps` by `plan`."""
    until: float | None = None
    """Of a task: stop at the first evaluation (`evaluate_every`) whose metric is as good as this at every setting;
    negative where less is better. None: run all steps."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    start: str | None = None
    """Initial weights: a run directory (its newest checkpoint) or a weights file. What has the same name is taken, also
    by maps of another kind (`model.linear`); the rest is named and stays as the seed draws it."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give either steps or tokens: the length of the run")
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate = {self.accumulate} parts of a batch of {self.batch_size}: accumulate may be at most "
                "batch_size"
            )
        return self

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.steps or math.ceil((self.tokens or 1) / (self.batch_size * self.length))
