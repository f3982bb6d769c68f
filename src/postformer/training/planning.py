"""What a run would take, before it is run: parameters, peak memory, time. Says what was measured and how."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from postformer.design import Recipe
from postformer.objective import Batch, NextToken
from postformer.training import run
from postformer.training.config import TrainConfig
from postformer.training.memory import out_of_memory, peak_memory, reset_peak
from postformer.training.progress import duration
from postformer.training.run import Source
from postformer.training.trainer import Trainer

MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """All sizes in bytes, times in seconds."""

    params: int
    steps: int
    tokens: int
    weights: int
    gradients: int
    optimiser: int
    activations: int
    """What is kept for the backward pass of one part of a batch."""
    peak_memory: int
    """Measured where possible (`memory_source` says), else the sum of the four above."""
    seconds_per_step: float
    seconds: float
    tokens_per_s: float
    device: str
    memory_source: str
    time_source: str

    def lines(self) -> list[str]:
        """The plan for a person."""
        parts = ", ".join(f"{name} {size / MIB:,.1f}" for name, size in (
            ("weights", self.weights), ("gradients", self.gradients), ("optimiser", self.optimiser),
            ("activations", self.activations)))
        return [
            f"parameters: {self.params:,}",
            f"steps: {self.steps:,} ({self.tokens:,} tokens) on {self.device}",
            f"peak memory: {self.peak_memory / MIB:,.1f} MiB ({parts}); {self.memory_source}",
            f"time: {duration(self.seconds)} at {self.seconds_per_step:.3g} s a step, {self.tokens_per_s:,.0f} "
            f"tokens/s; {self.time_source}",
        ]


def plan(recipe: Recipe, source: Source, config: TrainConfig) -> Plan:
    """Build the model, run a forward and backward pass of one sequence and two steps; keep nothing.

    source: of `corpus_source` or `task_source`. Raises OutOfMemory if even that does not fit.
    """
    run.check_vocabulary(recipe, source.vocab)
    return plan_model(run.initial_model(recipe, config), source.batch_at, config)


def plan_model(model: nn.Module, batch_at, config: TrainConfig) -> Plan:
    """`plan` of a built model, which is trained by two steps."""
    trainer = Trainer(model, NextToken(), batch_at, config, progress="quiet")
    device = trainer.device
    batch = Batch.of(batch_at(0))
    one = next(iter(batch.split(batch.tokens.shape[0])))
    with out_of_memory(config), trainer.autocast():
        kept = _kept_for_backward(model, one.to(device))
    trainer.optimisers.zero_grad()
    rows = -(-batch.tokens.shape[0] // config.accumulate)

    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads or threads)
    measured = reset_peak(device)
    with torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []):
        trainer.advance(0)
        began = time.monotonic()
        trainer.advance(1)  # reading its loss waits for the device
        seconds = time.monotonic() - began
    peak = peak_memory(device)
    torch.set_num_threads(threads)

    weights = _bytes(list(model.parameters()) + list(model.buffers()))
    gradients = _bytes([p for p in model.parameters() if p.requires_grad])
    optimiser = _bytes(list(trainer.optimisers.state().values()))
    estimate = weights + gradients + optimiser + kept * rows
    kept_says = f"what one sequence keeps for its backward pass, times {rows}"
    whose = "the process, PyTorch itself included" if device.type == "cpu" else "the device's allocator"
    memory_source = f"peak of {whose}, measured on two steps; activations: {kept_says}" if measured else (
        f"estimated as this sum; activations: {kept_says}; temporary buffers and the process itself (some 300 MiB) "
        "come on top")
    tokens = batch.tokens.numel()
    return Plan(
        params=sum(p.numel() for p in model.parameters()), steps=trainer.steps, tokens=tokens * trainer.steps,
        weights=weights, gradients=gradients, optimiser=optimiser, activations=kept * rows,
        peak_memory=peak if measured else estimate, seconds_per_step=seconds,
        seconds=seconds * trainer.steps, tokens_per_s=tokens / seconds, device=str(device),
        memory_source=memory_source,
        time_source="measured on the second of two steps; evaluation and checkpoints come on top",
    )


def _kept_for_backward(model: nn.Module, batch: Batch) -> int:
    """Bytes of distinct storages, other than parameters, that one forward pass saves for its backward pass."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = NextToken().loss(model, batch)
    loss.backward()
    return sum(found.values())


def _bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
