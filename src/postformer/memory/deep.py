"""Deep memory (kernel K3): a small network per head whose weights learn key -> value while they are read.

    Z_t = eta_t Z_{t-1} - theta_t grad l(M(W_n; k_t), v_t),   A_t = gamma_t A_{t-1} + Z_t,   o_t = M(A_t; q_t)

W_n are the weights at the start of the token's chunk: TTT (arXiv 2407.04620), Titans (2501.00663), MIRAS's Moneta, Yaad
and Memora (2504.13173), the Omega rule and ATLAS (2505.23735) are choices of network, loss, retention and update.
Limits: gates are one number per head and token; what orthogonal steps and mirror maps make is read at chunk ends only;
user's losses are differentiated by torch.func.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from postformer.contract.context import Context
from postformer.contract.mixer import Out, Traits
from postformer.contract.state import State
from postformer.design.choices import Choices
from postformer.design.cost import Cost
from postformer.design.registry import register
from postformer.kernels.deep import DeepState, Rule, Weights, deep, start
from postformer.layers.local import ShortConvolution
from postformer.layers.norm import l2norm
from postformer.memory.deep_design import DeepDesign
from postformer.memory.deep_losses import slope
from postformer.memory.deep_nets import Convolution, Gated, Inner, Mlp, Net
from postformer.memory.read import HeadRead
from postformer.memory.rules.gates import fp32


def polynomial(x: Tensor) -> Tensor:
    """[..., d] -> [..., d + d (d + 1) / 2] with phi(x) . phi(y) = x . y + (x . y)^2 / 2."""
    d = x.shape[-1]
    i, j = torch.triu_indices(d, d, device=x.device)
    scale = x.new_ones(len(i)).masked_fill(i == j, 0.5**0.5)
    return torch.cat([x, x[..., i] * x[..., j] * scale], -1)


FEATURES = {"silu": F.silu, "l2norm": l2norm, "polynomial": polynomial}


def lq(a: Tensor, q: float) -> Tensor:
    """The mirror map of Moneta, with a one that keeps it finite where a vanishes."""
    return a * (1 + a.abs().pow(q).sum((-2, -1), keepdim=True)).pow((2 - q) / q)


def simplex(a: Tensor, scale: float) -> Tensor:
    """The mirror map of Memora: positive weights with a sum of scale * d_out."""
    return scale * a.shape[-1] * a.flatten(-2).softmax(-1).view_as(a)


def mirror_of(design: DeepDesign) -> Callable[[Weights], Weights] | None:
    r = design.retention
    if r.mirror == "none":
        return None
    if r.mirror == "lq":
        return lambda running: tuple(lq(a, r.q or 4.0) for a in running)
    # The layer norm of the prediction takes out its mean over channels. Entries of a softmax over thousands are nearly
    # equal, so that mean is most of the prediction, and with it would go most of float32's digits: take it out of the
    # weights, where nothing has been rounded yet.
    centred = design.net.residual == "norm" and design.net.kind != "convolution"

    def on_simplex(running: Weights) -> Weights:
        *before, last = (simplex(a, r.scale or 1.0) for a in running)
        return *before, last - last.mean(-1, keepdim=True) if centred else last

    return on_simplex


def rule_of(design: DeepDesign) -> Rule:
    u = design.update
    return Rule(u.chunk, u.window, design.visible, u.kind == "muon", mirror_of(design), u.clip)  # type: ignore[arg-type]


def net_of(design: DeepDesign, d_in: int, d_out: int) -> Net:
    n = design.net
    if n.kind == "convolution":
        return Convolution(d_in, n.maps, n.expand, n.size, n.activation, n.bias)
    if n.kind == "gated":
        return Gated(d_in, d_out, n.expand * d_in, n.activation, n.bias)
    return Mlp(d_in, d_out, n.maps, n.expand * d_in, n.activation, n.bias)


def gate_names(design: DeepDesign) -> dict[str, float]:
    """Gates per head and token, and where their biases start."""
    found = {"rate": 0.0}
    if design.retention.per != "none":
        found["decay"] = -4.0  # 0.02 is forgotten per token
    if design.update.kind != "gradient":
        found["momentum"] = 0.0
    if design.update.window > 1:
        found["window"] = 0.0
    if design.loss.name == "huber" and design.loss.delta is None:
        found["delta"] = 1.0
    return found


class DeepMemoryState(NamedTuple):
    memory: DeepState
    local: Tensor | None
    """[B, taps, channels], of the short convolution"""


@register(DeepDesign)
class Deep(HeadRead):
    def __init__(self, design: DeepDesign, site: Any) -> None:
        super().__init__()
        self.design, self.forget_at = design, design.forget_at
        self.heads, self.dim_key, self.channels, self.dim_value = design.sizes(site.width)
        self.rule, self.net = rule_of(design), net_of(design, self.channels, self.dim_value)
        keys, inner = self.heads * self.dim_key, self.heads * self.dim_value
        self.widths = [keys, keys, inner]
        self.q, self.k = site.linear("q", site.width, keys), site.linear("k", site.width, keys)
        self.v = site.linear("v", site.width, inner)
        self.gates, self.biases = nn.ModuleDict(), nn.ParameterDict()
        for name, begin in gate_names(design).items():
            self.gates[name] = site.linear(name, site.width, self.heads, role="gate")
            self.biases[name] = site.parameter(name, (self.heads,), lambda p, begin=begin: p.fill_(begin))
        self.conv = ShortConvolution.of(sum(self.widths), design.local)
        self.start = nn.ParameterDict()
        for name, (a, b) in self.net.maps.items():
            self.start[f"{name}_weight"] = site.parameter(
                name, (self.heads, a, b), lambda p, a=a: p.normal_(0, a**-0.5))
        self.inner_norm = nn.ParameterDict()
        if design.net.residual == "norm":
            self.inner_norm["weight"] = site.parameter("norm_weight", (inner,), lambda p: p.fill_(1), role="norm")
            self.inner_norm["bias"] = site.parameter("norm_bias", (inner,), lambda p: p.zero_(), role="norm")
        self.make_read(design.read, site, self.heads, self.dim_value)

    def initial(self, batch: int, condition: Tensor | None = None) -> DeepMemoryState:
        # Copies: a state must not change when the parameters are trained.
        running = tuple(fp32(w).expand(batch, *w.shape).clone() for w in self.start.values())
        memory = start(running, self.rule, momentum="momentum" in self.gates, dims=(self.channels, self.dim_value),
                       extra=int(self.design.loss.name == "huber"))
        return DeepMemoryState(memory, None if self.conv is None else self.conv.initial(batch))

    def mix(self, x: Tensor, state: State, ctx: Context) -> Out:
        q, k, v = self.q(x), self.k(x), self.v(x)
        local = state.local
        if self.conv is not None:
            (q, k, v), local = self.conv.parts([q, k, v], local, ctx, self.forget_at)
        q, k, v = (fp32(u).unflatten(-1, (self.heads, -1)).transpose(1, 2) for u in (q, k, v))
        for name in self.design.features:
            q, k = FEATURES[name](q), FEATURES[name](k)
        raw = {name: fp32(gate(x)).transpose(1, 2) + fp32(self.biases[name])[:, None]
               for name, gate in self.gates.items()}
        norm = None
        if self.inner_norm:
            weight, bias = (fp32(p).view(self.heads, 1, -1) for p in
                            (self.inner_norm["weight"], self.inner_norm["bias"]))
            norm = (weight, bias)
        loss = self.design.loss
        extra = None
        if loss.name == "huber":
            extra = (1e-3 + F.softplus(raw["delta"]))[..., None] if loss.delta is None else \
                torch.full_like(v[..., :1], loss.delta)
        reset = ctx.reset(self.forget_at)
        inner = Inner(self.net, slope(loss.name, loss.p or 3.0), norm, self.design.net.eps)
        o, memory = deep(
            inner, q, k, v, self._theta(raw["rate"]), state=state.memory, rule=self.rule,
            log_gamma=F.logsigmoid(-raw["decay"]) if "decay" in raw else None,
            log_eta=F.logsigmoid(raw["momentum"]) if "momentum" in raw else None,
            weight=raw["window"].sigmoid() if "window" in raw else None,
            extra=extra, tick=ctx.tick, write=ctx.write, valid=ctx.valid, reset=reset,
            initial=None if reset is None else self.initial(x.shape[0]).memory,
            begins=ctx.fresh,
        )
        return Out(self.finish(o.transpose(1, 2).flatten(-2).to(x.dtype), x),
                   DeepMemoryState(memory, local))

    def _theta(self, raw: Tensor) -> Tensor:
        rate = self.design.update.rate
        over = {"none": 1, "chunk": self.rule.chunk, "dim-key": self.dim_key}[rate.over]
        return rate.max / over * raw.sigmoid()

    @classmethod
    def traits(cls, design: DeepDesign) -> Traits:
        return Traits(soft_gates=design.local.kind == "none", taps=True, native_emit=False)

    @classmethod
    def choices(cls, design: DeepDesign) -> Choices:
        n, r, u = design.net, design.retention, design.update
        net = {"linear": "a matrix", "mlp": f"an MLP of {n.maps} maps", "gated": "a gated MLP",
               "convolution": f"{n.maps} convolutions along the key"}[n.kind]
        retention = {"none": "none", "head": "decay per head, chosen by the input"}[r.per]
        mirror = {"none": "", "lq": f"; weights normed by l{r.q or 4:g} at chunk ends",
                  "kl": "; weights are a softmax, at chunk ends"}[r.mirror]
        over = "" if u.window == 1 else f" of the last {u.window} losses"
        step = {"gradient": "gradient steps", "momentum": "gradient steps with momentum",
                "muon": "orthogonal steps along the momentum (Muon)"}[u.kind]
        keep, f = ("" if r.per == "none" else "a_t "), ("x + LN(f(W; x))" if n.residual == "norm" else "f(W; x)")
        grad = "sum_{i in window} grad_i" if u.window > 1 else "grad_t"
        if u.kind == "gradient":
            rule = f"W_t = {keep}W_{{t-1}} - th_t {grad}"
        elif u.kind == "momentum":
            rule = f"Z_t = e_t Z_{{t-1}} - th_t {grad},  W_t = {keep}W_{{t-1}} + Z_t"
        else:
            rule = f"Z_t = e_t Z_{{t-1}} - {grad},  W_t = {keep}W_{{t-1}} + th_t NS(Z_t)"
        read = "o_t = M(W_t; q_t)" if design.visible == "token" else "o_t = M(W_n; q_t)"
        return Choices(f"{net} per head, M(W; x) = {f}", design.loss.name, retention + mirror,
                       f"{step}{over}, gradients taken at the start of each chunk of {u.chunk}",
                       f"{rule},  grad at W_n;  {read}")

    @classmethod
    def cost(cls, design: DeepDesign, site: Any) -> Cost:
        heads, dim_key, channels, dim_value = design.sizes(site.width)
        net, u = net_of(design, channels, dim_value), design.update
        keys, inner, gates = heads * dim_key, heads * dim_value, gate_names(design)
        total = site.linear_cost(site.width, keys) + site.linear_cost(site.width, keys) + \
            site.linear_cost(site.width, inner) + ShortConvolution.cost(2 * keys + inner, design.local) + \
            cls.read_cost(design.read, site, heads, dim_value)
        for _ in gates:
            total += site.linear_cost(site.width, heads, role="gate") + Cost(params=heads)
        weights = sum(a * b for a, b in net.maps.values())
        params = heads * weights + (2 * inner if design.net.residual == "norm" else 0)
        momentum, muon, extra = u.kind != "gradient", u.kind == "muon", int(design.loss.name == "huber")
        state = heads * weights * (3 if momentum else 2) + heads * muon + \
            heads * (u.window - 1) * (channels + dim_value + 1 + extra)
        # Each token's gradient: forward, backward, outer product, at every token of the window; then the read.
        once = 2.0 * weights * net.shares
        back = 2.0 * net.shares * sum(net.maps[name][1] * (net.maps[name][0] - net.bias) for name in net.behind)
        clip = once if u.clip and net.shares > 1 else 0.0
        flops = heads * (u.window * (2 * once + back + clip) + once)
        if muon:
            flops += heads * sum(newton_schulz(*shape) for shape in net.maps.values()) / u.chunk
        return total + Cost(params, flops, state=4 * state + 8)


def newton_schulz(m: int, n: int) -> float:
    """FLOPs of five iterations on an m x n matrix."""
    small, large = min(m, n), max(m, n)
    return 5.0 * (4 * small * small * large + 2 * small**3)
