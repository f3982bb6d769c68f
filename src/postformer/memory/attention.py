"""Softmax attention, full or windowed (1706.03762, 2004.05150): the memory is the list of keys and values itself.

    o_t = sum_i softmax_i(q_t . k_i / sqrt(d)) v_i      over i <= t of the same document, or the last `window` tokens

With `softmax: scalable` q_t is multiplied by s_h ln(n_t), n_t the tokens that it sees and s_h learned per head, so that
attention does not flatten as the context grows (2501.19399).
With `persistent: N` every query also sees N learned pairs of key and value without a place (2501.00663, section 3.3).
The state is the key-value list (grows with the context), or with a window a ring of the last `window` entries.
Limits: a list holds a token or it does not, so a token is kept whole where its write gate is above zero; tick has no
effect (nothing decays).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from postformer.contract.context import Context, placed
from postformer.contract.mixer import Mixer, Out, Traits
from postformer.contract.state import Growing
from postformer.design.base import Design
from postformer.design.choices import Choices
from postformer.design.cost import Cost
from postformer.design.registry import register
from postformer.kernels import attention, recall
from postformer.kernels.tape import recording
from postformer.layers.norm import RMSNorm
from postformer.layers.rotary import angles, rotary
from postformer.memory.lists import Ring, append, one_token, ring_token, rotate, taken, tokens_seen, written


class AttentionHeads(Design):
    query: int = Field(default=4, ge=1)
    key_value: int | None = Field(default=None, ge=1)
    """None: one per query head"""
    dim: int | None = Field(default=None, ge=1)
    """Channels of a head; None: width / query"""

    def scaled(self, ratio: float) -> AttentionHeads:
        query = max(1, round(self.query * ratio))
        grouped = self.key_value and self.query // self.key_value
        key_value = max(1, query // grouped) if grouped else None
        if key_value:
            query = max(query // key_value, 1) * key_value
        dim = self.dim and max(8, round(self.dim * self.query * ratio / query / 8) * 8)
        changes: dict[str, Any] = {"query": query, "key_value": key_value, "dim": dim}
        return self.model_copy(update={k: v for k, v in changes.items() if k in self.model_fields_set})

    def narrowed(self, dim: int, width: int) -> AttentionHeads:
        more = (self.dim or width // self.query) // dim
        if more < 2:
            return self
        key_value = self.key_value and self.key_value * more
        return self.model_copy(update={"query": self.query * more, "key_value": key_value, "dim": self.dim and dim})


class AttentionDesign(Design):
    kind: Literal["attention"] = "attention"
    heads: AttentionHeads = AttentionHeads()
    window: int | None = Field(default=None, ge=1)
    """Tokens a query sees, itself included; None: all"""
    position: Literal["rope", "none"] = "rope"
    rope_base: float = Field(default=10000.0, gt=1)
    rope_fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of a head's channels that is rotated"""
    qk_norm: Literal["none", "rms", "zero-centred-rms"] = "none"
    softmax: Literal["plain", "scalable"] = "plain"
    """scalable: logits grow with the logarithm of the number of tokens seen (2501.19399)"""
    gate: Literal["none", "sigmoid"] = "none"
    """A gate on every output channel, computed from x (2505.06708)"""
    persistent: int = Field(default=0, ge=0)
    """Learned keys and values that every token sees: parameters, not state, neither turned nor normed"""
    sub_norm: Literal["none", "rms"] = "none"
    """On what was read, before the output map (2210.06423)"""
    bias: bool = False
    """On the projections of q, k and v"""
    bias_out: bool = False
    eps: float = 1e-6

    @model_validator(mode="after")
    def _grouped(self) -> AttentionDesign:
        if self.heads.key_value and self.heads.query % self.heads.key_value:
            raise ValueError(f"heads.query is {self.heads.query}; it must be a multiple of "
                             f"heads.key_value ({self.heads.key_value})")
        return self


class AttentionState(NamedTuple):
    memory: Growing | Ring
    next: Tensor
    """[B] int64: position of the next token, for callers that give none."""


def sizes(design: AttentionDesign, width: int) -> tuple[int, int, int]:
    """(query heads, key-value heads, channels of a head)"""
    h = design.heads
    if h.dim is None and width % h.query:
        raise ValueError(f"width {width} is not a multiple of heads.query ({h.query}); set heads.dim")
    return h.query, h.key_value or h.query, h.dim or width // h.query


