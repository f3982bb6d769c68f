"""RWKV-7's channel mix (2503.14456): a squared-ReLU MLP on a token mixed with the one before.

    k = x + (x_{t-1} - x) * x_k;   y = W_v relu(W_k k)^2
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from postformer.contract.context import Context
from postformer.contract.mixer import Mixer, Out, Traits
from postformer.contract.state import State
from postformer.design.base import Design
from postformer.design.cost import Cost
from postformer.design.registry import register
from postformer.layers.activation import activated
from postformer.layers.local import shift_mixes


class ChannelMixDesign(Design):
    kind: Literal["channel-mix"] = "channel-mix"
    expand: float = Field(default=4, gt=0)
    forget_at: Literal["segment", "document", "stream"] = "document"

    def hidden(self, width: int) -> int:
        return math.ceil(self.expand * width / 8) * 8


@register(ChannelMixDesign)
class ChannelMix(Mixer):
    def __init__(self, design: ChannelMixDesign, site: Any) -> None:
        super().__init__()
        self.forget_at = design.forget_at
        hidden = design.hidden(site.width)
        start = 1 - (torch.arange(site.width) / site.width) ** ((1 - site.layer / site.num_layers) ** 4)
        self.x_k = site.parameter("x_k", (site.width,), lambda p: p.copy_(start))
        self.k = site.linear("k", site.width, hidden)
        self.out = site.linear("out", hidden, site.dim_out)

    def initial(self, batch: int, condition: Tensor | None = None) -> State:
        return self.x_k.new_zeros(batch, 1, self.x_k.shape[0])

    def mix(self, x: Tensor, state: State, ctx: Context) -> Out:
        (k,), state = shift_mixes(x, state, [self.x_k], ctx, self.forget_at)
        return Out(self.out(activated(self.k(k), "relu2")), state)

    @classmethod
    def traits(cls, design: ChannelMixDesign) -> Traits:
        return Traits(soft_gates=False, native_emit=False)

    @classmethod
    def cost(cls, design: ChannelMixDesign, site: Any) -> Cost:
        hidden = design.hidden(site.width)
        maps = site.linear_cost(site.width, hidden) + site.linear_cost(hidden, site.dim_out)
        return maps + Cost(params=site.width, state=4 * site.width)
