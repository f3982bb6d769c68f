"""How unsure filter memories are of what they answer: the variance q^T P q of every read (Kalman, 2511.21016)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from postformer.contract.mixer import Mixer


def variance(model: Any, batch: tuple[Any, ...]) -> dict[str, Tensor]:
    """Place in the stack, "LAYER.SUBLAYER" -> variance [B, T, H] of the read of every filter memory, at least float32.

    It is the variance of each value channel of a head under the memory's own assumptions, before norm and gate; it
    falls where keys like the query were seen, and rises with time where something is forgotten.

    batch: (tokens [B, T], targets, context or None) as objectives take it, of which the targets are not used; what
    follows the tokens may be left out. Raises ValueError if no memory of the model publishes a variance.
    """
    tokens, ctx = batch[0], batch[2] if len(batch) > 2 else None
    found: dict[str, Tensor] = {}
    filters = {m: _place(name) for name, m in model.stack.named_modules() if isinstance(m, Mixer) and _publishes(m)}
    if not filters:
        raise ValueError("no memory of this model has a variance; give one whose design has a mixer of kind filter")

    def read(module: Any, args: Any, kwargs: Any, out: Any) -> None:
        if "variance" in out.published:
            found[filters[module]] = out.published["variance"]
            return
        # The model publishes what its design asks for; a copy that shares its parameters publishes this as well.
        other = copy.copy(module)
        other.wanted = frozenset({"variance"})
        found[filters[module]] = other.forward(*args, **kwargs).published["variance"]

    hooks = [m.register_forward_hook(read, with_kwargs=True) for m in filters]
    try:
        with torch.no_grad():
            model(tokens, None, ctx)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _publishes(mixer: Mixer) -> bool:
    design = getattr(mixer, "design", None)
    return design is not None and "variance" in mixer.traits(design).publishes and not any(
        isinstance(m, Mixer) for m in mixer.modules() if m is not mixer)


def _place(name: str) -> str:
    return name.removeprefix("layers.").replace(".sublayers.", ".").removesuffix(".mixer")
