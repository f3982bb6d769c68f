"""Autoregressive generation: one parallel prefill, then one token at a time; the state is carried, never recomputed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from postformer.contract.context import Context
from postformer.sampling.policy import Policy

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


@dataclass(frozen=True)
class Trace:
    """What happened at each of the n generated columns; all but `length` and `state` are [B, n], as in Piece."""

    log_probability: Tensor
    forced: Tensor
    live: Tensor
    length: Tensor
    """[B] int64, generated tokens of each row, the one that stopped it included."""


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
    model: nn.Module, prompt: Tensor, policy: Policy, max_new_tokens: int, *, valid: Tensor | None = None,
    generator: torch.Generator | None = None, interpose: Interpose | None = None, stop: Stop | None = None,
) -> Generation:
    """Continue each row of prompt [B, T] int64 by at most `max_new_tokens` tokens, forced ones included.

    `valid` [B, T] bool marks the tokens of left-padded prompts (see `left_pad`).
    `interpose(tokens [B, T + n])` is asked before each token; it returns None, or token ids to insert: [m] the same for
    every row, or [B, m] with -1 where a row is free to choose.
    `stop`: token id or ids that end a row, or `fn(tokens [B, T + n]) -> bool [B]`. A row that has stopped is idle: its
    state no longer changes and its tokens are 0. Generation ends when all rows have stopped.

    Raises ValueError for an empty prompt or impossible forced ids.
    """
    columns = list(stream(model, prompt, policy, max_new_tokens, valid=valid, generator=generator,
                          interpose=interpose, stop=stop))
    if columns:
        # Stacked outside inference mode, so that the results may enter a training step.
        token, log_probability, forced, live = (torch.stack(part, 1) for part in zip(*columns))
    else:
        token = prompt.new_zeros(prompt.shape[0], 0)
        log_probability, forced = token.float(), token.bool()
        live = forced
    trace = Trace(log_probability, forced, live, live.sum(1))
    return Generation(torch.cat([prompt, token], 1), trace)


@torch.inference_mode()
def stream(
    model: nn.Module, prompt: Tensor, policy: Policy, max_new_tokens: int, *, valid: Tensor | None = None,
    generator: torch.Generator | None = None, interpose: Interpose | None = None, stop: Stop | None = None,
) -> Iterator[Piece]:
    """`generate`, column by column as they come; same arguments."""
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise ValueError(f"the prompt must be [batch, length >= 1], not {tuple(prompt.shape)}")
    if valid is not None and not bool(valid[:, -1].all()):
        raise ValueError("prompts are padded on the left: the last column of `valid` must be True everywhere")
    training = model.training
    model.eval()
    try:
        yield from _stream(model, prompt, policy, max_new_tokens, valid, generator, interpose, stop)
    finally:
        model.train(training)


def _stream(
    model: nn.Module, prompt: Tensor, policy: Policy, max_new_tokens: int, valid: Tensor | None,
    generator: torch.Generator | None, interpose: Interpose | None, stop: Stop | None,
) -> Iterator[Piece]:
    batch = prompt.shape[0]
    stopped = _stopper(stop, prompt.device)
    history = _History(prompt, max_new_tokens)
    live = torch.ones(batch, dtype=torch.bool, device=prompt.device)
    last = torch.zeros_like(prompt, dtype=torch.bool)
    last[:, -1] = True
    logits, state = None, None
    fed = 0  # how many columns the model has seen
    queue: list[Tensor] = []  # forced columns [B] still to come

    while history.new < max_new_tokens and bool(live.any()):
        if interpose is not None and not queue:
            queue = _columns(interpose(history.tokens), batch, prompt.device)
        if logits is None or fed < history.length:
            logits, state = _feed(model, history.tokens[:, fed:], state, valid if fed == 0 else None, live, last)
            fed = history.length
        forced = queue.pop(0) if queue else None
        if forced is None:
            token, is_forced = policy.draw(logits, generator), torch.zeros_like(live)
        else:
            is_forced = (forced != FREE) & live
            token = forced if bool(is_forced[live].all()) else torch.where(
                is_forced, forced, policy.draw(logits, generator))
        token = token.masked_fill(~live, 0)
        log_probability = logits.float().log_softmax(-1).gather(-1, token[:, None]).squeeze(-1)
        piece = Piece(token, log_probability.masked_fill(~live, 0.0), is_forced, live)
        history.append(token)
        yield piece
        live = live & ~stopped(history.tokens)


def _feed(
    model: nn.Module, tokens: Tensor, state: Any, valid: Tensor | None, live: Tensor, last: Tensor
) -> tuple[Tensor, Any]:
    """tokens [B, n] the model has not seen -> (logits [B, V] after the last of them, state). Idle rows stay as they
    are."""
    if valid is None and not bool(live.all()):
        valid = live[:, None].expand_as(tokens)
    ctx = Context(valid=valid, consume=True)
    if tokens.shape[1] == 1:
        out = model(tokens, state, ctx)
        return out.logits[:, -1], out.state
    out = model(tokens, state, ctx, select=last[:, -tokens.shape[1]:])
    return out.logits, out.state


class _History:
    """Prompt and generated tokens in one buffer, so that nothing is copied per token."""

    def __init__(self, prompt: Tensor, room: int) -> None:
        self.buffer = torch.cat([prompt, prompt.new_zeros(prompt.shape[0], max(room, 0))], 1)
        self.start = self.length = prompt.shape[1]

    @property
    def new(self) -> int:
        return self.length - self.start

    @property
    def tokens(self) -> Tensor:
        return self.buffer[:, :self.length]

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


def _stopper(stop: Stop | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    if stop is None:
        return lambda tokens: torch.zeros(tokens.shape[0], dtype=torch.bool, device=device)
    if callable(stop):
        return lambda tokens: stop(tokens).to(device=device, dtype=torch.bool)
    ids = torch.tensor([stop] if isinstance(stop, int) else list(stop), device=device)
    return lambda tokens: torch.isin(tokens[:, -1], ids)
