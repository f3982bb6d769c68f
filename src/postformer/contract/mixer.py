"""Mixer: memories, feed-forwards, composites, blocks and the stack all obey this one contract.

`forward(x, state, ctx) -> Out` for any number of tokens >= 1, pure in (parameters, x, state, ctx). Law: any split of
the tokens gives the same outputs and the same final state. A step is T = 1, prefill is T = n.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from torch import Tensor, nn

from postformer.contract import fallback
from postformer.contract.context import EMPTY, Context
from postformer.contract.state import State
from postformer.design.base import Design
from postformer.design.choices import Choices
from postformer.design.cost import Cost

if TYPE_CHECKING:
    from postformer.contract.step import StepMemory as StepMemory


class Out(NamedTuple):
    """What a call returns; nothing is ever written into the Context."""

    y: Tensor
    state: State = None
    published: Mapping[str, Any] = EMPTY
    """By name of what is published (`traits.publishes`); the sublayer renames."""
    emitted: State = None
    """With ctx.emit = n: the state before tokens 0, n, 2n, ...; leaves [B, ceil(T/n), ...]."""
    losses: Mapping[str, Tensor] = EMPTY
    """Auxiliary scalars (router, halting); the objective decides what to do with them."""
    measured: Mapping[str, Tensor] = EMPTY
    """Detached sums over this call's valid tokens (counts), so that the parts of a batch add up. A call never changes
    the model; what a mixer learns from such counts it learns in `after_step`."""


Rereads = Literal["no", "last", "all"]
REREADS: tuple[Rereads, ...] = ("no", "last", "all")


@dataclass(frozen=True)
class Traits:
    """What a mixer can do. Verify, the planner and refusals use it; nothing else may switch a check off."""

    causal: bool = True
    two_way: bool = False
    """ctx.causal = False is honoured: the tokens of a call see each other."""
    streaming: Literal["constant", "growing", "none"] = "constant"
    soft_gates: bool = True
    """tick and write in (0, 1) and read-only tokens are honoured; False where local mixing would see them."""
    taps: bool = False
    """The field `local` of its state is what a convolution or a shift before it has seen, and nothing else."""
    native_reset: bool = True
    native_emit: bool = True
    stateful: bool = True
    exact_gradients: bool = True
    """False: gradients that are meant to differ from the derivative (straight-through estimators, truncation)."""
    rereads: Rereads = "no"
    """ctx.later is honoured: a token reads the state as it was before the tokens that came after it (last: if there are
    none)."""
    same_in_training: bool = True
    """False: training chooses by what evaluation cannot see (the top of a whole sequence). Verify then looks at
    evaluation."""
    publishes: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    """Names of publications it needs in ctx.shared."""
    inputs: tuple[str, ...] = ()
    """Its inputs that a wrapper may feed with something else than x, e.g. query, key, value (see `Context.fed`)."""


def prefixed(prefix: str | int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Losses or measurements of a child as "PREFIX.NAME"; `Mixer.part` leads back from the prefix to the child."""
    return {f"{prefix}.{name}": value for name, value in values.items()}


def joined(each: Sequence[Traits]) -> Traits:
    """What several mixers together can do: what all of them can. A mixer without state has no say about gates."""
    streaming = {t.streaming for t in each}
    return Traits(
        causal=all(t.causal for t in each),
        two_way=all(t.two_way for t in each),
        streaming="none" if "none" in streaming else "growing" if "growing" in streaming else "constant",
        soft_gates=all(t.soft_gates for t in each if t.stateful),
        native_reset=all(t.native_reset for t in each),
        native_emit=all(t.native_emit for t in each),
        stateful=any(t.stateful for t in each),
        exact_gradients=all(t.exact_gradients for t in each),
        rereads=REREADS[min((REREADS.index(t.rereads) for t in each if t.stateful), default=2)],
        same_in_training=all(t.same_in_training for t in each),
        reads=tuple(name for t in each for name in t.reads),
    )


