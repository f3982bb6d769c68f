"""Autoregressive generation: one parallel prefill, then one token at a time; the state is carried, never recomputed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from postformer.contract import state as states
from postformer.contract.context import EMPTY, Context
from postformer.model import evaluating
from postformer.sampling.policy import Policy, seen_in
from postformer.sampling.prefix import Prefix, check_prompt
from postformer.sampling.stepper import Stepper, seen

FREE = -1
"""In forced token ids: this row chooses for itself here."""

Interpose = Callable[[Tensor], "Tensor | Sequence[int] | None"]
Stop = int | Sequence[int] | Callable[[Tensor], Tensor]


class Piece(NamedTuple):
    """One generated column. All tensors are [B]."""

    token: Tensor
    """int64; 0 in a row that had stopped before."""
    log_probability: Tensor
    """Of the token under the model itself, before temperature and truncation; 0 in a stopped row. fp32."""
    forced: Tensor
    """bool: inserted by `interpose`."""
    live: Tensor
    """bool: False in a row that had stopped before."""
    watched: Mapping[str, Tensor] = EMPTY
    """By name: what the model published when it chose this token, [B, ...]; 0 in a stopped row."""


@dataclass(frozen=True)
class Trace:
    """What happened at each of the n generated columns; all but `length` and `after` are [B, n], as in Piece."""

    log_probability: Tensor
    forced: Tensor
    live: Tensor
    length: Tensor
    """[B] int64, generated tokens of each row, the one that stopped it included."""
    after: Prefix | None = None
    """From where every row can go on; None where nothing was generated."""
    watched: Mapping[str, Tensor] = field(default_factory=lambda: EMPTY)
    """By name, [B, n, ...]: what the model published when it chose each token, e.g. a filter memory's variance: how
    unsure it was of what it answered."""


class Generation(NamedTuple):
    """tokens [B, T + n] int64: the prompt (its padding included) and what follows; trace of the n new columns."""

    tokens: Tensor
    trace: Trace


def left_pad(prompts: Sequence[Sequence[int] | Tensor], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths -> (tokens [B, T] int64, valid [B, T] bool), aligned at their ends."""
    rows = [torch.as_tensor(p, dtype=torch.long) for p in prompts]
    length = max((len(row) for row in rows), default=0)
    if not rows or min(len(row) for row in rows) < 1:
        raise ValueError("every prompt needs at least one token: put a start token (for bytes, a newline) before it")
    tokens = torch.full((len(rows), length), pad)
    valid = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, length - len(row):] = row
        valid[i, length - len(row):] = True
    return tokens, valid


def generate(
    model: nn.Module, prompt: Tensor | Prefix, policy: Policy, max_new_tokens: int, *, valid: Tensor | None = None,
    generator: torch.Generator | None = None, interpose: Interpose | None = None, stop: Stop | None = None,
    watch: Sequence[str] = (),
) -> Generation:
    """Continue each row of prompt [B, T] int64 by at most `max_new_tokens` tokens, forced ones included.

    `prompt` may be a Prefix: rows that were read before, here or in another process (`prefill`, `trace.after`,
    `Prefix.load`), perhaps forked (`Prefix.select`). It stays as it is.
    `valid` [B, T] bool marks the tokens of left-padded prompts (see `left_pad`).
    `interpose(tokens [B, T + n])` is asked before each token; it returns None, or token ids to insert: [m] the same for
    every row, or [B, m] with -1 where a row is free to choose.
    `stop`: token id or ids that end a row, or `fn(tokens [B, T + n]) -> bool [B]`. A row that has stopped is idle and
    its tokens are 0. Generation ends when all rows have stopped.
    `watch`: names under which the design publishes something per token (`publish:` of a sublayer), for the trace.

    Raises ValueError for an empty prompt, impossible forced ids, or a name that is not published.
    """
    run = _Run(model, prompt, policy, max_new_tokens, valid, generator, interpose, stop, watch)
    columns = list(run.pieces())
    watched: Mapping[str, Tensor] = EMPTY
    if columns:
        # Stacked outside inference mode, so that the results may enter a training step.
        *parts, published = zip(*columns)
        token, log_probability, forced, live = (torch.stack(part, 1) for part in parts)
        watched = {name: torch.stack([each[name] for each in published], 1) for name in run.watch}
    else:
        token = run.history.tokens.new_zeros(run.batch, 0)
        log_probability, forced = token.float(), token.bool()
        live = forced
    trace = Trace(log_probability, forced, live, live.sum(1), run.after() if columns else None, watched)
    return Generation(torch.cat([run.history.prompt, token], 1), trace)


