"""Mixture of experts: every token chooses a few of many feed-forwards (2101.03961, 2401.06066, 2412.19437).

    s = score(W u);   chosen = the `top` experts i of largest s_i + b_i
    g_i = s_i [/ sum_{j chosen} s_j] * scale;   y = [sigmoid(w u)] shared(u) + sum_{i chosen} g_i FFN_i(u)

b only takes part in choosing. With `balance: bias` the trainer's `after_step` moves it by the step's load, and no loss
is added (2408.15664):  b_i <- b_i + rate * sign(mean load - load_i).  With `balance: loss` the loss "router" is added
(2101.03961):  rate * experts * sum_i (share of choices of i) * (mean over tokens of s_i / sum_j s_j).

Limits: no expert has a capacity, so no token is ever dropped and none depends on its company; balance is of whole
steps, not of each batch or device. The choice jumps where two scores meet: gradients are those of the experts chosen.
Tokens are sorted by expert and each expert runs once, on its own tokens; weights are not stacked, so that an expert may
be made of any linear map (docs/experts.md has the timings).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from postformer.block.feedforward import FeedForward, FeedForwardDesign
from postformer.contract.context import EMPTY, Context
from postformer.contract.mixer import Mixer, Out, Traits
from postformer.contract.state import State
from postformer.design.base import Design
from postformer.design.cost import Cost
from postformer.design.registry import register
from postformer.kernels import current
from postformer.kernels.tape import recording, when


class ExpertsDesign(Design):
    kind: Literal["moe"] = "moe"
    experts: int = Field(default=8, ge=2)
    top: int = Field(default=2, ge=1)
    """Experts that a token chooses."""
    shared: int = Field(default=1, ge=0)
    """Experts that every token takes, beside the chosen ones; n of them are one that is n times as wide."""
    expert: FeedForwardDesign = FeedForwardDesign()
    """One expert. Sizes are per expert: fine-grained experts have a small `expand`."""
    router_bias: bool = False
    """The router's map has a bias, which weighs as well as chooses (BlackMamba, 2402.01771)."""
    score: Literal["sigmoid", "softmax"] = "sigmoid"
    """Of the router's logits: each expert on its own (2412.19437), or all together."""
    normalise: bool = True
    """The weights of the chosen experts are made to sum to one."""
    scale: float = Field(default=1.0, gt=0)
    """On the weights of the chosen experts (2412.19437: the routed scaling factor)"""
    shared_gate: bool = False
    """The shared experts' output times a sigmoid of the token (Qwen3-Next)"""
    balance: Literal["bias", "loss", "none"] = "bias"
    rate: float | None = Field(default=None, gt=0)
    """bias: by how much one step moves each bias. loss: the weight of the loss. None: 0.01"""

    @model_validator(mode="before")
    @classmethod
    def _no_capacity(cls, data: Any) -> Any:
        if isinstance(data, dict) and (asked := {"capacity", "capacity_factor", "drop_tokens"} & data.keys()):
            raise ValueError(f"'{min(asked)}': experts have no capacity and drop no tokens, for then what a token "
                             "yields would depend on the others of its batch; leave it out (balance keeps loads even)")
        return data

    @model_validator(mode="after")
    def _sense(self) -> ExpertsDesign:
        if self.top > self.experts:
            raise ValueError(f"top is {self.top} of {self.experts} experts; give top at most the number of experts")
        if self.normalise and self.top == 1:
            raise ValueError("with top: 1 a normalised weight is always one, and the router learns nothing; set "
                             "normalise: false, or give a larger top")
        if self.shared_gate and not self.shared:
            raise ValueError("there is no shared expert to gate; set shared: 1, or leave shared_gate out")
        if self.balance == "none" and self.rate is not None:
            raise ValueError("balance: none has no rate; leave it out, or set balance to bias or loss")
        return self

    def shared_expert(self, width: int) -> FeedForwardDesign:
        """All shared experts as one."""
        hidden = self.shared * self.expert.hidden(width)
        return self.expert.model_copy(update={"dim_hidden": hidden, "expand": None})

    @property
    def strength(self) -> float:
        return 0.01 if self.rate is None else self.rate