@register(AttentionDesign)
class Attention(Mixer):
    def __init__(self, design: AttentionDesign, site: Any) -> None:
        super().__init__()
        self.query_heads, self.kv_heads, self.dim = sizes(design, site.width)
        inner, kv = self.query_heads * self.dim, self.kv_heads * self.dim
        self.q = site.linear("q", site.width, inner, bias=design.bias)
        self.k = site.linear("k", site.width, kv, bias=design.bias)
        self.v = site.linear("v", site.width, kv, bias=design.bias)
        self.gate = site.linear("gate", site.width, inner, role="gate") if design.gate != "none" else None
        self.out = site.linear("out", inner, site.dim_out, bias=design.bias_out)
        self.persistent = (site.parameter("persistent", (2, self.kv_heads, design.persistent, self.dim),
                                          lambda p: p.normal_(0, 3**-0.5)) if design.persistent else None)
        self.sub_norm = RMSNorm(inner, design.eps) if design.sub_norm == "rms" else nn.Identity()
        self.sharpness = (site.parameter("sharpness", (self.query_heads,), lambda p: p.fill_(0.43))
                          if design.softmax == "scalable" else None)
        self.rotated = int(self.dim * design.rope_fraction) // 2 * 2
        if design.qk_norm != "none":
            zero = design.qk_norm == "zero-centred-rms"
            self.q_norm: nn.Module = RMSNorm(self.dim, design.eps, zero_centred=zero)
            self.k_norm: nn.Module = RMSNorm(self.dim, design.eps, zero_centred=zero)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def initial(self, batch: int, condition: Tensor | None = None) -> AttentionState:
        like = self.out.weight
        count = torch.zeros(batch, dtype=torch.long, device=like.device)
        shape = (batch, self.design.window or 0, 2, self.kv_heads, self.dim)
        data = like.new_zeros(shape)
        if self.design.window is None:
            return AttentionState(Growing(data, count), count.clone())
        empty = torch.full((batch, self.design.window), -1, dtype=torch.long, device=like.device)
        return AttentionState(Ring(data, empty, count), count.clone())

    def mix(self, x: Tensor, state: AttentionState, ctx: Context) -> Out:
        batch, length = x.shape[:2]
        if ctx.later is not None:
            return Out(self._out(x, self._again(x, state.memory, ctx)), state)
        segments, memory = ctx.segments(), state.memory
        position, following = placed(state.next, length, ctx)
        q = self.q(x).view(batch, length, self.query_heads, self.dim).transpose(1, 2)
        k = self.k(x).view(batch, length, self.kv_heads, self.dim).transpose(1, 2)
        v = self.v(x).view(batch, length, self.kv_heads, self.dim)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.design.position == "rope":
            turn = angles(position, self.rotated, q.dtype, self.design.rope_base)
            q, k = rotary(q, turn), rotary(k, turn)
        if self.sharpness is not None:
            q = self._sharpened(q, tokens_seen(memory, segments, ctx, length), ctx.causal)
        new = torch.stack([k.transpose(1, 2), v], 2)
        if (ctx.room and ctx.consume and length == 1 and segments is None and written(ctx) is None
                and self.persistent is None and memory.data.dtype == q.dtype):
            o, memory = one_token(q[:, :, 0], new[:, 0], memory, position)
        elif recording() and length == 1 and segments is None and isinstance(memory, Ring):
            o, memory = ring_token(q[:, :, 0], new[:, 0], memory, position, written(ctx), self.persistent)
        else:
            o = self._read(q, k, v.transpose(1, 2), memory, position, segments, ctx).transpose(1, 2)
            if isinstance(memory, Growing):
                memory = append(memory, new, segments, written(ctx), ctx.consume)
            else:
                memory = rotate(memory, new, position, segments, written(ctx), ctx.consume)
        return Out(self._out(x, o), AttentionState(memory, following))

    def _out(self, x: Tensor, o: Tensor) -> Tensor:
        """What was read, [B, T, Hq, d] -> y."""
        o = o.reshape(*x.shape[:2], -1)
        if self.gate is not None:
            o = o * torch.sigmoid(self.gate(x))
        return self.out(self.sub_norm(o))

    def _sharpened(self, q: Tensor, seen: Tensor, causal: bool = True) -> Tensor:
        """Queries [B, Hq, T, d] that see [B, T] tokens, for a softmax that stays as sharp over many as over few."""
        assert self.sharpness is not None
        width = self.design.window
        seen = seen.clamp(1, width and (width if causal else 2 * width - 1)) + self.design.persistent
        return q * (self.sharpness.to(q.dtype)[:, None, None] * torch.log(seen.to(q.dtype))[:, None, :, None])

    def _again(self, x: Tensor, memory: Growing | Ring, ctx: Context) -> Tensor:
        """[B, T, Hq, d] read from a list that was written on after these tokens."""
        assert ctx.later is not None
        assert ctx.position is not None
        batch, length = x.shape[:2]
        q = self.q_norm(self.q(x).view(batch, length, self.query_heads, self.dim).transpose(1, 2))
        if self.design.position == "rope":
            q = rotary(q, angles(ctx.position, self.rotated, q.dtype, self.design.rope_base))
        count = taken(memory)
        last = count[:, None] - 1 - ctx.later
        if self.sharpness is not None:
            q = self._sharpened(q, last + 1)
        if recording():
            return recall(q[:, :, 0], memory.data, count, float(self.dim**-0.5))[:, None]
        assert isinstance(memory, Growing)
        k, v = memory.data[:, : int(count.max())].to(q.dtype).permute(2, 0, 3, 1, 4)
        used = k.shape[2]
        if used >= length and bool((last == torch.arange(used - length, used, device=q.device)).all()):
            return attention(q, k, v).transpose(1, 2)
        every = torch.arange(used, device=q.device).expand(batch, -1)
        return attention(q, k, v, query_position=last, key_position=every, own=False).transpose(1, 2)

    def _read(self, q: Tensor, k: Tensor, v: Tensor, memory: Growing | Ring, position: Tensor,
              segments: Tensor | None, ctx: Context) -> Tensor:
        batch, length = position.shape
        window, masks = self.design.window, {}
        used = memory.data.shape[1]
        if ctx.fresh:
            used = 0
        elif isinstance(memory, Growing) and used:
            used = min(used, int(memory.length.max()))
        elif used and isinstance(memory, Ring) and not bool(memory.count.any()):
            used = 0
        exists = None
        if used:
            past = memory.data[:, :used].to(q.dtype)
            k, v = torch.cat([past[:, :, 0].transpose(1, 2), k], 2), torch.cat([past[:, :, 1].transpose(1, 2), v], 2)
            old = (torch.arange(used, device=q.device) < memory.length[:, None] if isinstance(memory, Growing)
                   else memory.position >= 0)
            exists = torch.cat([old, position.new_ones(batch, length, dtype=torch.bool)], 1)
        if (kept := written(ctx)) is not None:
            every = position.new_ones(batch, used, dtype=torch.bool)
            mask = torch.cat([every, kept], 1)
            exists = mask if exists is None else exists & mask
        if segments is not None:
            masks["query_segment"] = segments
            masks["key_segment"] = torch.cat([segments.new_zeros(batch, used), segments], 1)
        if window is not None and (used or ctx.position is not None or ctx.valid is not None):
            masks["query_position"] = position
            if isinstance(memory, Ring):
                masks["key_position"] = torch.cat([memory.position[:, :used], position], 1)
            looks = not used and segments is None and not torch.compiler.is_compiling()
            if looks and bool((position.diff(dim=1) == 1).all()):
                masks = {}  # positions count by one: the window may be taken by index, which is faster
        if self.persistent is None:
            return attention(q, k, v, causal=ctx.causal, window=window, key_valid=exists, **masks)
        always = self.design.persistent
        k, v = (torch.cat([p.to(q.dtype).expand(batch, -1, -1, -1), x], 2) for p, x in zip(self.persistent, (k, v)))
        exists = None if exists is None else F.pad(exists, (always, 0), value=True)
        masks = {name: F.pad(m, (always, 0)) if name.startswith("key") else m for name, m in masks.items()}
        return attention(q, k, v, causal=ctx.causal, window=window, key_valid=exists, always=always, **masks)

    @classmethod
    def traits(cls, design: AttentionDesign) -> Traits:
        return Traits(two_way=True, streaming="constant" if design.window else "growing", native_emit=False,
                      rereads="no" if design.persistent else "last" if design.window else "all")

    @classmethod
    def choices(cls, design: AttentionDesign) -> Choices:
        kept = "none: every token stays" if design.window is None else f"the last {design.window} tokens stay"
        return Choices("list of keys and values", "weighted regression on all kept pairs", kept, "append",
                       "o_t = sum_i softmax_i(q_t . k_i / sqrt(d)) v_i")

    @classmethod
    def cost(cls, design: AttentionDesign, site: Any) -> Cost:
        heads, kv, dim = sizes(design, site.width)
        maps = [(heads * dim, design.bias), (kv * dim, design.bias), (kv * dim, design.bias)]
        total = sum((site.linear_cost(site.width, d, bias=b) for d, b in maps), Cost())
        total += site.linear_cost(heads * dim, site.dim_out, bias=design.bias_out)
        if design.gate != "none":
            total += site.linear_cost(site.width, heads * dim, role="gate")
        bytes_per_token = 2 * kv * dim * 4
        return total + Cost(
            params=(0 if design.qk_norm == "none" else 2 * dim) + 2 * kv * design.persistent * dim
            + (heads * dim if design.sub_norm == "rms" else 0) + (heads if design.softmax == "scalable" else 0),
            flops_per_token=4.0 * heads * dim * design.persistent,
            flops_per_key=((4.0 * heads * dim, design.window),),
            state=16 if design.window is None else design.window * (bytes_per_token + 8) + 16,
            state_per_token=((bytes_per_token, None),) if design.window is None else (),
        )
