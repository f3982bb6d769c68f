"""Test-only kinds with faults to switch on: without one they keep the contract, with one verify must say so."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from postformer.contract.affine import GDR, AffineMemory
from postformer.contract.context import gates
from postformer.contract.mixer import Mixer, Out, StepMemory, Traits
from postformer.contract.state import Growing
from postformer.design import Design, register, registry
from postformer.design.cost import Cost
from postformer.kernels import attention, current, scan
from postformer.layers.norm import l2norm
from postformer.memory.lists import append

torch.set_num_threads(1)
HEADS, DIM = 2, 4
INNER = HEADS * DIM


class DeltaDesign(Design):
    kind: Literal["test-delta"] = "test-delta"
    fault: str = "none"
    erase_before_decay: bool = False
    read_before_update: bool = False


class Delta(AffineMemory):
    """A gated delta rule. Faults: gate-reset, no-reset, stray-matrix."""

    def __init__(self, design: DeltaDesign, site: Any) -> None:
        super().__init__()
        self.shape = (HEADS, DIM, DIM)
        self.qkv = site.linear("qkv", site.width, 3 * INNER)
        self.gates = site.linear("gates", site.width, 2 * HEADS, bias=True, role="gate")
        if design.fault == "stray-matrix":
            self.out: nn.Module = nn.Linear(INNER, site.dim_out, bias=False)
        else:
            self.out = site.linear("out", INNER, site.dim_out)

    def mix(self, x, state, ctx):
        if self.design.fault == "no-reset":
            ctx = ctx.replace(boundary=None)
        if self.design.fault == "gate-reset" and ctx.boundary is not None:
            ctx = ctx.replace(boundary=None, inputs={"reset": ctx.reset()})
        return super().mix(x, state, ctx)

    def rule(self, x, state, ctx):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
        forget, rate = self.gates(x).unflatten(-1, (2, HEADS, 1)).permute(2, 0, 3, 1, 4)
        g = F.logsigmoid(forget if forget.dtype == torch.float64 else forget.float())
        if "reset" in ctx.inputs:
            g = g.masked_fill(ctx.inputs["reset"][:, None, :, None], -1e4)
        k = l2norm(k)
        return GDR(q, g, w=k * torch.sigmoid(rate), e=k, u=v, erase_before_decay=self.design.erase_before_decay,
                   read_before_update=self.design.read_before_update), None

    def read(self, o, x, rule):
        return self.out(o.transpose(1, 2).flatten(-2))

    @classmethod
    def cost(cls, design, site):
        maps = [site.linear_cost(site.width, 3 * INNER), site.linear_cost(INNER, site.dim_out),
                site.linear_cost(site.width, 2 * HEADS, bias=True, role="gate")]
        return sum(maps, Cost()) + Cost(flops_per_token=6.0 * INNER * DIM, state=4 * INNER * DIM)


class LeakyDesign(Design):
    kind: Literal["test-leaky"] = "test-leaky"
    fault: str = "none"
    learned: bool = False


class Leaky(StepMemory):
    """h <- a h + (1 - a) i(x), token by token.

    Faults: int-state, python-counter, in-place, batch-mean, half, training, dropout, stray-vector, scalar-state,
    only-y, wrong-params, wrong-state, wrong-flops, no-cost, zero-reset, mutates-input, grad-mode, learns-in-call.
    """

    def __init__(self, design: LeakyDesign, site: Any) -> None:
        super().__init__()
        self.i = site.linear("in", site.width, site.width)
        self.f = site.linear("forget", site.width, site.width, role="gate")
        self.out = site.linear("out", site.width, site.dim_out)
        self.count = 0
        if design.learned:
            self.start = site.parameter("start", (site.width,), lambda p: p.normal_())
        if design.fault == "learns-in-call":
            self.register_buffer("calls", torch.zeros(1))
        if design.fault == "stray-vector":
            self.scale = nn.Parameter(torch.ones(site.dim_out))

    def initial(self, batch, condition=None):
        zero = self.i.weight.new_zeros(batch, self.i.out_features)
        if self.design.learned:
            return zero + self.start
        if self.design.fault == "half":
            return zero.bfloat16()
        if self.design.fault == "int-state":
            return zero, 0
        return (zero, torch.zeros((), dtype=torch.long)) if self.design.fault == "scalar-state" else zero

    def mix(self, x, state, ctx):
        if self.design.fault == "learns-in-call":
            self.calls += 1
        if self.design.fault == "mutates-input":
            x.mul_(0.5)
        if self.design.fault == "zero-reset" and ctx.boundary is not None:
            start, self.start = self.start, nn.Parameter(torch.zeros_like(self.start))
            try:
                return super().mix(x, state, ctx)
            finally:
                self.start = start
        return super().mix(x, state, ctx)

    def step(self, x, state):
        fault = self.design.fault
        h, *more = state if isinstance(state, tuple) else (state,)
        a, new = torch.sigmoid(self.f(x)), self.i(x)
        if fault == "batch-mean":
            new = new - new.mean(0)
        if fault == "training" and self.training:
            new = 1.1 * new
        if fault == "grad-mode" and torch.is_grad_enabled():
            new = 1.1 * new
        if fault == "dropout":
            new = F.dropout(new, 0.1, self.training)
        if fault == "python-counter":
            self.count += 1
            new = new / self.count
        if fault == "in-place":
            with torch.no_grad():
                h.mul_(a).add_((1 - a) * new)
        else:
            h = (a * h + (1 - a) * new).to(h.dtype)
        y = self.out(h.to(x.dtype))
        if fault == "only-y":
            return y
        if fault == "stray-vector":
            y = y * self.scale
        return y, (h, more[0] + 1) if more else h

    @classmethod
    def cost(cls, design, site):
        if design.fault == "no-cost":
            return None
        maps = [site.linear_cost(site.width, site.width), site.linear_cost(site.width, site.dim_out),
                site.linear_cost(site.width, site.width, role="gate")]
        wrong = design.fault
        return sum(maps, Cost()) + Cost(
            params=(site.width if design.learned else 0) + (site.dim_out if wrong == "stray-vector" else 0)
            + (wrong == "wrong-params"),
            flops_per_token=site.width**2 if wrong == "wrong-flops" else 0.0,
            state=(2 if wrong == "half" else 4) * site.width + 4 * (wrong == "wrong-state"),
        )


class ScanDesign(Design):
    kind: Literal["test-scan"] = "test-scan"
    fault: str = "none"


class Scan(Mixer):
    """h_t = a_t h_{t-1} + b_t with its own formula for many tokens at once.

    Faults: future-tap, call-mean, one-token, pad-decay, pad-write, no-reset, backend, backend-gradient, overflow,
    first-row-position, own-position, any-boundary, emit-late, emit-none, call-grid, prefill-in-place,
    says-stateless, no-grad, soft-gates, last-valid, clamped.
    """

    def __init__(self, design: ScanDesign, site: Any) -> None:
        super().__init__()
        self.a = site.linear("forget", site.width, site.width, bias=True, role="gate")
        self.b = site.linear("in", site.width, site.width, bias=True)
        self.out = site.linear("out", site.width, site.dim_out)
        self.seen = 0

    def initial(self, batch, condition=None):
        weight = self.out.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return weight.new_zeros(batch, weight.shape[1], dtype=dtype)

    def mix(self, x, state, ctx):
        fault, length = self.design.fault, x.shape[1]
        if fault == "future-tap":
            x = x + F.pad(x[:, 1:], (0, 0, 0, 1))
        if fault == "call-mean":
            x = x - x.mean(1, keepdim=True)
        if fault == "call-grid":
            x = x * (1 + 0.1 * (torch.arange(length) % 16 == 0))[:, None].to(x.dtype)
        if fault == "own-position":
            x = x * torch.cos(torch.arange(self.seen, self.seen + length))[:, None].to(x.dtype)
            self.seen += length
        if fault == "first-row-position":
            x = x * torch.cos(ctx.position[:1, :, None]).to(x.dtype)
        log_a, b = F.logsigmoid(self.a(x)), self.b(x)
        log_a, b, state = (v if v.dtype == torch.float64 else v.float() for v in (log_a, b, state))
        tick, write = gates(ctx)
        if fault == "soft-gates":
            tick, write = (None if v is None else v / v.amax(1, keepdim=True).clamp_min(0.1) for v in (tick, write))
        if tick is not None and fault != "pad-decay":
            log_a = log_a * tick[..., None].to(log_a.dtype)
        if write is not None and fault != "pad-write":
            b = b * write[..., None].to(b.dtype)
        reset = ctx.boundary > 0 if fault == "any-boundary" and ctx.boundary is not None else ctx.reset()
        reset = None if fault == "no-reset" else reset
        if fault == "one-token" and length == 1:
            b = b * 1.01
        if fault == "prefill-in-place" and length > 1:
            with torch.no_grad():
                state.add_(1.0)
        if fault == "no-grad":
            with torch.no_grad():
                log_a = log_a.clone()
        if fault == "backend" and current().backend != "reference":
            b = b * (1 + 1e-6)
        if fault == "backend-gradient" and current().backend != "reference":
            log_a = log_a.detach()
        h = self._run(log_a, b, state, reset)
        emitted = None
        if ctx.emit and fault in ("emit-late", "emit-none"):
            emitted = h[:, :: ctx.emit] if fault == "emit-late" else None
        last = h[:, -1]
        if fault == "last-valid" and ctx.valid is not None:
            last = last * ctx.valid[:, -1:]
        return Out(self.out(h.to(x.dtype)), last, emitted=emitted)

    def _run(self, log_a, b, state, reset):
        if self.design.fault in ("overflow", "clamped") and reset is None:
            total = log_a.cumsum(1)
            low = total.clamp(min=-60) if self.design.fault == "clamped" else total
            return total.exp() * (state[:, None] + ((-low).exp() * b).cumsum(1))
        return scan(log_a.exp(), b, state, reset)

    @classmethod
    def traits(cls, design):
        return Traits(native_emit=design.fault.startswith("emit"), stateful=design.fault != "says-stateless")

    @classmethod
    def cost(cls, design, site):
        maps = [site.linear_cost(site.width, site.width, bias=True, role="gate"),
                site.linear_cost(site.width, site.width, bias=True), site.linear_cost(site.width, site.dim_out)]
        return sum(maps, Cost()) + Cost(state=4 * site.width)


class ListDesign(Design):
    kind: Literal["test-list"] = "test-list"
    fault: str = "none"


class Listed(Mixer):
    """One head of attention over a growing list.

    Faults: uncut, reads-capacity, keeps-padding, always-consumes, says-constant, resets-late.
    """

    def __init__(self, design: ListDesign, site: Any) -> None:
        super().__init__()
        self.qkv = site.linear("qkv", site.width, 3 * DIM)
        self.out = site.linear("out", DIM, site.dim_out)

    def initial(self, batch, condition=None):
        weight = self.out.weight
        return Growing(weight.new_zeros(batch, 0, 2, 1, DIM), torch.zeros(batch, dtype=torch.long))

    def mix(self, x, state, ctx):
        fault, (batch, length) = self.design.fault, x.shape[:2]
        q, k, v = self.qkv(x).unflatten(-1, (3, DIM)).unbind(2)
        new, segments, valid = torch.stack([k, v], 2)[:, :, :, None], ctx.segments(), ctx.valid
        used = state.data.shape[1]
        data = torch.cat([state.data.to(new.dtype), new], 1)
        old = torch.arange(used) < state.length[:, None]
        if fault == "reads-capacity":
            old = torch.ones_like(old)
        now = torch.ones(batch, length, dtype=torch.bool) if valid is None else valid
        if ctx.write is not None:
            now = now & (ctx.write > 0)
        masks = {} if segments is None else {
            "query_segment": segments, "key_segment": torch.cat([segments.new_zeros(batch, used), segments], 1)}
        o = attention(q[:, None], data[:, :, 0].transpose(1, 2), data[:, :, 1].transpose(1, 2),
                      key_valid=torch.cat([old, now], 1), **masks)
        keep = None if fault == "keeps-padding" else valid
        if ctx.write is not None:
            keep = ctx.write > 0 if keep is None else keep & (ctx.write > 0)
        consume = ctx.consume or fault == "always-consumes"
        state = append(state, new, None if fault == "uncut" else segments, keep, consume)
        return Out(self.out(o[:, 0]), state)

    @classmethod
    def traits(cls, design):
        return Traits(streaming="constant" if design.fault == "says-constant" else "growing", native_emit=False)

    @classmethod
    def cost(cls, design, site):
        return site.linear_cost(site.width, 3 * DIM) + site.linear_cost(DIM, site.dim_out) + Cost(
            flops_per_key=((4.0 * DIM, None),), state=8, state_per_token=((8 * DIM, None),))


PLANTS = {DeltaDesign: Delta, LeakyDesign: Leaky, ScanDesign: Scan, ListDesign: Listed}


@pytest.fixture(scope="session")
def _plants():
    before = dict(registry._classes)
    for design, mixer in PLANTS.items():
        register(design)(mixer)
    yield
    registry._classes.clear()
    registry._classes.update(before)


@pytest.fixture
def planted(_plants):
    """recipe(kind, fault, **fields) -> a one-layer design of that memory."""
    def recipe(kind: str, fault: str = "none", **fields: Any) -> dict[str, Any]:
        mixer = {"kind": f"test-{kind}", "fault": fault, **fields}
        return {"version": 1, "name": f"{kind}-{fault}",
                "model": {"width": 16, "mixers": {"memory": mixer}, "stack": ["memory"]}}
    return recipe
