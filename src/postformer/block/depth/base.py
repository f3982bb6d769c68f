"""The base of the kinds of depth: around the branch of a sublayer, on the stream that it reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from postformer.block.reference import Reference
from postformer.contract.context import Context
from postformer.contract.mixer import Mixer, Out, Traits, prefixed
from postformer.contract.state import State
from postformer.kernels import current


class Ran(NamedTuple):
    """What tokens got from their branch."""

    y: Tensor
    """[B, T, D]"""
    state: State
    told: dict[str, Tensor]
    """[B, T] each: what losses, measurements and publications are made of"""
    outs: list[Out]
    """Of every call of the branch"""


class Depth(Mixer):
    """x [B, T, D], the stream -> what the sublayer adds to it (or, where it has no residual, puts in its place).

    Subclasses write `run` and `out`. `plan` is what is settled with all tokens of a call in view; `run` takes any
    number of them, and the reference takes them one by one. What the branch's mixer loses or measures is "of.NAME".
    """

    declared = False
    """Tokens take the depth at which FLOPs are declared (see `as_declared`)."""

    def __init__(self, design: Any, site: Any, sublayer: Any, able: Traits, needs: frozenset[str]) -> None:
        super().__init__()
        self.design, self.around, self.able, self.needs = design, Reference(sublayer), able, needs
        self.width: int = site.dim_out

    @property
    def sublayer(self) -> Any:
        return self.around.module

    @property
    def of(self) -> Mixer:
        """The mixer of the branch."""
        return self.sublayer.inner

    @property
    def replaces(self) -> bool:
        """The output is the stream, and not added to it."""
        return self.sublayer.design.residual == "none"

    def plan(self, x: Tensor, ctx: Context) -> dict[str, Tensor]:
        """[B, T] each."""
        return {}

    def run(self, x: Tensor, plan: dict[str, Tensor], state: State, ctx: Context) -> Ran:
        raise NotImplementedError

    def out(self, x: Tensor, plan: dict[str, Tensor], ran: Ran, ctx: Context) -> Out:
        """The result but for the state and what the branch tells."""
        raise NotImplementedError

    def mix(self, x: Tensor, state: State, ctx: Context) -> Out:
        plan = self.plan(x, ctx)
        ran = self._by_tokens(x, plan, state, ctx) if current().backend == "reference" and x.shape[1] > 1 else \
            self.run(x, plan, state, ctx)
        out = self.out(x, plan, ran, ctx)
        losses = {k: torch.stack(v).mean() for k, v in _gathered([o.losses for o in ran.outs]).items()}
        measured = {k: torch.stack(v).sum(0) for k, v in _gathered([o.measured for o in ran.outs]).items()}
        last = ran.outs[-1].published if ran.outs and self.passes_on else {}
        return out._replace(state=ran.state, published={**last, **out.published},
                            losses={**out.losses, **prefixed("of", losses)},
                            measured={**out.measured, **prefixed("of", measured)})

    passes_on = False
    """What the mixer publishes has a value at every token."""

    def _by_tokens(self, x: Tensor, plan: dict[str, Tensor], state: State, ctx: Context) -> Ran:
        length, parts = x.shape[1], []
        for t in range(length):
            here = {name: value[:, t : t + 1] for name, value in plan.items()}
            parts.append(self.run(x[:, t : t + 1], here, state, ctx.narrow(t, t + 1, length)))
            state = parts[-1].state
        outs = [out for part in parts for out in part.outs]
        if self.passes_on and outs:
            joined = {name: torch.cat([o.published[name] for o in outs], 1) for name in outs[-1].published}
            outs[-1] = outs[-1]._replace(published=joined)
        told = {name: torch.cat([part.told[name] for part in parts], 1) for name in parts[0].told}
        return Ran(torch.cat([part.y for part in parts], 1), state, told, outs)

    @classmethod
    def traits(cls, design: Any) -> Traits:
        return Traits(two_way=True, native_emit=False)

    @classmethod
    def adapted(cls, able: Traits, design: Any) -> Traits:
        """What a mixer can do under this depth."""
        raise NotImplementedError


def _gathered(each: Sequence[Mapping[str, Tensor]]) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}
    for values in each:
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return found


def there(x: Tensor, ctx: Context) -> Tensor:
    """[B, T] bool: the tokens that exist."""
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if ctx.valid is None else ctx.valid


def wide(linear: Any, x: Tensor) -> Tensor:
    """A linear map of x [B, T, D] to one channel, [B, T], in fp32 or better, whatever autocast says: it decides."""
    with torch.autocast(x.device.type, enabled=False):
        y = linear(x.to(linear.weight.dtype)).squeeze(-1)
    return y if y.dtype == torch.float64 else y.float()


def mean_over(valid: Tensor, values: Tensor) -> Tensor:
    """The mean of values [B, T] over the tokens that exist; zero if there is none."""
    return (values * valid).sum() / valid.sum().clamp_min(1)
