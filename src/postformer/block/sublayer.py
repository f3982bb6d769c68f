"""The residual sublayer and a list of them: norm, mixer, post-norm, per-site output, scale, residual, publications."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from postformer.block.depth import adapted, make_depth
from postformer.block.reference import Reference
from postformer.contract.context import Context, extended
from postformer.contract.mixer import Mixer, Out, Traits, joined, prefixed
from postformer.contract.state import State
from postformer.design.grammar import Sublayer as SublayerDesign


class Sublayer(nn.Module):
    """One residual branch around a mixer. `mixer` is registered, or a Reference to a shared block.

    site: where it stands; only a depth that is not fixed needs it.
    """

    def __init__(self, design: SublayerDesign, mixer: Mixer | Reference, norm: nn.Module, post_norm: nn.Module,
                 out: nn.Module | None, width: int, site: Any = None) -> None:
        super().__init__()
        self.design, self.norm, self.post_norm, self.out = design, norm, post_norm, out
        self.mixer: Any = mixer
        self.gain = nn.Parameter(torch.ones(width)) if design.scale == "learned" else None
        self.depth = make_depth(design.depth, site, self, able(self.inner), self.reads)

    @property
    def inner(self) -> Mixer:
        """The mixer of the branch."""
        found: Any = self.mixer.module if isinstance(self.mixer, Reference) else self.mixer
        return found

    @property
    def runs(self) -> Mixer:
        """What has the state of the sublayer: the mixer, or what decides how often it runs."""
        return self.inner if self.depth is None else self.depth

    @property
    def reads(self) -> frozenset[str]:
        """The publications that the branch reads."""
        found = {*self.design.input, *able(self.inner).reads}
        for sub in self.inner.sublayers if isinstance(self.inner, Layer) else ():
            assert isinstance(sub, Sublayer)
            found |= {*sub.reads, sub.design.depth.score}
        return frozenset(found - {"x"})

    def forward(self, stream: Tensor, pending: Tensor | None, state: State, ctx: Context) -> Out:
        """stream [B, T, D] and what an earlier `residual: next` left for this input -> what the residual takes."""
        x = stream if pending is None else stream + pending
        return self.branch(self.inputs(x, ctx), state, ctx) if self.depth is None else self.depth(x, state, ctx)

    def inputs(self, x: Tensor, ctx: Context) -> Tensor:
        """The stream x, and whatever else the design has beside it or in its place: [B, T, D_in]."""
        parts = [x if name == "x" else ctx.shared[name] for name in self.design.input]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def branch(self, x: Tensor, state: State, ctx: Context) -> Out:
        """Norm, mixer, post-norm, scale: x [B, T, D_in] -> y [B, T, D]."""
        out = self.inner(self.norm(x), state, ctx)
        y = out.y if self.out is None else self.out(out.y)
        y = self.post_norm(y)
        if self.gain is not None:
            y = y * self.gain.to(y.dtype)
        elif isinstance(self.design.scale, float):
            y = y * self.design.scale
        return out._replace(y=y)


class Layer(Mixer):
    """Sublayers one after another on one residual stream. Its state is the tuple of theirs."""

    def __init__(self, sublayers: Sequence[Sublayer]) -> None:
        super().__init__()
        self.sublayers = nn.ModuleList(sublayers)

    def initial(self, batch: int, condition: Tensor | None = None) -> State:
        return tuple(s.runs.initial(batch) for s in self.sublayers)  # type: ignore[union-attr]

    def forward(self, x: Tensor, state: State = None, ctx: Context | None = None) -> Out:
        ctx, pending = ctx or Context(), None
        state = (None,) * len(self.sublayers) if state is None else state
        states, emitted, published, losses, measured = [], [], {}, {}, {}
        for i, sub in enumerate(self.sublayers):
            assert isinstance(sub, Sublayer)
            out = sub(x, pending, state[i], ctx)
            pending = None
            if sub.design.residual == "add":
                x = x + out.y
            elif sub.design.residual == "none":
                x = out.y
            else:
                pending = out.y
            states.append(out.state)
            emitted.append(out.emitted)
            losses |= prefixed(i, out.losses)
            measured |= prefixed(i, out.measured)
            if sub.design.publish:
                new = {name: out.published[what] for name, what in sub.design.publish.items()}
                published |= new
                ctx = ctx.replace(shared=extended(ctx.shared, new))
        return Out(x, tuple(states), published, tuple(emitted) if ctx.emit else None, losses, measured)

    def part(self, name: str) -> Any:
        return self.sublayers[int(name)].runs


def able(mixer: Mixer) -> Traits:
    """What a built mixer can do; a shared block: what all of its sublayers can."""
    if not isinstance(mixer, Layer):
        return mixer.traits(mixer.design)
    return joined([adapted(able(s.inner), s.design.depth) for s in mixer.sublayers])  # type: ignore[union-attr]
