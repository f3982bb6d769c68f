"""How often a sublayer runs at each token: once (fixed), once or not at all (mod, Mixture-of-Depths, 2404.02258), up
to `most` times until it halts (loop, 2107.05407, 2507.10524), or in steps of its own choice that sum to one (ode). The
modules are in block/depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from postformer.design.base import Design, one_of
from postformer.design.cost import Cost

if TYPE_CHECKING:
    from postformer.design.grammar import Sublayer
    from postformer.design.place import Place

SELF = "self"
MIXES = ("its mixer mixes neighbouring tokens before it learns (a convolution, a shift), so no token can pass without "
         "entering there")


class Fixed(Design):
    """Every token runs once."""

    kind: Literal["fixed"] = "fixed"

    publishes: ClassVar[tuple[str, ...]] = ()
    score: ClassVar[str] = SELF

    @property
    def in_words(self) -> str:
        return ""

    def refused(self, sub: Sublayer, own: Sequence[str], stateful: bool, soft_gates: bool) -> str | None:
        """Why it cannot stand around this sublayer, and what to do. own: what its mixer is asked to publish;
        soft_gates: its mixer honours read-only tokens."""
        return None

    def cost(self, inner: Cost, place: Place, width: int, stateful: bool) -> Cost:
        return inner


class Mod(Design):
    """A token runs if its score passes: x + sigmoid(score) f(x), or x."""

    kind: Literal["mod"] = "mod"
    capacity: float = Field(default=0.5, gt=0, le=1)
    """The share of tokens that run; 1: all"""
    choose: Literal["threshold", "top"] = "threshold"
    """threshold: each token by itself, and `after_step` moves the threshold until the share is kept. top: in training
    those of largest score in the sequence, in evaluation those that a predictor trained on that choice says"""
    skip: Literal["freeze", "clock", "write"] = "freeze"
    """What a skipped token does to the mixer's state. freeze: nothing, as if it did not exist. clock: time passes (tick
    1, write 0). write: all that a token that runs does; only the output is left out"""
    score: str = SELF
    """self: a linear map of the stream. Or a publication [B, T] or [B, T, H] that is never negative, such as a
    variance: a learned affine map of the mean over H of its logarithm"""
    rate: float | None = Field(default=None, gt=0)
    """Of the threshold, in spreads of the score per unit of share that is off, a step. None: 0.3"""

    publishes: ClassVar[tuple[str, ...]] = ("depth",)

    @model_validator(mode="after")
    def _sense(self) -> Mod:
        if self.choose == "top" and self.rate is not None:
            raise ValueError("choose: top has no threshold to move; leave rate out, or set choose: threshold")
        return self

    @property
    def strength(self) -> float:
        return 0.3 if self.rate is None else self.rate

    @property
    def in_words(self) -> str:
        by = "" if self.score == SELF else f" by {self.score}"
        how = "" if self.choose == "threshold" else ", the top of a sequence in training"
        return f"run by {self.capacity:.3g} of tokens{by}{how}, skip: {self.skip}"

    def refused(self, sub: Sublayer, own: Sequence[str], stateful: bool, soft_gates: bool) -> str | None:
        if self.skip == "clock" and stateful and not soft_gates:
            return f"skip: clock lets tokens pass without a write, but {MIXES}; set local: none in it, or skip: freeze"
        if self.skip == "freeze" and own:
            return (f"'{own[0]}' has no value at a token that is skipped; set skip: clock or write, or publish it from "
                    "a sublayer of fixed depth")
        return None

    def cost(self, inner: Cost, place: Place, width: int, stateful: bool) -> Cost:
        """FLOPs and growing lists at the declared capacity, as far as skipped tokens neither run nor are kept."""
        run = self.capacity if self.skip == "freeze" or not stateful else 1.0
        kept = 1.0 if self.skip == "write" and stateful else self.capacity
        total = replace(
            inner, flops_per_token=run * inner.flops_per_token,
            flops_per_key=tuple((run * kept * flops, window) for flops, window in inner.flops_per_key))
        if kept < 1:
            total = replace(
                total, state_per_token=tuple((size, window) for size, window in inner.state_per_token if window),
                state_per_share=tuple((size, kept) for size, window in inner.state_per_token if not window)
                + tuple((size, kept * part) for size, part in inner.state_per_share))
        if self.skip == "freeze" and stateful:
            total += Cost(state=16)
        total += place.linear_cost(width, 1, role="gate") if self.score == SELF else Cost(params=2)
        if self.choose == "top":
            total += place.linear_cost(width, 1, bias=True, role="gate")
        return total


class _Repeated(Design):
    most: int = Field(default=4, ge=1)
    """Applications, all with the same parameters"""
    state: Literal["each", "first"] = "each"
    """each: every depth has a state of its own, which a token that has stopped leaves as it is. first: only the first
    application writes, and the later ones read"""
    price: float = Field(default=0.01, ge=0)
    """Weight of the loss "steps": the mean over tokens of how many steps they take"""

    publishes: ClassVar[tuple[str, ...]] = ("depth",)
    score: ClassVar[str] = SELF

    @property
    def decisions(self) -> int:
        """How often a token may stop or go on."""
        return self.most - 1

    def refused(self, sub: Sublayer, own: Sequence[str], stateful: bool, soft_gates: bool) -> str | None:
        if "x" not in sub.input:
            return "every step reads what the last one made of the stream; have x among the `input`"
        if own:
            return (f"'{own[0]}' has as many values at a token as it takes steps; publish it from a sublayer of fixed "
                    "depth, or publish depth")
        if self.state == "first" and self.most > 1 and stateful and not soft_gates:
            return f"state: first reads a memory without writing to it, but {MIXES}; set local: none in it"
        return None

    def cost(self, inner: Cost, place: Place, width: int, stateful: bool) -> Cost:
        """FLOPs of a token that takes `most` steps, as decoding takes them: what is saved depends on the tokens."""
        states = self.most if self.state == "each" else 1
        total = Cost(
            inner.params, self.most * inner.flops_per_token,
            tuple((self.most * flops, window) for flops, window in inner.flops_per_key),
            states * inner.state + (8 * states if stateful else 0),
            tuple((states * kept, window) for kept, window in inner.state_per_token),
            tuple((states * kept, share) for kept, share in inner.state_per_share))
        if not self.decisions:
            return total
        gate = place.linear_cost(width, 1, bias=True, role="gate")
        return total + replace(gate, flops_per_token=self.decisions * gate.flops_per_token)


class Loop(_Repeated):
    """h_n = h_{n-1} + f(h_{n-1}) until the token halts (PonderNet, 2107.05407; Mixture-of-Recursions, 2507.10524)."""

    kind: Literal["loop"] = "loop"
    least: Literal[0, 1] = 1
    """0: a token may take nothing of it, and is then only written into its state"""
    halt: Literal["hard", "expected"] = "hard"
    """hard: the output is h_n of the first n by which half of the probability has halted. expected: the mean of all
    h_n, and every step is taken"""
    prior: float | None = Field(default=None, gt=0, lt=1)
    """Adds the loss "prior": KL of the distribution of steps from a geometric one of this rate"""
    prior_weight: float | None = Field(default=None, gt=0)
    """Of that loss. None: 0.01"""

    @model_validator(mode="after")
    def _sense(self) -> Loop:
        if self.prior is None and self.prior_weight is not None:
            raise ValueError("there is no prior to weigh; give prior a rate in (0, 1), or leave prior_weight out")
        return self

    @property
    def decisions(self) -> int:
        return self.most - self.least

    @property
    def strength(self) -> float:
        return 0.01 if self.prior_weight is None else self.prior_weight

    @property
    def in_words(self) -> str:
        how = "until it halts" if self.halt == "hard" else "weighed by when it halts"
        times = f"{'not at all or ' if not self.least else ''}up to {self.most} times"
        return f"{times}, {how}, state: {self.state}"

    def refused(self, sub: Sublayer, own: Sequence[str], stateful: bool, soft_gates: bool) -> str | None:
        if why := super().refused(sub, own, stateful, soft_gates):
            return why
        if self.most > 1 and stateful and not soft_gates:
            return (f"a token that has halted is read on without a write while learning, but {MIXES}; set local: none "
                    "in it, or use depth: ode")
        return None


class Ode(_Repeated):
    """h <- h + d f(h) with a step d of each token's own; its steps sum to one."""

    kind: Literal["ode"] = "ode"

    @property
    def in_words(self) -> str:
        return f"steps that sum to one, at most {self.most}, state: {self.state}"


Depth = Fixed | Mod | Loop | Ode
KINDS: dict[str, type[Depth]] = {"fixed": Fixed, "mod": Mod, "loop": Loop, "ode": Ode}


AnyDepth = Annotated[Depth, one_of(KINDS, "depth", "{kind: mod, capacity: 0.5}")]
