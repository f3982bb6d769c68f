"""Where segments end: after so many tokens, after some tokens (a word, a sentence), where the data say so, or where the
model has learned to see an end.

An end counts from the next token on: whatever is done at one is done before a token, by what the tokens before it were.
Every C-th token is counted from where the memory began. A learned end is a share in (0, 1), so that gradients reach it
(as the boundaries of 2507.07955, without their rounding): a segment is then closed by that share, and the loss `rate`
keeps the mean share at 1 / target.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from postformer.contract.context import Context, gates, positions
from postformer.design.base import Design, nearest
from postformer.design.cost import Cost
from postformer.kernels import scan

BYTES = {"word": b" \t\n\r", "line": b"\n", "sentence": b".!?\n"}
"""After which bytes a text's words, lines and sentences end"""


class After(Design):
    """A segment ends after each of these tokens."""

    after: tuple[int, ...] = Field(min_length=1)


class Learned(Design):
    """A segment ends as the model has learned it, about every `target` tokens."""

    boundary: Literal["learned"] = "learned"
    target: float = Field(default=64.0, gt=1)
    weight: float = Field(default=0.03, ge=0)
    """Of the loss (target * mean share - 1)^2"""


Named = Literal["word", "sentence", "line", "segment", "document"]
"""word, sentence, line: after the bytes that end one. segment, document: where the data have such a boundary"""


def _period(value: Any) -> Any:
    if isinstance(value, str) and value not in get_args(Named):
        raise ValueError(f"nothing ends at '{value}'.{nearest(value, get_args(Named))} Or give a number of tokens, "
                         "{after: [tokens]}, or {boundary: learned, target: 64}")
    return value


if TYPE_CHECKING:
    Period = int | str | After | Learned
else:
    Period = Annotated[int | Named | After | Learned, BeforeValidator(_period)]
"""Tokens of a segment, or what ends one"""


class Closing(NamedTuple):
    """The state of `Ends`."""

    pending: Tensor
    """[B]: by how much the segment of the tokens so far is over, and not closed yet"""
    count: Tensor
    """[B] int64: tokens of the segment so far"""
    over: Tensor | None = None
    """[B], 0 or 1: whether the segment is over and no token has followed (None: nobody asks)"""


class Ended(NamedTuple):
    before: Tensor
    """[B, T] in [0, 1]: by how much a segment ended before this token and is closed at it"""
    gate: Tensor
    """[B, T] in [0, 1]: how much of a token there is (0: not there, or read only)"""
    first: Tensor | None
    """[B, T] bool: the first token, as far as there is one, after an end (None: nobody asks)"""
    reset: Tensor | None
    """[B, T] bool: before which tokens everything is forgotten"""