@register(ExpertsDesign)
class Experts(Mixer):
    bias: Tensor | None
    """[experts], a buffer that is saved with the weights; only `after_step` changes it."""

    def __init__(self, design: ExpertsDesign, site: Any) -> None:
        super().__init__()
        self.design, self.width = design, site.dim_out
        self.router = site.linear("router", site.width, design.experts, bias=design.router_bias, role="gate")
        self.experts = nn.ModuleList(FeedForward(design.expert, site.child(f"experts.{i}"), role="expert")
                                     for i in range(design.experts))
        self.shared = FeedForward(design.shared_expert(site.width), site.child("shared"), role="expert") \
            if design.shared else None
        self.shared_gate = site.linear("shared_gate", site.width, 1, role="gate") if design.shared_gate else None
        self.register_buffer("bias", torch.zeros(design.experts) if design.balance == "bias" else None)

    def mix(self, x: Tensor, state: State, ctx: Context) -> Out:
        tokens = x.flatten(0, 1)
        there = None if ctx.valid is None else ctx.valid.flatten().nonzero().flatten()
        u = tokens if there is None else tokens[there]
        scores = self.scores(u)
        chosen, weight = self.choose(scores)
        load = None if recording() else counted(chosen, self.design.experts)
        if load is None:
            y = self._stepped(u, chosen, weight)
        elif current().backend == "reference":
            y = self._masked(u, chosen, weight)
        else:
            y = self._grouped(u, chosen, weight, load)
        if self.shared is not None:
            shared = self.shared.transform(u)
            y = y + (shared if self.shared_gate is None else torch.sigmoid(self.shared_gate(u)) * shared)
        if there is not None:
            y = y.new_zeros(len(tokens), y.shape[1]).index_copy(0, there, y)
        y = y.to(x.dtype).unflatten(0, x.shape[:2])
        if load is None:
            return Out(y)
        losses = {"router": self._balance_loss(scores, load)} if self.design.balance == "loss" else EMPTY
        return Out(y, losses=losses, measured={"load": load})

    def scores(self, u: Tensor) -> Tensor:
        """u [N, D] -> [N, experts] in fp32 or better, whatever autocast says: near ties decide."""
        with torch.autocast(u.device.type, enabled=False):
            logits = self.router(u.to(self.router.weight.dtype))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits.sigmoid() if self.design.score == "sigmoid" else logits.softmax(-1)

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """scores [N, experts] -> (chosen [N, top] int64, their weights [N, top])."""
        preferred = scores.detach() if self.bias is None else scores.detach() + self.bias
        chosen = preferred.topk(self.design.top, -1).indices
        weight = scores.gather(-1, chosen)
        if self.design.normalise:
            weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-20)
        return chosen, weight * self.design.scale

    def _grouped(self, u: Tensor, chosen: Tensor, weight: Tensor, load: Tensor) -> Tensor:
        """[N, D_out]: the choices sorted by expert, every expert once on all of its own."""
        order = chosen.flatten().argsort(stable=True)
        rows = order // self.design.top
        # While learning an idle expert runs on nothing, so that its gradient is zero and not missing.
        everyone = torch.is_grad_enabled() or not len(u)
        parts = split(u[rows], load)
        made = torch.cat([self._expert(i).transform(part) for i, part in enumerate(parts) if everyone or len(part)])
        made = made * weight.flatten()[order, None]
        return made.new_zeros(len(u), made.shape[1]).index_add(0, rows, made)

    def _stepped(self, u: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        """For a recorded step: expert after expert on all tokens, each only where some token has chosen it."""
        y = u.new_zeros(len(u), self.width, dtype=weight.dtype)
        for i in range(self.design.experts):
            picked = chosen == i
            share = (weight * picked).sum(-1, keepdim=True)
            when(picked, lambda i=i, share=share: y.add_(share * self._expert(i).transform(u)))  # type: ignore[func-returns-value]
        return y

    def _masked(self, u: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        """The same, obviously right: expert by expert, added where it was chosen."""
        y = []
        for i in range(self.design.experts):
            picked = chosen == i
            rows = picked.any(-1)
            share = (weight * picked).sum(-1, keepdim=True)
            made = share[rows] * self._expert(i).transform(u[rows])
            y.append(made.new_zeros(len(u), made.shape[1]).masked_scatter(rows[:, None], made))
        return torch.stack(y).sum(0)

    def _expert(self, i: int) -> FeedForward:
        made = self.experts[i]
        assert isinstance(made, FeedForward)
        return made

    def _balance_loss(self, scores: Tensor, load: Tensor) -> Tensor:
        share = load / load.sum().clamp_min(1)
        wanted = (scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)).sum(0) / max(len(scores), 1)
        return self.design.strength * self.design.experts * (share * wanted).sum()

    def after_step(self, measured: Mapping[str, Tensor]) -> None:
        if self.bias is not None:
            load = measured["load"].to(self.bias)
            self.bias += self.design.strength * torch.sign(load.mean() - load)

    @classmethod
    def traits(cls, design: ExpertsDesign) -> Traits:
        return Traits(two_way=True, stateful=False)

    @classmethod
    def cost(cls, design: ExpertsDesign, site: Any) -> Cost:
        one = FeedForward.cost(design.expert, site.child("experts.0"), role="expert")
        idle = Cost(params=(design.experts - design.top) * one.params)
        total = site.linear_cost(site.width, design.experts, bias=design.router_bias, role="gate") + idle
        total = sum((one for _ in range(design.top)), total)
        if design.shared:
            total += FeedForward.cost(design.shared_expert(site.width), site.child("shared"), role="expert")
        if design.shared_gate:
            total += site.linear_cost(site.width, 1, role="gate")
        return total


def split(x: Tensor, counts: Tensor) -> list[Tensor]:
    """x [N, ...] cut into parts of so many rows; counts sum to N, which a compiler is told."""
    parts, start = [], 0
    for n in counts.tolist():
        torch._check(n >= 0)
        torch._check(start + n <= x.shape[0])
        parts.append(x[start : start + n])
        start += n
    torch._check(start == x.shape[0])
    return parts


def counted(chosen: Tensor, kinds: int) -> Tensor:
    """How often each of 0..kinds-1 is in chosen (int64): [kinds], of a length that a compiler knows."""
    flat = chosen.flatten()
    return flat.new_zeros(kinds).index_add(0, flat, torch.ones_like(flat))
