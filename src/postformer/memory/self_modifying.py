"""Self-modifying memory (Nested Learning, 2512.24695): the maps that make keys, values, rates and decays are memories
too, and each learns towards targets that it makes itself.

    k_t = L2(M_k(x_t)),  v_t = L2(M_v(x_t)),  eta_t = sigma(M_eta(x_t) + b),  a_t = sigma(M_a(x_t) + c)
    M_t = M_{t-1} (a_t I - eta_t k_t k_t^T) - eta_t grad 1/2 |M_n(k_t) - M_n(v_t)|^2        for each of the five M
    o_t = M_memory,t-1(q_t)                                 M_n: M at the start of the token's chunk; M_n(v_t) constant

All maps of a chunk go through the M_n, so that its tokens are one call of K1 with erase_before_decay and
read_before_update: e = k, w = eta k, u = M_n(v) - M_n(k), g = log a. The five memories share e, w and g; they are
columns of one state, which begins each document at learned values.
Limits: matrices, not the paper's two-layer networks; with `residual` they keep those networks' skip, M(x) = x + S^T x.
The chunk is part of the model. x, k, v and q have norm one. The rule contracts: by erasing twice at every key, and by
a_t, memories lose what they start with (in the time of some d / 2 eta tokens) unless they decay to `start`.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from postformer.contract.context import Context, gates
from postformer.contract.mixer import Out, Traits
from postformer.contract.state import where
from postformer.design.base import Design
from postformer.design.choices import Choices
from postformer.design.cost import Cost
from postformer.design.registry import register
from postformer.kernels import current, gdr
from postformer.kernels.deep.grid import grid
from postformer.layers.local import ShortConvolution
from postformer.layers.norm import l2norm
from postformer.memory.read import HeadRead
from postformer.memory.rules.gates import fp32
from postformer.memory.shared_design import Convolved, Local, MatrixHeads, Read, Ungrouped

COLUMNS = ("k", "v", "rate", "decay", "memory")
"""The order of the memories in the state"""
RATE = -3.0
"""Where the offset of the rate starts: steps of 0.05 of the largest"""
DECAY = (6.0, 10.0)
"""Where the offsets of the heads' decays start: 1 - a from 0.0025 to 0.00005"""


class SelfUpdate(Design):
    """Delta gradient descent: a gradient step on an l2 loss that also erases what stood at the key."""

    kind: Literal["delta-gradient"] = "delta-gradient"
    rate: float = Field(default=1.0, gt=0, le=1)
    """The largest step"""
    chunk: int = Field(default=16, ge=1, le=4096)
    """Tokens whose maps and gradients are taken at the same memories"""


class SelfModifyingDesign(Design):
    kind: Literal["self-modifying"] = "self-modifying"
    heads: MatrixHeads = MatrixHeads()
    """Each has five memories of its own, of dim_key = dim_value channels"""
    update: SelfUpdate = SelfUpdate()
    residual: bool = True
    """M(x) = x + S^T x, so that a memory that has forgotten everything still maps; else S^T x"""
    decay_to: Literal["zero", "start"] = "zero"
    """zero: the paper's weight decay; start: the learned start, S_t = S_0 + a_t (S_{t-1} - S_0) + ..."""
    local: Convolved = Local()
    read: Ungrouped = Read()
    forget_at: Literal["segment", "document", "stream"] = "document"

    @model_validator(mode="after")
    def _sense(self) -> SelfModifyingDesign:
        if self.heads.key:
            raise ValueError("each head makes its own keys; leave heads.key out")
        if self.heads.dim_key != self.heads.dim_value:
            raise ValueError(f"keys, values and inputs go through the same memories; set heads.dim_key "
                             f"({self.heads.dim_key}) and heads.dim_value ({self.heads.dim_value}) to the same, or "
                             "leave both out")
        return self

    def sizes(self, width: int) -> tuple[int, int]:
        """(heads, channels of each)"""
        return self.heads.value, self.heads.dims(width)[0]


class SelfModifyingState(NamedTuple):
    running: Tensor
    """[B, H, d, 3 d + 2]: columns of M_k, M_v, M_eta, M_a and M_memory"""
    frozen: Tensor
    """The same at the start of the chunk"""
    phase: Tensor
    """[B] int64: tokens that the chunk has taken"""
    local: Any = None


