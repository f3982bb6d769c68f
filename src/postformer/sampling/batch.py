"""Rows that join and leave at any time: one step for all that are at work, every row with its own state and policy."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from postformer.contract import state as states
from postformer.model import evaluating
from postformer.sampling.policy import Policy, seen_in
from postformer.sampling.prefix import Prefix, check_prompt, prefill
from postformer.sampling.stepper import Stepper
from postformer.sampling.stopping import StopText


@dataclass(eq=False)
class Row:
    """One continuation: what was asked for and what there is of it."""

    prefix: Prefix
    """What it continues; one row"""
    policy: Policy
    max_new_tokens: int
    generator: torch.Generator
    stop: frozenset[int]
    text: StopText | None
    tokens: list[int] = field(default_factory=list)
    """The new ones, the one that ended it included"""
    log_probability: list[float] = field(default_factory=list)
    """Of each under the model itself"""
    ended: str = ""
    """Why there is no more: "length", "stop" or "cancelled"; empty while it is at work or waiting"""
    after: Prefix | None = None
    """From where it can go on, once it has ended"""
    seen: Tensor | None = None

    @property
    def done(self) -> bool:
        return bool(self.ended)


class Batch:
    """At most `places` rows at work at a time, others wait. The tokens of a row are those it would have alone.

    `decode(ids) -> bytes` is needed for stop strings. While rows are at work the model must keep its parameters.
    """

    def __init__(self, model: nn.Module, places: int = 8,
                 decode: Callable[[Sequence[int]], bytes] | None = None) -> None:
        if places < 1:
            raise ValueError(f"places must be at least 1, not {places}")
        self.model, self.places, self.decode = model, places, decode
        self._waiting: deque[Row] = deque()
        self._rows: list[Row | None] = []
        self._stepper: Stepper | None = None

    def submit(self, prompt: Tensor | Sequence[int] | Prefix, policy: Policy, max_new_tokens: int, *,
               copies: int = 1, seed: int = 0, stop: int | Sequence[int] = (),
               stop_text: Sequence[str | bytes] = ()) -> list[Row]:
        """Continue a prompt [T] (or a Prefix of one row) `copies` times; it is read once. Copy i draws with seed + i.

        `stop`: ids that end a row. Raises ValueError for an empty prompt, or stop strings without `decode`.
        """
        if stop_text and self.decode is None:
            raise ValueError("stop strings need to know what tokens mean: give Batch a decode function")
        if max_new_tokens < 1 or copies < 1:
            raise ValueError(f"max_new_tokens ({max_new_tokens}) and copies ({copies}) must be at least 1")
        if not isinstance(prompt, Prefix):
            device = next(self.model.parameters()).device
            ids = torch.as_tensor(prompt, dtype=torch.long, device=device).reshape(1, -1)
            check_prompt(ids, None)
            prompt = prefill(self.model, ids)
        elif len(prompt.tokens) != 1:
            raise ValueError(f"a request continues one row, not {len(prompt.tokens)}: take one by prefix.select([i])")
        ids = frozenset([stop] if isinstance(stop, int) else stop)
        made = [Row(prompt, policy, max_new_tokens, torch.Generator().manual_seed(seed + i), ids,
                    StopText(stop_text) if stop_text else None) for i in range(copies)]
        self._waiting.extend(made)
        return made

    def cancel(self, row: Row) -> None:
        """The row ends here."""
        if row in self._waiting:
            self._waiting.remove(row)
            row.ended, row.after = "cancelled", row.prefix
        elif row in self._rows:
            self._leave(self._rows.index(row), "cancelled")

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or any(self._rows)

    def run(self) -> None:
        """Until no row is left."""
        while self.busy:
            self.step()

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """One token for every row at work, after those that wait have joined as far as there are places; the rows that
        got one."""
        with evaluating(self.model):
            self._join()
            return self._advance()

    def _join(self) -> None:
        working = sum(row is not None for row in self._rows)
        wanted = min(self.places, working + len(self._waiting))
        if not working:
            self._rows, self._stepper = [], None
        if wanted > len(self._rows):
            # By doubling: a stepper is made anew for every size.
            self._widen(min(self.places, 1 << (wanted - 1).bit_length()))
        for place, row in enumerate(self._rows):
            if row is None and self._waiting:
                new = self._waiting.popleft()
                self._rows[place] = new
                assert self._stepper is not None
                self._stepper.room = max(self._stepper.room, new.max_new_tokens)
                self._stepper.put([place], new.prefix.state)

    def _widen(self, size: int) -> None:
        fresh: Any = self.model.initial(size - len(self._rows))  # type: ignore[operator]
        state = fresh if self._stepper is None else states.concat([self._stepper.state, fresh])
        self._stepper = Stepper(self.model, states.map_state(torch.clone, state))
        self._rows += [None] * (size - len(self._rows))

    def _advance(self) -> list[Row]:
        if self._stepper is None:
            return []
        last = [0 if row is None else row.tokens[-1] if row.tokens else int(row.prefix.pending) for row in self._rows]
        logits = self._stepper.step(torch.tensor(last, device=next(self.model.parameters()).device))
        scores = logits.float().log_softmax(-1)
        greedy = logits.argmax(-1).tolist()
        moved = []
        for place, row in enumerate(self._rows):
            if row is None:
                continue
            if row.policy.remembers and row.seen is None:
                row.seen = seen_in(row.prefix.tokens, row.prefix.valid, logits.shape[-1])
            plain = row.policy.temperature == 0 and row.seen is None
            token = greedy[place] if plain else int(row.policy.draw(logits[place : place + 1], row.generator, row.seen))
            row.tokens.append(token)
            row.log_probability.append(float(scores[place, token]))
            if row.seen is not None:
                row.seen[0, token] = True
            if row.text is not None and self.decode is not None:
                row.text.push(self.decode([token]))
            if token in row.stop or (row.text is not None and row.text.done):
                self._leave(place, "stop")
            elif len(row.tokens) == row.max_new_tokens:
                self._leave(place, "length")
            moved.append(row)
        return moved

    def _leave(self, place: int, why: str) -> None:
        row = self._rows[place]
        assert row is not None
        assert self._stepper is not None
        row.after = row.prefix
        if row.tokens:
            new = torch.tensor([row.tokens], device=row.prefix.tokens.device)
            row.after = Prefix(torch.cat([row.prefix.tokens, new], 1),
                               torch.cat([row.prefix.valid, torch.ones_like(new, dtype=torch.bool)], 1),
                               self._stepper.take([place]))
        row.ended = why
        self._rows[place] = None
        self._stepper.put([place], self.model.initial(1))  # type: ignore[operator]
