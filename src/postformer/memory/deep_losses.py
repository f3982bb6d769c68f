"""Inner losses of deep memories: what a memory's weights are to lower at every token.

A loss is known by a name. Its gradient with respect to the prediction is written out for the built-in ones; a user's
own is a function of (prediction, target), registered with `@loss("name")` or offered by a package under the entry-point
group `postformer.losses`, and differentiated by torch.func:

    @loss("log-cosh")
    def log_cosh(prediction, target):              # [..., d], [..., d] -> [...]
        return torch.log(torch.cosh(prediction - target)).sum(-1)

Its gradient must be finite where both are zero: so are the places of tokens that do not exist.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

import torch
from torch import Tensor

from postformer.design.base import nearest

GROUP = "postformer.losses"
BUILT_IN = ("dot", "l2", "lp", "huber")
SMOOTH = 1e-6
_functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
F = TypeVar("F", bound=Callable[..., Any])


def loss(name: str) -> Callable[[F], F]:
    """Decorator: this function (prediction [..., d], target [..., d]) -> [...] is the inner loss of that name."""
    def add(function: F) -> F:
        known = _functions.get(name)
        if name in BUILT_IN or (known is not None and _where(known) != _where(function)):
            raise ValueError(f"there is a loss '{name}' already; give {function.__name__} a name of its own")
        _functions[name] = function
        return function
    return add


def _where(function: Any) -> tuple[Any, Any]:
    return getattr(function, "__module__", None), getattr(function, "__qualname__", None)


@cache
def _offered() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=GROUP))


def losses() -> list[str]:
    """Every loss that a design may name here."""
    return sorted({*BUILT_IN, *_functions, *(e.name for e in _offered())})


def resolve(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A user's loss function of this name. ValueError for an unknown one."""
    if name not in _functions:
        found = [e for e in _offered() if e.name == name]
        if not found:
            raise ValueError(f"unknown loss '{name}'.{nearest(name, losses())} A loss of your own is a function with "
                             f"the decorator postformer.memory.deep_losses.loss, or an entry point in {GROUP}.")
        try:
            _functions[name] = found[0].load()
        except (ImportError, AttributeError) as e:
            raise ValueError(f"the entry point of loss '{name}' ({found[0].value}) cannot be loaded: {e}") from e
    return _functions[name]


def slope(name: str, p: float = 2.0) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """(prediction [..., d], target [..., d], extra) -> gradient [..., d] of the loss with respect to the prediction.

    dot -<y, v>; l2 1/2 ||y - v||^2; lp 1/p sum (r^2 + 1e-6)^(p/2); huber 1/2 ||r||^2 up to ||r|| = delta, then linear,
    with delta = extra [..., 1].
    """
    if name == "dot":
        return lambda y, v, extra: -v
    if name == "l2":
        return lambda y, v, extra: y - v
    if name == "lp":
        return lambda y, v, extra: _lp(y - v, p)
    if name == "huber":
        return lambda y, v, extra: _huber(y - v, extra)
    function = resolve(name)
    return lambda y, v, extra: differentiated(name, function, y, v)


def _lp(r: Tensor, p: float) -> Tensor:
    return r * (r.square() + SMOOTH).pow(p / 2 - 1)


def _huber(r: Tensor, delta: Tensor | None) -> Tensor:
    assert delta is not None
    reach = torch.maximum(r.square().sum(-1, keepdim=True), delta.square())
    return r * delta * torch.rsqrt(reach.clamp_min(1e-30))


def differentiated(name: str, function: Callable[[Tensor, Tensor], Tensor], y: Tensor, v: Tensor) -> Tensor:
    """The gradient of sum function(y, v) with respect to y, whether or not gradients are being recorded."""
    def total(prediction: Tensor) -> Tensor:
        value = function(prediction, v)
        if not isinstance(value, Tensor) or value.shape != y.shape[:-1]:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss '{name}' returned {got} for predictions of {tuple(y.shape)}; it must return one "
                             f"number per prediction, {tuple(y.shape[:-1])}: sum over the last dimension only")
        return value.sum()

    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            y, v = y.clone(), v.clone()
            return torch.func.grad(total)(y)
    return torch.func.grad(total)(y)
