"""Prefix: rows that have been read, and what is needed to go on from there: forked, saved, loaded, joined."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from postformer.contract import state as states
from postformer.contract.context import Context
from postformer.model import evaluating


class Prefix(NamedTuple):
    """Rows as far as they go. The model has read every valid token of a row but the last, which it reads next."""

    tokens: Tensor
    """[B, T] int64"""
    valid: Tensor
    """[B, T] bool: False where a row has no token (padding, and after a row's end)"""
    state: Any
    """Of the model, after all valid tokens of a row but the last"""

    @property
    def pending(self) -> Tensor:
        """[B]: the last token of each row"""
        place = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        last = torch.where(self.valid, place, -1).amax(1)
        return self.tokens.gather(1, last[:, None]).squeeze(1)

    def select(self, rows: Sequence[int]) -> Prefix:
        """Some rows, in this order: [0] * n forks the first into n rows, without reading anything again."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.tokens.device)
        return Prefix(self.tokens[index], self.valid[index], states.select(self.state, rows))

    def save(self, path: str | Path) -> None:
        """Write it as a safetensors file."""
        save_file({"tokens": self.tokens.contiguous(), "valid": self.valid.contiguous(), **states.flatten(self.state)},
                  str(path))

    @classmethod
    def load(cls, path: str | Path, model: nn.Module) -> Prefix:
        """Read what `save` wrote, for the model that made it.

        Raises ValueError where the file does not fit this model's state.
        """
        try:
            held = load_file(str(path))
            tokens, valid = held["tokens"], held["valid"]
        except (OSError, KeyError, SafetensorError) as error:
            raise ValueError(f"{path} is no saved prefix: {error}") from None
        like: Any = model.initial(len(tokens))  # type: ignore[operator]
        wanted = states.leaves(like)
        found = [held.get(f"state.{i}") for i in range(len(wanted))]
        for i, (made, want) in enumerate(zip(found, wanted)):
            if made is None or made.shape[0] != want.shape[0] or made.shape[2:] != want.shape[2:]:
                shape = None if made is None else tuple(made.shape)
                raise ValueError(f"{path} was made by another model: its state's part {i} is {shape} where this one's "
                                 f"is {tuple(want.shape)}")
        if f"state.{len(wanted)}" in held:
            raise ValueError(f"{path} was made by another model: its state has more parts")
        device = wanted[0].device if wanted else tokens.device
        state = states.unflatten({k: v.to(device) for k, v in held.items()}, like)
        return cls(tokens.to(device), valid.to(device), state)


@torch.inference_mode()
def prefill(model: nn.Module, prompt: Tensor, valid: Tensor | None = None) -> Prefix:
    """Read prompts [B, T] int64 in parallel, all but the last token of each; `valid` as `left_pad` gives it.

    Raises ValueError for an empty prompt, or one that is not padded on the left.
    """
    check_prompt(prompt, valid)
    there = torch.ones_like(prompt, dtype=torch.bool) if valid is None else valid
    if prompt.shape[1] == 1:
        return Prefix(prompt, there, model.initial(len(prompt)))  # type: ignore[operator]
    none = torch.zeros_like(prompt[:, :-1], dtype=torch.bool)
    ctx = Context(valid=None if valid is None else valid[:, :-1], consume=True)
    with evaluating(model):
        return Prefix(prompt, there, model(prompt[:, :-1], None, ctx, select=none).state)


def check_prompt(prompt: Tensor, valid: Tensor | None) -> None:
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise ValueError(f"the prompt must be [batch, length >= 1], not {tuple(prompt.shape)}")
    if valid is not None and not bool(valid[:, -1].all()):
        raise ValueError("prompts are padded on the left: the last column of `valid` must be True everywhere")
