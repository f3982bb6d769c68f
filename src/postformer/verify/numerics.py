"""Checks of the numbers: the parallel form, its gradients, extremes, and that a call changes nothing."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from postformer.contract import state as states
from postformer.contract.mixer import Mixer
from postformer.contract.step import StepMemory
from postformer.kernels import use
from postformer.verify.check import EXACT, FP32, FP64, Found, check, driven
from postformer.verify.compare import error, finite, gradient_error, state_error
from postformer.verify.subject import Subject


def gradients(s: Subject, x: Tensor, state: Any, scale: float, backend: str) -> tuple[Any, Any, dict[str, Any]]:
    """Outputs, final state and all gradients (parameters, x, floating state leaves) of a random functional."""
    x = x.clone().requires_grad_()
    state = states.map_state(
        lambda leaf: leaf.detach().clone().requires_grad_(leaf.dtype.is_floating_point or leaf.dtype.is_complex), state)
    with use(backend=backend, decay_scale=scale):
        out, after = s(x, state)
    weight = torch.randn(out.y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(out.y)
    total = (out.y * weight).sum()
    for leaf in states.leaves(after):
        if leaf.requires_grad:
            total = total + (leaf.real if leaf.is_complex() else leaf).to(total.dtype).square().sum() * 1e-2
    named = {n: p for n, p in s.model.named_parameters() if p.requires_grad}
    past = {f"state.{i}": leaf for i, leaf in enumerate(states.leaves(state)) if leaf.requires_grad}
    inputs = {**named, "x": x, **past}
    found = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
    return out.y.detach(), states.detach(after), dict(zip(inputs, found))


def unrounded(s: Subject) -> str:
    """For the note of a check that takes the rounding out of quantised maps."""
    return "" if s.recipe.model.linear.smooth else ", maps unrounded"


@check("parallel = token by token, fp64: outputs, state, gradients; decay x 0.1, 5, 60")
def parallel(s: Subject) -> Found:
    start = states.detach(s(s.input(2, 5, 1))[1])
    worst, where = 0.0, ""
    for scale, length in ((0.1, 51), (5.0, 27), (60.0, 27)):
        x = s.input(2, length, 2)
        y, after, grads = gradients(s, x, start, scale, "auto")
        y_ref, after_ref, grads_ref = gradients(s, x, start, scale, "reference")
        gap, name = gradient_error(grads, grads_ref)
        found = {"outputs": error(y, y_ref), "state": state_error(after, after_ref), f"gradient of {name}": gap}
        top = max(found, key=lambda k: found[k])
        if found[top] > worst or not where:
            worst, where = found[top], f"{top}, decay x {scale:g}"
    return worst, FP64, "; ".join([where, *ways(s)])


def ways(s: Subject) -> list[str]:
    """How each kind of memory that is written step by step runs, in its own words."""
    return sorted({f"{m.design.kind} {m.parallel}" for m in s.model.modules() if isinstance(m, StepMemory)})


@check("parallel = token by token, fp32")
def parallel_fp32(s: Subject) -> Found:
    x = s.input(2, 67, 2)
    # One rounding that falls to the other side is a step of 1/127, however small the error that tipped it.
    with torch.no_grad(), use(backend="reference", rounding=False):
        truth = s(x)[0].y
    s.model.float()
    try:
        with torch.no_grad(), use(rounding=False):
            y = s(x.float())[0].y
    finally:
        s.model.double()
    return error(y.double(), truth), FP32, "against fp64 token by token" + unrounded(s)


@check("finite outputs and gradients: extreme gates, zero input, huge input")
def extreme(s: Subject) -> Found:
    bad = []
    for name, factor, gain, scale in (("zero input", 0.0, 1.0, 1.0), ("zero input from the start", 0.0, 1.0, 1.0),
                                      ("huge input", 1e4, 1.0, 1.0),
                                      ("huge input of every mixer", 1.0, 300.0, 1.0),
                                      ("decay x 2000", 1.0, 1.0, 2000.0)):
        with driven(s, gain):
            start = s.model.initial(2) if name.endswith("start") else s(s.input(2, 3, 22))[1]
            y, after, grads = gradients(s, s.input(2, 27, 21) * factor, start, scale, "auto")
        if not finite([y, *states.leaves(after), *grads.values()]):
            bad.append(name)
    return float(len(bad)), EXACT, ", ".join(bad)


@check("gradients = finite differences of the outputs", lambda traits: None if traits.exact_gradients else
       "the design declares gradients that are no derivatives")
def differences(s: Subject) -> Found:
    x, start = s.input(2, 19, 26), states.detach(s(s.input(2, 5, 1))[1])
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def total() -> Tensor:
        with use(rounding=False):  # what rounds has no derivative
            return (s(x, start)[0].y * weight).sum()

    named = {name: p for name, p in s.model.stack.named_parameters() if p.requires_grad}
    grads = dict(zip(named, torch.autograd.grad(total(), list(named.values()), allow_unused=True)))
    groups: dict[str, list[str]] = {}
    for name in named:
        groups.setdefault(".".join(name.split(".")[:4]), []).append(name)  # one sublayer
    worst, where, step = 0.0, "", 1e-6
    generator = torch.Generator().manual_seed(27)
    with torch.no_grad():
        for group, members in groups.items():
            # One direction of all its parameters, each weighted to matter as much as the others.
            along, told = {}, []
            for name in members:
                way = torch.randn(named[name].shape, generator=generator, dtype=torch.float64)
                g = grads[name]
                share = torch.zeros_like(way) if g is None else g * way
                weight_of = 1 / max(share.norm().item(), 1e-2)
                along[name] = way * weight_of
                told.append(share.sum() * weight_of)
            kept = {name: named[name].clone() for name in members}

            def moved(by: float, along=along, kept=kept) -> float:
                for name, way in along.items():
                    named[name].copy_(kept[name] + by * way)
                return total().item()

            slope = (moved(step) - moved(-step)) / (2 * step)
            moved(0.0)
            gap = abs(slope - torch.stack(told).sum().item()) / max(abs(slope), len(members) ** 0.5)
            if gap > worst or not where:
                worst, where = gap, group
    return worst, 1e-5, where + unrounded(s)


@check("the same with and without gradients, in training and in evaluation", lambda traits: None if
       traits.same_in_training else "the design declares that training chooses with the whole sequence in view")
def pure(s: Subject) -> Found:
    x = s.input(2, 37, 23)
    before = {name: value.clone() for name, value in s.model.state_dict().items()}
    y = s(x)[0].y.detach()
    worst = 0.0
    with torch.no_grad():
        worst = max(worst, error(s(x)[0].y, y))
    with torch.inference_mode():
        worst = max(worst, error(s(x)[0].y, y))
    s.model.eval()
    worst = max(worst, error(s(x)[0].y.detach(), y))
    s.model.train()
    if changed := _overwritten(s, x):
        return math.inf, 1e-12, f"{changed} overwrites its input"
    if learned := [name for name, value in s.model.state_dict().items() if not torch.equal(value, before[name])]:
        return math.inf, 1e-12, f"a call changes {learned[0]}; measure in the call, and learn in after_step"
    return worst, 1e-12, ""


def _overwritten(s: Subject, x: Tensor) -> str:
    """The first mixer that changes its x in place (two readers of one tensor would then see different things)."""
    before: dict[Any, int] = {}
    found: list[str] = []
    names: dict[Any, str] = {m: name for name, m in s.model.named_modules() if isinstance(m, Mixer)}

    def enter(mixer: Any, args: Any) -> None:
        before[mixer] = args[0]._version

    def leave(mixer: Any, args: Any, out: Any) -> None:
        if args[0]._version != before[mixer]:
            found.append(names[mixer])

    hooks: list[Any] = [m.register_forward_pre_hook(enter) for m in names]
    hooks += [m.register_forward_hook(leave) for m in names]
    with torch.no_grad():
        s(x)
    for hook in hooks:
        hook.remove()
    return found[0] if found else ""