class Site(Protocol):
    """Where a mixer is built: the only thing it learns about the model around it."""

    path: str
    layer: int
    num_layers: int
    rank: int
    """This is the rank-th of `count` uses of this mixer in the stack."""
    count: int
    width: int
    """Channels of x."""
    dim_out: int
    """Channels of y."""
    causal: bool
    publish: frozenset[str]
    """Which of its publications are wanted here."""

    def linear(
        self, name: str, d_in: int, d_out: int, *, bias: bool = False, role: str = "projection"
    ) -> nn.Module: ...
    def parameter(self, name: str, shape: Sequence[int], init: Callable[[Tensor], Any], *, role: str = "gate",
                  decay: bool = False) -> nn.Parameter: ...
    def build(self, design: Design, name: str, width: int | None = None,
              publish: frozenset[str] = frozenset()) -> Mixer: ...
    def tied(self, name: str, shape: Sequence[int], init: Callable[[Tensor], Any]) -> Callable[[], Tensor]: ...


class Mixer(nn.Module):
    """Base of everything that maps tokens to tokens with a state. Authors write `__init__(design, site)` and `mix`."""

    design: Any
    """The mixer's own design; the site sets it when it builds."""
    dim_in: int | None = None
    dim_out: int | None = None
    """Channels of x and of y; the site sets them when it builds."""

    def forward(self, x: Tensor, state: State = None, ctx: Context | None = None) -> Out:
        """x [B, T, D] -> Out with y [B, T, D_out]. ctx None: plain causal tokens from the state's position on."""
        ctx = ctx or Context()
        fresh = state is None
        if fresh:
            state = self.initial(x.shape[0])
        if ctx.fresh != fresh:
            ctx = ctx.replace(fresh=fresh)
        if ctx.valid is not None:
            x = x.masked_fill(~ctx.valid[..., None], 0)
        traits = self.traits(self.design)
        if not ctx.causal and not traits.two_way:
            raise ValueError(f"{type(self).__name__} looks back only; a call with causal=False needs a design made of "
                             "attention (and feed-forwards) alone")
        if (ctx.emit and not traits.native_emit) or (ctx.boundary is not None and not traits.native_reset):
            out = fallback.by_pieces(self, x, state, ctx, traits)
        else:
            out = self.mix(x, state, ctx)
        return out if ctx.valid is None else out._replace(y=out.y.masked_fill(~ctx.valid[..., None], 0))

    def mix(self, x: Tensor, state: State, ctx: Context) -> Out:
        """The work; x is zero at invalid tokens, state is never None for a mixer that has one."""
        raise NotImplementedError(f"{type(self).__name__} defines neither mix, step nor rule")

    def initial(self, batch: int, condition: Tensor | None = None) -> State:
        """The state before the first token; None for a mixer without state."""
        return None

    def after_step(self, measured: Mapping[str, Tensor]) -> None:
        """Called by the trainer after each optimiser step, with the sums of what this mixer measured in the step's
        calls (over all its uses, if it is shared). The one place where a mixer may change its own buffers."""

    def part(self, name: str) -> Any:
        """The child whose losses and measurements this mixer passes on under the prefix `name`."""
        return getattr(self, name)

    @classmethod
    def traits(cls, design: Any) -> Traits:
        return Traits()

    @classmethod
    def choices(cls, design: Any) -> Choices | None:
        """The four choices in words, for `explain` and reports; None for what is no memory."""
        return None

    @classmethod
    def words(cls, design: Any) -> str:
        """Of a composite: what it does with its children, in a few words, for `explain`."""
        return ""

    @classmethod
    def cost(cls, design: Any, site: Any) -> Cost | None:
        """Params, FLOPs and state bytes from the design alone; None: not declared (verify says so)."""
        return None


def __getattr__(name: str) -> Any:
    """StepMemory is importable from here too; it lives in `contract.step`."""
    if name == "StepMemory":
        from postformer.contract.step import StepMemory

        return StepMemory
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
