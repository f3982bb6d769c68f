"""Optimisers by the role of each parameter, and learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from postformer.training.config import OptimiserConfig, ScheduleConfig


class DefaultRole(NamedTuple):
    """Role of a parameter in a model that declares none."""

    kind: str
    decay: bool


def schedule(step: int, steps: int, config: ScheduleConfig) -> float:
    """Learning rate of step (0 .. steps - 1) as a multiple of the peak.

    Linear warmup w, reaching 1 at step w; then
    cosine: from 1 to `final` along half a cosine (1608.03983);
    wsd: 1, then in the last `decay` share of steps linearly to `final` (warmup-stable-decay, 2404.06395);
    two-stage: linearly from 1 to `final`, in the second half times `second` (for ternary weights, 2402.17764);
    constant: 1.
    """
    warmup = config.warmup * steps if config.warmup < 1 else config.warmup
    warmup = min(int(warmup), steps - 1)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.kind == "constant":
        return 1.0
    start = warmup if config.kind != "wsd" else max(warmup, steps - math.ceil(config.decay * steps) - 1)
    if step <= start or steps - 1 <= start:
        return 1.0
    done = min((step - start) / (steps - 1 - start), 1.0)
    share = 0.5 * (1 + math.cos(math.pi * done)) if config.kind == "cosine" else 1 - done
    multiple = config.final + (1 - config.final) * share
    return multiple * config.second if _second(step, steps, config) else multiple


def decay_schedule(step: int, steps: int, config: ScheduleConfig) -> float:
    """Weight decay of step (0 .. steps - 1) as a multiple of the configured one: 1, and 0 in the second half of
    two-stage."""
    return 0.0 if _second(step, steps, config) else 1.0


def _second(step: int, steps: int, config: ScheduleConfig) -> bool:
    return config.kind == "two-stage" and 2 * step >= steps


def roles(model: Any) -> Mapping[str, Any]:
    """The role of every trainable parameter by name; of a model without `roles`, 2-D matrices decay, nothing else."""
    declared = model.roles() if hasattr(model, "roles") else {}
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim == 2
            found[name] = declared.get(name) or DefaultRole("matrix" if matrix else "gate", matrix)
    return found


class Optimisers:
    """One or two torch optimisers that act as one; their state is a flat mapping of tensors by parameter name."""

    def __init__(self, model: nn.Module, config: OptimiserConfig) -> None:
        self.config = config
        self.names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.names:
            raise ValueError("no parameter of the model is trainable: set requires_grad on some")
        by_role = roles(model)
        groups: dict[tuple[str, bool], list[tuple[str, Tensor]]] = {}
        for name, parameter in self.names.items():
            role = by_role[name]
            muon = config.kind == "muon" and role.kind == "matrix" and parameter.ndim == 2
            groups.setdefault(("muon" if muon else "adamw", bool(role.decay)), []).append((name, parameter))
        self.optimisers: list[torch.optim.Optimizer] = []
        adamw = self._groups(groups, "adamw")
        if adamw:
            self.optimisers.append(torch.optim.AdamW(
                adamw, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=_can_fuse(self.names),
            ))
        muon = self._groups(groups, "muon")
        if muon:
            self.optimisers.append(torch.optim.Muon(
                muon, lr=self._peak("muon"), momentum=config.muon_momentum, adjust_lr_fn="match_rms_adamw",
            ))

    def _groups(self, groups: Mapping, kind: str) -> list[dict[str, Any]]:
        return [
            {"params": [p for _, p in members], "weight_decay": self._decay(decay), "decay": self._decay(decay),
             "names": [name for name, _ in members], "peak": self._peak(kind)}
            for (owner, decay), members in groups.items() if owner == kind
        ]

    def _decay(self, decays: bool) -> float:
        return self.config.weight_decay if decays else 0.0

    def _peak(self, kind: str) -> float:
        muon = self.config.muon_learning_rate if kind == "muon" else None
        return self.config.learning_rate if muon is None else muon

    def step(self, multiple: float, decay: float = 1.0) -> None:
        """One update at `multiple` of the peak learning rates and `decay` of the weight decay; drops the gradients."""
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"], group["weight_decay"] = group["peak"] * multiple, group["decay"] * decay
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)

    def describe(self) -> list[dict[str, Any]]:
        """Optimiser, weight decay, peak learning rate and parameter names of each group."""
        return [
            {"optimiser": type(optimiser).__name__, "weight_decay": group["decay"],
             "learning_rate": group["peak"], "names": list(group["names"])}
            for optimiser in self.optimisers for group in optimiser.param_groups
        ]

    def state(self) -> dict[str, Tensor]:
        """All state tensors, by `parameter name|state name`."""
        found = {}
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                for name, parameter in zip(group["names"], group["params"], strict=True):
                    for key, value in optimiser.state.get(parameter, {}).items():
                        found[f"{name}|{key}"] = torch.as_tensor(value).detach()
        return found

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `state`. Raises KeyError if a tensor belongs to no trainable parameter."""
        unknown = {key.rsplit("|", 1)[0] for key in tensors} - set(self.names)
        if unknown:
            raise KeyError(f"optimiser state of unknown parameters {sorted(unknown)[:3]}")
        for optimiser in self.optimisers:
            optimiser.state.clear()
        owner = {id(p): o for o in self.optimisers for group in o.param_groups for p in group["params"]}
        for path, value in tensors.items():
            name, key = path.rsplit("|", 1)
            parameter = self.names[name]
            # Fresh memory: kernels may round differently on the odd addresses of a mapped file.
            like = parameter if value.shape == parameter.shape else value
            target = torch.empty_like(like, dtype=value.dtype, device=parameter.device)
            owner[id(parameter)].state[parameter][key] = target.copy_(value)


def _can_fuse(parameters: Mapping[str, Tensor]) -> bool:
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda", "mps") for p in parameters.values())