def stream(
    model: nn.Module, prompt: Tensor | Prefix, policy: Policy, max_new_tokens: int, *, valid: Tensor | None = None,
    generator: torch.Generator | None = None, interpose: Interpose | None = None, stop: Stop | None = None,
    watch: Sequence[str] = (),
) -> Iterator[Piece]:
    """`generate`, column by column as they come; same arguments."""
    yield from _Run(model, prompt, policy, max_new_tokens, valid, generator, interpose, stop, watch).pieces()


class _Run:
    """One call of `generate`."""

    def __init__(self, model: nn.Module, prompt: Tensor | Prefix, policy: Policy, max_new_tokens: int,
                 valid: Tensor | None, generator: torch.Generator | None, interpose: Interpose | None,
                 stop: Stop | None, watch: Sequence[str] = ()) -> None:
        self.model, self.policy, self.generator = model, policy, generator
        self.watch, self.watched = (watch,) if isinstance(watch, str) else tuple(watch), {}
        self.limit, self.interpose, self.stop = max_new_tokens, interpose, stop
        self.prefix = prompt if isinstance(prompt, Prefix) else None
        tokens = prompt.tokens if isinstance(prompt, Prefix) else prompt
        self.valid = prompt.valid if isinstance(prompt, Prefix) else valid
        if not isinstance(prompt, Prefix):
            check_prompt(prompt, valid)
        self.history, self.batch = _History(tokens, max_new_tokens), len(tokens)
        self.live = torch.ones(self.batch, dtype=torch.bool, device=tokens.device)
        self.kept: list[Tensor] = []  # live rows of each new column
        self.ended: dict[int, Any] = {}  # states of the rows that have stopped
        self.stepper: Stepper | None = None

    @torch.inference_mode()
    def pieces(self) -> Iterator[Piece]:
        with evaluating(self.model):
            yield from self._pieces()

    def _read(self) -> Tensor:
        """Whatever stands before the first new token -> logits [B, V] after it."""
        if self.prefix is not None:
            self.stepper = Stepper(self.model, states.map_state(torch.clone, self.prefix.state), self.limit, self.watch)
            return self._stepped(self.prefix.pending)
        tokens = self.history.tokens
        if tokens.shape[1] == 1:
            out = self.model(tokens, None, Context(consume=True))
            logits = out.logits[:, -1]
        else:
            last = torch.zeros_like(tokens, dtype=torch.bool)
            last[:, -1] = True
            out = self.model(tokens, None, Context(valid=self.valid, consume=True), select=last)
            logits = out.logits
        self.watched = {name: made[:, -1] for name, made in zip(self.watch, seen(out, self.watch))}
        self.stepper = Stepper(self.model, out.state, self.limit, self.watch)
        return logits

    def _stepped(self, tokens: Tensor) -> Tensor:
        assert self.stepper is not None
        logits = self.stepper.step(tokens)
        self.watched = self.stepper.watched
        return logits

    def _pieces(self) -> Iterator[Piece]:
        stopped = None if self.stop is None else _stopper(self.stop, self.live.device)
        history, interpose, seen = self.history, self.interpose, None
        queue: list[Tensor] = []  # forced columns [B] still to come
        never, everyone = torch.zeros_like(self.live), True
        while history.new < self.limit and (everyone or bool(self.live.any())):
            if interpose is not None and not queue:
                queue = _columns(interpose(history.tokens), self.batch, self.live.device)
            if self.stepper is None:
                logits = self._read()
                if self.policy.remembers:
                    seen = seen_in(history.tokens, self.valid, logits.shape[-1])
            else:
                logits = self._stepped(history.last)
            forced = queue.pop(0) if queue else None
            if forced is None:
                token, is_forced = self.policy.draw(logits, self.generator, seen), never
            else:
                is_forced = (forced != FREE) & self.live
                token = forced if bool(is_forced[self.live].all()) else torch.where(
                    is_forced, forced, self.policy.draw(logits, self.generator, seen))
            log_probability = logits.float().log_softmax(-1).gather(-1, token[:, None]).squeeze(-1)
            if not everyone:
                token, log_probability = token.masked_fill(~self.live, 0), log_probability.masked_fill(~self.live, 0.0)
            if seen is not None:
                seen.scatter_(1, token[:, None], True)
            history.append(token)
            self.kept.append(self.live)
            # A copy: a recorded step writes the next token's over them.
            watched = {name: made * self.live.view(-1, *(1,) * (made.ndim - 1)) for name, made in self.watched.items()}
            piece = Piece(token, log_probability, is_forced, self.live, watched)
            if stopped is not None:
                self._end(stopped(history.tokens) & self.live)
                everyone = bool(self.live.all())
            yield piece

    def _end(self, rows: Tensor) -> None:
        """These rows go no further: what they have read is set aside, since the step goes on for all."""
        assert self.stepper is not None
        for row in rows.nonzero().flatten().tolist():
            self.ended[row] = self.stepper.take([row])
        self.live = self.live & ~rows

    def after(self) -> Prefix:
        assert self.stepper is not None
        state = self.stepper.state
        if self.ended:
            state = states.concat([self.ended[row] if row in self.ended else self.stepper.take([row])
                                   for row in range(self.batch)])
        tokens, new = self.history.tokens, torch.stack(self.kept, 1)
        before = torch.ones_like(self.history.prompt, dtype=torch.bool) if self.valid is None else self.valid
        return Prefix(tokens, torch.cat([before, new], 1), state)