@register(SelfModifyingDesign)
class SelfModifying(HeadRead):
    def __init__(self, design: SelfModifyingDesign, site: Any) -> None:
        super().__init__()
        self.design, self.forget_at = design, design.forget_at
        self.heads, self.dim = design.sizes(site.width)
        inner, d = self.heads * self.dim, self.dim
        self.x, self.q = site.linear("x", site.width, inner), site.linear("q", site.width, inner)
        self.start = nn.ParameterDict({
            f"{name}_weight": site.parameter(name, (self.heads, d, out), lambda p: p.normal_(0, d**-0.5))
            for name, out in zip(COLUMNS, (d, d, 1, 1, d), strict=True)})
        self.rate = site.parameter("rate_offset", (self.heads,), lambda p: p.fill_(RATE))
        self.decay = site.parameter("decay_offset", (self.heads,),
                                    lambda p: p.copy_(torch.linspace(*DECAY, self.heads)))
        self.conv = ShortConvolution.of(2 * inner, design.local)
        self.make_read(design.read, site, self.heads, d)

    def initial(self, batch: int, condition: Tensor | None = None) -> SelfModifyingState:
        first = self._first(batch)
        phase = torch.zeros(batch, dtype=torch.long, device=first.device)
        # Copies: a state must not change when the parameters are trained.
        return SelfModifyingState(first.clone(), first.clone(), phase,
                                  None if self.conv is None else self.conv.initial(batch))

    def _first(self, batch: int) -> Tensor:
        """The learned start of the state, [B, H, d, 3 d + 2]"""
        return fp32(torch.cat([self.start[f"{name}_weight"] for name in COLUMNS], -1)).expand(batch, -1, -1, -1)

    def mix(self, x: Tensor, state: SelfModifyingState, ctx: Context) -> Out:
        u, q, local = self.x(x), self.q(x), state.local
        if self.conv is not None:
            (u, q), local = self.conv.parts([u, q], local, ctx, self.forget_at)
        with torch.autocast(x.device.type, enabled=False):
            u, q = (l2norm(fp32(a).unflatten(-1, (self.heads, -1)).transpose(1, 2)) for a in (u, q))
            learn = self._tokens if current().backend == "reference" else self._chunks
            o, state = learn(u, q, state, ctx)
        return Out(self.finish(o.transpose(1, 2).flatten(-2).to(x.dtype), x), state._replace(local=local))

    def _gates(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor | None]:
        """(tick and write [B, 1, T, 1], zero where no token is; which tokens count in a chunk [B, T], None: all)"""
        one = x.new_ones(x.shape[0], 1, x.shape[2], 1)
        tick, write = (one if gate is None else gate[:, None, :, None].to(x.dtype) for gate in gates(ctx))
        return tick, write, None if ctx.tick is None or ctx.write is None else (ctx.tick > 0) | (ctx.write > 0)

    def _tokens(self, x: Tensor, q: Tensor, state: SelfModifyingState,
                ctx: Context) -> tuple[Tensor, SelfModifyingState]:
        """x, q [B, H, T, d] -> (o [B, H, T, d], state), token by token: what `_chunks` is checked against."""
        reset, (tick, write, counts) = ctx.reset(self.forget_at), self._gates(x, ctx)
        counts = torch.ones(x.shape[0], x.shape[2], dtype=torch.bool, device=x.device) if counts is None else counts
        counts = counts if ctx.valid is None else counts & ctx.valid
        first, out, (running, frozen, phase, _) = self._first(x.shape[0]), [], state
        for t in range(x.shape[2]):
            if reset is not None:
                running, frozen = where(reset[:, t], (first, first), (running, frozen))
                phase = phase.masked_fill(reset[:, t], 0)
            token = slice(t, t + 1)
            o, running = self._chunk(x[:, :, token], q[:, :, token], tick[:, :, token], write[:, :, token], running,
                                     frozen, first)
            out.append(o)
            phase = phase + counts[:, t].long()
            frozen = where(phase == self.design.update.chunk, running, frozen)
            phase = phase % self.design.update.chunk
        return torch.cat(out, 2), SelfModifyingState(running, frozen, phase)

    def _chunks(self, x: Tensor, q: Tensor, state: SelfModifyingState,
                ctx: Context) -> tuple[Tensor, SelfModifyingState]:
        """x, q [B, H, T, d] -> (o [B, H, T, d], state): one call of K1 for each chunk."""
        reset, (tick, write, counts) = ctx.reset(self.forget_at), self._gates(x, ctx)
        layout = grid(x.shape[2], self.design.update.chunk, state.phase, reset, ctx.valid, counts, ctx.fresh)
        # Slots without a token are laid out as zeros and so neither decay nor write.
        rows = zip(layout.lay(x), layout.lay(q), layout.lay(tick), layout.lay(write), strict=True)
        first, out, (running, frozen, _, _) = self._first(x.shape[0]), [], state
        for n, (x_n, q_n, tick_n, write_n) in enumerate(rows):
            if layout.some_fresh[n] and layout.fresh is not None:
                running, frozen = where(layout.fresh[:, n], (first, first), (running, frozen))
            o, running = self._chunk(x_n, q_n, tick_n, write_n, running, frozen, first)
            out.append(o)
            if layout.some_full[n]:
                frozen = running if layout.all_full[n] else where(layout.full[:, n], running, frozen)
        if layout.ended is not None:
            running, frozen = where(layout.ended, (first, first), (running, frozen))
        return layout.collect(out, x.shape[2]), SelfModifyingState(running, frozen, layout.phase)

    def _chunk(self, x: Tensor, q: Tensor, tick: Tensor, write: Tensor, running: Tensor, frozen: Tensor,
               first: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, H, S, d] that share a frozen memory -> (o [B, H, S, d], running memory)"""
        d = self.dim
        if self.design.residual:
            same = torch.eye(d, dtype=frozen.dtype, device=frozen.device)
            frozen = frozen + torch.cat([same, same, same.new_zeros(d, 2), same], -1)
        k, v, rate, keep = (x @ frozen[..., : 2 * d + 2]).split([d, d, 1, 1], -1)
        k, v = l2norm(k), l2norm(v)
        rate = torch.sigmoid(rate + fp32(self.rate)[:, None, None]) * (self.design.update.rate * write)
        g = F.logsigmoid(keep + fp32(self.decay)[:, None, None]) * tick
        error = (v - k) @ frozen
        to_start = self.design.decay_to == "start"
        if to_start:  # the same rule for what the memories differ from it by
            error, running = error - k @ first, running - first
        o, running = gdr(q, g, w=rate * k, e=k, u=error, state=running, erase_before_decay=True,
                         read_before_update=True)
        o = o[..., 2 * d + 2 :]
        if to_start:
            o, running = o + q @ first[..., 2 * d + 2 :], running + first
        return q + o if self.design.residual else o, running

    @classmethod
    def traits(cls, design: SelfModifyingDesign) -> Traits:
        return Traits(soft_gates=design.local.kind == "none", native_emit=False)

    @classmethod
    def choices(cls, design: SelfModifyingDesign) -> Choices:
        net = "x + S^T x" if design.residual else "S^T x"
        words, keep = ("decay", "a_t S_{t-1}") if design.decay_to == "zero" else \
            ("decay to the learned start", "S_0 + a_t (S_{t-1} - S_0)")
        return Choices(f"five matrices per head, M(x) = {net}: of keys, values, rates, decays, and what is read",
                       "l2, towards targets M_n(v_t) of each memory's own making",
                       f"{words} per head, chosen by one of the memories",
                       "delta gradient descent, its rate chosen by one of the memories; gradients and maps taken at "
                       f"the start of each chunk of {design.update.chunk}",
                       f"S_t = {keep} - e_t k_t (S_{{t-1}}^T k_t)^T + e_t k_t (M_n(v_t) - M_n(k_t))^T;  "
                       "o_t = M_{t-1}(q_t)")

    @classmethod
    def cost(cls, design: SelfModifyingDesign, site: Any) -> Cost:
        heads, d = design.sizes(site.width)
        inner, columns = heads * d, 3 * d + 2
        total = site.linear_cost(site.width, inner) + site.linear_cost(site.width, inner) + \
            ShortConvolution.cost(2 * inner, design.local) + cls.read_cost(design.read, site, heads, d)
        # x through the first memories, v - k through all, and K1's probe, write and read of all.
        flops = 2.0 * inner * (2 * d + 2) + 8.0 * inner * columns
        if design.decay_to == "start":
            flops += 2.0 * inner * (columns + d)
        return total + Cost(params=inner * columns + 2 * heads, flops_per_token=flops, state=8 * inner * columns + 8)
