"""One token at a time for a batch of rows that own their states: as compiled code where the model can be recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from postformer.contract import state as states
from postformer.contract.context import Context
from postformer.design.base import nearest
from postformer.kernels import current
from postformer.kernels.tape import Tape, record

WARM = 4
"""Tokens before a recording, which costs about ten of them"""
ROOM = 64
"""Tokens for which growing lists get room at once, at least"""


class Stepper:
    """The model's step with everything done beforehand that can be: room in growing lists, and a tape of the step.

    `state` is the stepper's own: it is overwritten. room: for how many tokens growing lists shall get room at once (a
    new tape is recorded where it runs out). watch: publications of the design whose values of the last step stand in
    `watched`, [B, ...] each. The model must be in eval mode and keep its parameters meanwhile.
    """

    def __init__(self, model: nn.Module, state: Any, room: int = ROOM, watch: Sequence[str] = ()) -> None:
        self.model, self.state, self.room, self.watch = model, state, max(room, ROOM), tuple(watch)
        self.watched: dict[str, Tensor] = {}
        self.tape: Tape | None = None
        self.reason: str | None = None
        """Why there is no tape, once one was tried."""
        self._taken = self._left = 0
        self._growth = 1
        self._checked = False
        self._logits = torch.empty(0)
        self._tokens = torch.empty(0, dtype=torch.long)
        self._ctx = Context(consume=True, room=True)

    def step(self, tokens: Tensor) -> Tensor:
        """tokens [B] int64, the next of each row -> logits [B, vocab], good until the next step."""
        if self._left <= 0:
            self._make_room()
        self._left -= 1
        if self.tape is not None:
            self._tokens[:, 0] = tokens
            self.tape.run()
            self.watched = dict(zip(self.watch, (made[:, -1] for made in self.tape.outputs[1:])))
            return self._logits
        self._taken += 1
        if self._taken > WARM and self.reason is None:
            return self._record(tokens)
        return self._eager(tokens)

    def take(self, rows: Sequence[int]) -> Any:
        """A copy of the state of some rows."""
        return states.select(self.state, rows)

    def put(self, rows: Sequence[int], state: Any) -> None:
        """Give these rows another state; the other rows stay as they are."""
        lists, theirs = states.growing(self.state), states.growing(state)
        lacking = max((int(new.length.max()) - own.data.shape[1] for own, new in zip(lists, theirs)), default=0)
        if lacking > 0:
            self._make_room(lacking + max(own.data.shape[1] for own in lists) + self.room)
        states.assign(self.state, rows, state)
        self._count_room()

    def _run(self, tokens: Tensor, state: Any) -> tuple[list[Tensor], Any]:
        """([logits [B, vocab], what is watched [B, 1, ...]], the state)"""
        out = self.model(tokens, state, self._ctx)
        return [out.logits[:, -1], *seen(out, self.watch)], out.state

    def _eager(self, tokens: Tensor) -> Tensor:
        (logits, *seen), self.state = self._run(tokens[:, None], self.state)
        self.watched = dict(zip(self.watch, (made[:, -1] for made in seen)))
        return logits

    def _make_room(self, tokens: int = 0) -> None:
        wider = states.reserve(self.state, max(tokens, self.room * self._growth))
        if wider is not self.state and any(
                a.data_ptr() != b.data_ptr() for a, b in zip(states.leaves(wider), states.leaves(self.state))):
            self.tape = None  # it knows the old places
        self.state = wider
        self._count_room()

    def _count_room(self) -> None:
        lists = states.growing(self.state)
        free = (part.data.shape[1] - int(part.length.max()) for part in lists)
        self._left = min(free) // self._growth if lists else 1 << 60

    def _record(self, tokens: Tensor) -> Tensor:
        if current().backend not in ("auto", "native"):
            self.reason = f"kernels.use(backend={current().backend!r}) is in force"
            return self._eager(tokens)
        self.state = owned(self.state)
        self._tokens = tokens[:, None].clone()
        before = None if self._checked else states.map_state(torch.clone, self.state)
        lengths = [part.length.clone() for part in states.growing(self.state)]
        leaves = states.leaves(self.state)

        def step() -> tuple[list[Tensor], list[Tensor]]:
            made, after = self._run(self._tokens, self.state)
            return made, states.leaves(after)

        (logits, *seen), new, made = record(step, [self._tokens], leaves)
        result, new = logits.clone(), [leaf.clone() for leaf in new]
        self.watched = dict(zip(self.watch, (one[:, -1].clone() for one in seen)))
        if isinstance(made, Tape):
            self._logits = made.outputs[0]
            if before is None or self._agrees(made, before):
                self.tape, self._checked = made, True
            else:
                self.reason = "the recorded step answers differently"
        else:
            self.reason = str(made)
        if [leaf.shape for leaf in leaves] == [leaf.shape for leaf in new]:
            for leaf, value in zip(leaves, new):
                leaf.copy_(value)
        else:
            self.state = rebuilt(self.state, new)
        grown = [int((part.length - was).max()) for part, was in zip(states.growing(self.state), lengths)]
        if grown and max(grown) > self._growth:
            self._growth = max(grown)
        self._count_room()
        return result

    def _agrees(self, tape: Tape, before: Any) -> bool:
        """Whether the tape does to another token what the model does."""
        for leaf, value in zip(states.leaves(self.state), states.leaves(before)):
            leaf.copy_(value)
        self._tokens.copy_((self._tokens + 1) % self._logits.shape[-1])
        wanted, after = self._run(self._tokens, before)
        tape.run()
        limit = 1e-9 if wanted[0].dtype == torch.float64 else 2e-4
        pairs = [*zip(wanted, tape.outputs), *zip(states.leaves(after), states.leaves(self.state))]
        return all(torch.allclose(b, a.to(b.dtype), rtol=limit, atol=limit * scale(a), equal_nan=True)
                   if b.is_floating_point() else torch.equal(a, b) for a, b in pairs)


def seen(out: Any, watch: Sequence[str]) -> list[Tensor]:
    """What a model's output publishes under these names, [B, T, ...] each. Raises ValueError for a name without."""
    found = [out.published.get(name) for name in watch]
    for name, value in zip(watch, found):
        if not isinstance(value, Tensor):
            raise ValueError(f"the design publishes nothing per token as '{name}'.{nearest(name, out.published)} Name "
                             f"it in a sublayer, e.g. {{use: memory, publish: {{{name}: variance}}}} for a memory of "
                             "kind filter.")
    return found


def scale(x: Tensor) -> float:
    return float(x.nan_to_num().abs().max()) if x.numel() else 0.0


def owned(state: Any) -> Any:
    """The state with dense leaves no two of which share memory."""
    taken: set[int] = set()

    def own(leaf: Tensor) -> Tensor:
        home = leaf.untyped_storage().data_ptr()
        if not leaf.is_contiguous() or home in taken or leaf.untyped_storage().nbytes() != leaf.nbytes:
            leaf = leaf.clone(memory_format=torch.contiguous_format)
        taken.add(leaf.untyped_storage().data_ptr())
        return leaf
    return states.map_state(own, state)


def rebuilt(like: Any, leaves: Sequence[Tensor]) -> Any:
    """The leaves in the structure of `like`."""
    rest = iter(leaves)
    return states.map_state(lambda _: next(rest), like)