class _History:
    """Prompt and generated tokens in one buffer, so that nothing is copied per token."""

    def __init__(self, prompt: Tensor, room: int) -> None:
        self.buffer = torch.cat([prompt, prompt.new_zeros(prompt.shape[0], max(room, 0))], 1)
        self.start = self.length = prompt.shape[1]
        self.prompt = prompt

    @property
    def new(self) -> int:
        return self.length - self.start

    @property
    def tokens(self) -> Tensor:
        return self.buffer[:, :self.length]

    @property
    def last(self) -> Tensor:
        return self.buffer[:, self.length - 1]

    def append(self, column: Tensor) -> None:
        self.buffer[:, self.length] = column
        self.length += 1


def _columns(forced: Tensor | Sequence[int] | None, batch: int, device: torch.device) -> list[Tensor]:
    if forced is None:
        return []
    ids = torch.as_tensor(forced, dtype=torch.long, device=device)
    if ids.ndim == 1:
        ids = ids.expand(batch, -1)
    if ids.ndim != 2 or ids.shape[0] != batch or bool((ids < FREE).any()):
        raise ValueError(
            f"interpose returned ids of shape {tuple(ids.shape)}: give [m] for all rows or [{batch}, m], with -1 where "
            "a row is free to choose"
        )
    return list(ids.unbind(1))


def _stopper(stop: Stop, device: torch.device) -> Callable[[Tensor], Tensor]:
    if callable(stop):
        return lambda tokens: stop(tokens).to(device=device, dtype=torch.bool)
    ids = torch.tensor([stop] if isinstance(stop, int) else list(stop), device=device)
    return lambda tokens: torch.isin(tokens[:, -1], ids)
