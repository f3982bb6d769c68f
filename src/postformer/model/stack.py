"""The stack: layers of residual sublayers, shared blocks, stack-owned parameters. It holds no kind's name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from postformer.block.reference import Reference
from postformer.block.sublayer import Layer, Sublayer
from postformer.contract.context import Context, extended
from postformer.contract.mixer import Mixer, Out, prefixed
from postformer.contract.state import State
from postformer.design.grammar import Model
from postformer.design.plan import Planned, planned, shared_places, used_copies
from postformer.layers.norm import make_norm
from postformer.model.site import BuildSite, Ledger, build_mixer


class Stack(Mixer):
    """x [B, T, D] -> y [B, T, D]; its state is the tuple of the layers' states."""

    def __init__(self, model: Model, ledger: Ledger) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.shared = nn.ModuleDict()
        self.tied = ledger.tied
        for name, copy in used_copies(model):
            items = shared_places(model, name, copy, len(model.stack))
            self.shared[f"{name}-{copy}"] = Layer([self._sublayer(i, model, ledger) for i in items])
        self.layers = nn.ModuleList(
            Layer([self._sublayer(item, model, ledger) for item in layer]) for layer in planned(model)
        )
        self.norm = make_norm(model.stack_norm or model.norm, model.width)

    def _sublayer(self, item: Planned, model: Model, ledger: Ledger) -> Sublayer:
        sub, site = item.sublayer, BuildSite.at(item.place, ledger)
        mixer: Mixer | Reference
        if item.shared:
            mixer = Reference(self.shared[f"{item.shared[0]}-{item.shared[1]}"])
        else:
            assert item.design is not None
            mixer = build_mixer(item.design, site)
        out = site.linear("out", model.width, model.width) if sub.out else None
        return Sublayer(sub, mixer, make_norm(sub.norm or model.norm, site.width),
                        make_norm(sub.post_norm, model.width), out, model.width, site)

    def initial(self, batch: int, condition: Tensor | None = None) -> State:
        return tuple(layer.initial(batch) for layer in self.layers)  # type: ignore[operator]

    def forward(self, x: Tensor, state: State = None, ctx: Context | None = None) -> Out:
        ctx = ctx or Context()
        state = (None,) * len(self.layers) if state is None else state
        ctx = ctx.replace(shared=extended(ctx.shared, {"embedding": x}))
        states, emitted, losses, measured, published = [], [], {}, {}, {}
        for i, layer in enumerate(self.layers):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                out: Any = checkpoint(layer, x, state[i], ctx, use_reentrant=False)
            else:
                out = layer(x, state[i], ctx)
            x = out.y
            states.append(out.state)
            emitted.append(out.emitted)
            losses |= prefixed(i, out.losses)
            measured |= prefixed(i, out.measured)
            if out.published:
                published |= out.published
                ctx = ctx.replace(shared=extended(ctx.shared, out.published))
        x = self.norm(x)
        if ctx.valid is not None:
            x = x.masked_fill(~ctx.valid[..., None], 0)
        return Out(x, tuple(states), published, tuple(emitted) if ctx.emit else None, losses, measured)

    def part(self, name: str) -> Any:
        return self.layers[int(name)]