class Ends(nn.Module):
    """Closed segments of a stream of tokens. Whatever else is known of a token, one that is not there, or is read only,
    closes nothing and leaves an end before it for the next token."""

    forget_at: str
    """The lowest boundary of the data that means something here"""

    def __init__(self, every: Period, site: Any, resets_at: str, marks: bool = False) -> None:
        """marks: also say which token is the first after an end."""
        super().__init__()
        self.every, self.resets_at, self.marks = every, resets_at, marks
        self.forget_at = every if every in ("segment", "document") else resets_at  # type: ignore[assignment]
        self.score = (site.linear("boundary", site.width, 1, bias=True, role="gate")
                      if isinstance(every, Learned) else None)
        if self.score is not None:
            nn.init.constant_(self.score.bias, -math.log(every.target - 1))  # type: ignore[union-attr]

    def initial(self, like: Tensor) -> Closing:
        """like [B, ...], of a state's dtype"""
        zero = like.new_zeros(like.shape[0])
        return Closing(zero, zero.long(), zero.clone() if self.marks else None)

    def forward(self, x: Tensor, state: Closing, ctx: Context) -> tuple[Ended, Closing, Tensor | None]:
        """x [B, T, D] -> (what ended, the state, the loss of learned ends)"""
        dtype = state.pending.dtype
        write, reset = gates(ctx)[1], ctx.reset(self.resets_at)
        gate = x.new_ones(x.shape[:2], dtype=dtype) if write is None else write.to(dtype)
        given = ctx.reset(self.every) if self.every in ("segment", "document") else None  # type: ignore[arg-type]
        if given is not None and reset is not None:
            given = given & ~reset
        after, count, loss = self._after(x, gate, state, ctx)
        before, pending = waiting(after, gate, state.pending, given, reset)
        first = over = None
        if state.over is not None:
            there = (gate > 0).to(dtype)
            mark, over = waiting(after, there, state.over, given, reset)
            first = mark * there > 0
        return Ended(before * gate, gate, first, reset), Closing(pending, count, over), loss

    def _after(self, x: Tensor, gate: Tensor, state: Closing, ctx: Context) -> tuple[Tensor, Tensor, Tensor | None]:
        """([B, T] by how much a segment ends after each token, the count, the loss)"""
        every, there = self.every, gate > 0
        if isinstance(every, int):
            place, count = positions(state.count, x.shape[1], ctx.replace(valid=there), self.resets_at)
            return ((place + 1) % every == 0).to(gate.dtype), count % every, None
        if isinstance(every, Learned):
            assert self.score is not None
            share = torch.sigmoid(self.score(x)[..., 0].to(gate.dtype))
            mean = (share * gate).sum() / gate.sum().clamp_min(1)
            loss = every.weight * (every.target * mean - 1).square() if every.weight else None
            return share, state.count, loss
        if every in ("segment", "document"):
            return torch.zeros_like(gate), state.count, None
        if "tokens" not in ctx.shared:
            raise ValueError(f"every: {every} looks at the tokens, which a language model shows to its layers; here "
                             "put them into ctx.shared as 'tokens' [B, T], or give a number of tokens")
        ends = every.after if isinstance(every, After) else tuple(BYTES[every])  # type: ignore[index]
        tokens = ctx.shared["tokens"]
        found = tokens == ends[0]
        for token in ends[1:]:
            found = found | (tokens == token)
        return found.to(gate.dtype), state.count, None

    @staticmethod
    def words(every: Period) -> str:
        """When a segment ends, in words."""
        if isinstance(every, int):
            return f"every {every} tokens"
        if isinstance(every, After):
            return f"after each token {' or '.join(map(str, every.after))}"
        if isinstance(every, Learned):
            return f"where it has learned to, about every {every.target:g} tokens"
        return f"at the end of every {every}"

    @staticmethod
    def reads(every: Period) -> tuple[str, ...]:
        """What of `ctx.shared` it needs"""
        return ("tokens",) if isinstance(every, After) or (isinstance(every, str) and every in BYTES) else ()

    @staticmethod
    def cost(every: Period, site: Any, marks: bool = False) -> Cost:
        total = Cost(state=4 + 8 + 4 * marks)
        return total + site.linear_cost(site.width, 1, bias=True, role="gate") if isinstance(every, Learned) else total


def waiting(after: Tensor, gate: Tensor, start: Tensor, given: Tensor | None, reset: Tensor | None
            ) -> tuple[Tensor, Tensor]:
    """(before_t [B, T], the last pending [B]) of

        before_t = pending_t, or 1 at a boundary of the data;   pending_{t+1} = w_t after_t + (1 - w_t) before_t

    after, gate (w) [B, T]; start [B] is pending_0; given, reset [B, T] bool: boundaries, and where it is 0 again.
    """
    kept, added = 1 - gate, gate * after
    if given is not None:
        mark = given.to(gate.dtype)
        kept, added = kept * (1 - mark), added + kept * mark
    following = scan(kept, added, start, reset)
    pending = torch.cat([start[:, None], following[:, :-1]], 1)
    if reset is not None:
        pending = pending.masked_fill(reset, 0)
    return pending if given is None else torch.where(given, 1.0, pending), following[:, -1]
