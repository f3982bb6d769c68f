"""Filter memory (kernel K4, then K1): what is written is weighed by how sure the memory already is.

    S_t = a_t S_{t-1} + change,   v_t = S_t^T k_t + noise of variance r_t        P covers S's columns over keys
    K_t = P- k_t / (k_t^T P- k_t + r_t),  M- = a_t M_{t-1},  M_t = M- + K_t (v_t - M-^T k_t)^T,  P = P- - K_t k_t^T P-
    o_t = M_t^T q_t with variance q_t^T P_t q_t in every channel

The delta rule is the filter whose P- is always p I. Here P is kept: in full (2511.21016 names the relation; gains by
chunks), as p I, as a diagonal precision, as one without any correction between key channels (Kalman linear attention,
2602.10743), or as the sum of k k^T whose inverse with a ridge reads (MesaNet, 2506.05233; Gated KalmaNet, 2511.21016).
The prior variance p_0 of a head bounds P from above, whatever the keys: P returns to it as fast as is forgotten.

Limits: one noise per head and token; gains are never above 1 (no reflections); published variances are those of o
under the model's own assumptions, before the read's norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from postformer.contract.affine import GDR
from postformer.contract.context import Context, gates
from postformer.contract.mixer import Out, Traits
from postformer.design.choices import Choices
from postformer.design.cost import Cost
from postformer.design.registry import register
from postformer.kernels import current, gdr, kalman_gains, precision, ridge_solve
from postformer.memory.filter_design import FilterDesign
from postformer.memory.matrix import Matrix
from postformer.memory.rules import resolve
from postformer.memory.rules.gates import Decay, fp32

SPREAD = 4.0
"""A head's prior variance stays within exp(4) of where it starts, so that fp32 holds it beside the noise's floor."""


class FilterState(NamedTuple):
    memory: Tensor
    """[B, H, dk, dv], fp32: the mean, or for covariance: information the sum of k v^T"""
    covariance: Tensor
    """fp32. full: P [B, H, dk, dk]. isotropic, diagonal, mean-field: the precision [B, H, 1] or [B, H, dk].
    information: the sum of k k^T [B, H, dk, dk]"""
    local: Any = None
    """State of the local mixing"""


Found = tuple[Tensor, Tensor | None, Tensor, Tensor]
"""o [B, H, T, dv], its variance [B, H, T] (None where nobody wants it), mean, covariance"""


@register(FilterDesign)
class Filter(Matrix):
    def __init__(self, design: FilterDesign, site: Any) -> None:
        super().__init__(design.matrix, site)
        heads, dim_key, _ = self.shape
        self.information = design.covariance == "information"
        self.fading = Decay(design.fading, site) if design.process == "fading" else None
        if self.information:
            self.ridge = (site.parameter("ridge", (heads, dim_key), lambda p: p.fill_(inverse_softplus(0.75)))
                          if design.ridge.kind == "learned" else None)
            self.mix_query = (site.linear("mix", site.width, heads, bias=True, role="gate")
                              if design.query == "gated" else None)
            return
        self.noise = (site.linear("noise", site.width, heads, bias=True, role="gate")
                      if design.noise.per == "input" else
                      site.parameter("noise", (heads,), lambda p: p.zero_()))
        self.prior = site.parameter("prior", (heads,), lambda p: p.zero_())

    def prior_variance(self) -> Tensor:
        """p_0 [H]"""
        return self.design.initial * torch.exp(SPREAD * torch.tanh(fp32(self.prior) / SPREAD))

    def initial(self, batch: int, condition: Tensor | None = None) -> FilterState:
        mean = super().initial(batch)
        memory, (heads, dim_key, _) = mean.memory, self.shape
        if self.information:
            held = memory.new_zeros(batch, heads, dim_key, dim_key)
        elif self.design.covariance == "full":
            eye = torch.eye(dim_key, dtype=memory.dtype, device=memory.device)
            held = (self.prior_variance()[:, None, None] * eye).expand(batch, -1, -1, -1)
        else:
            channels = 1 if self.design.covariance == "isotropic" else dim_key
            held = (1 / self.prior_variance())[:, None].expand(batch, -1, channels)
        return FilterState(memory, held, mean.local)

    def mix(self, x: Tensor, state: FilterState, ctx: Context) -> Out:
        seen, q, k, v, local = self.params.project(x, state.local, ctx)
        tick, write = (None if gate is None else gate[:, None] for gate in gates(ctx))
        g = self.params.decay(seen)
        if g is not None and tick is not None:
            g = g * tick[..., None].to(g.dtype)
        reset = ctx.reset(self.forget_at)
        run = self._solved if self.information else self._filtered
        o, variance, memory, held = run(seen, q, k, v, g, tick, write, reset, state)
        published: Mapping[str, Any] = {}
        if variance is not None and "variance" in self.wanted:
            published = {"variance": variance.clamp_min(0).transpose(1, 2)}
        return Out(self.read(o, x, GDR(q)), FilterState(memory, held, local), published)

    def _filtered(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, tick: Tensor | None,
                  write: Tensor | None, reset: Tensor | None, state: FilterState) -> Found:
        """The Kalman forms: gains or precisions first, then the mean."""
        k, p_0, r = fp32(k), self.prior_variance(), self._noise(x)
        rate = None if g is None else 2 * g
        if self.fading is not None:
            rate = self.fading(x)
            if rate is not None and tick is not None:
                rate = rate * tick[..., None].to(rate.dtype)
        factor = drift = None
        if rate is not None:
            factor = rate * current().decay_scale
            drift = -torch.expm1(factor) * p_0[:, None, None]
        form = self.design.covariance
        if form == "full":
            gain, variance, held = kalman_gains(
                k, r, state=state.covariance, start=p_0, factor=None if factor is None else factor.squeeze(-1),
                drift=None if drift is None else drift.squeeze(-1), reset=reset, query=fp32(q) if self.wanted else None,
                write=None if write is None else write.expand(r.shape),
            )
            o, memory = gdr(q, g, w=gain, e=k, u=v, state=state.memory, reset=reset)
            return o, variance, memory, held
        open_ = 1.0 if write is None else write[..., None].to(r.dtype)
        r, square = r[..., None], k.square()
        added = open_ * (square.mean(-1, keepdim=True) if form == "isotropic" else square) / r
        before, after = precision(added, state=state.covariance, start=1 / p_0, factor=factor, drift=drift, reset=reset)
        variance = (fp32(q).square() / after).sum(-1)
        held = after[:, :, -1]
        if form == "mean-field":
            scale = current().decay_scale
            lost = -torch.log1p(added / before)
            g = lost / max(scale, 1e-30) if g is None else g + lost / max(scale, 1e-30)  # the kernel scales again
            o, memory = gdr(q, g, k_add=open_ * k / (r * after), v_add=v, state=state.memory, reset=reset)
        else:
            spread = k / before
            gain = open_ * spread / (open_ * (k * spread).sum(-1, keepdim=True) + r)
            o, memory = gdr(q, g, w=gain, e=k, u=v, state=state.memory, reset=reset)
        return o, variance, memory, held

    def _solved(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, tick: Tensor | None,
                write: Tensor | None, reset: Tensor | None, state: FilterState) -> Found:
        """As _filtered, for sums of k k^T and k v^T and a ridge."""
        design = self.design
        w = self.params.written(x, k)
        if write is not None:
            w = w * write[..., None].to(w.dtype)
        ratio = None
        ridge = fp32(q).new_full((), design.ridge.floor)
        if self.ridge is not None:
            ridge = (ridge + F.softplus(fp32(self.ridge)))[:, None]
        else:
            ratio = ridge.new_full((), design.ridge.ratio)
        solved, held = ridge_solve(q, k, g, w=w, ridge=ridge, ratio=ratio, state=state.covariance, reset=reset,
                                   solver=design.solver.kind, iterations=design.solver.iterations)
        variance = (fp32(q) * solved).sum(-1)
        if self.mix_query is not None:
            share = torch.sigmoid(fp32(self.mix_query(x))).transpose(1, 2)[..., None]
            solved = q + share * (solved - q)
        o, memory = gdr(solved, g, k_add=w, v_add=v, state=state.memory, reset=reset)
        return o.to(x.dtype), variance, memory, held

    def _noise(self, x: Tensor) -> Tensor:
        """r [B, H, T]"""
        if isinstance(self.noise, torch.nn.Module):
            raw = fp32(self.noise(x)).transpose(1, 2)
        else:
            raw = fp32(self.noise)[:, None].expand(x.shape[0], -1, x.shape[1])
        return F.softplus(raw) + self.design.noise.floor

    @classmethod
    def traits(cls, design: FilterDesign) -> Traits:
        return Traits(
            soft_gates=design.local.kind == "none", taps=True, native_emit=False, publishes=("variance",),
            inputs=resolve("qkv").inputs,
            exact_gradients=design.covariance != "information" or design.converged,
        )

    @classmethod
    def choices(cls, design: FilterDesign) -> Choices:
        words, keep = cls.retained(design)
        if design.covariance == "information":
            solver = design.solver
            rate = "" if design.rate == "one" else "b_t "
            word = {"conjugate-gradient": "conjugate gradients", "chebyshev": "Chebyshev iteration"}[solver.kind]
            ridge = "L" if design.ridge.kind == "learned" else f"{design.ridge.ratio:g} |H_t| I"
            read = "x_t" if design.query == "solved" else "(q_t + c_t (x_t - q_t))"
            return Choices(
                "matrix and the sum of k k^T", "least squares over the whole past", words,
                f"its minimum, by {solver.iterations} steps of {word} at every read",
                f"H_t = {keep('H')} + {rate}k_t k_t^T;  S_t = {keep('S')} + {rate}k_t v_t^T;  "
                f"x_t = (H_t + {ridge})^-1 q_t;  o_t = S_t^T {read}")
        held = {"full": "covariance", "isotropic": "variance, one per head", "diagonal": "diagonal precision",
                "mean-field": "diagonal precision, key channels apart"}[design.covariance]
        change = {"none": "P_{t-1}", "stationary": "a_t^2 P_{t-1} + (1 - a_t^2) p_0",
                  "fading": "c_t P_{t-1} + (1 - c_t) p_0"}[design.process]
        if design.process == "fading":
            words += "; certainty fades at a rate of its own"
        if design.covariance == "mean-field":
            change = change.replace("P_{t-1}", "p_{t-1}")
            rule = (f"p- = {change};  1 / p_t = 1 / p- + k_t^2 / r_t;  "
                    f"S_t = Diag(p_t / p-) {keep('S')} + (p_t k_t / r_t) v_t^T")
        else:
            after = {"full": "P_t = P- - K_t k_t^T P-", "diagonal": "1 / P_t = 1 / P- + k_t^2 / r_t",
                     "isotropic": "1 / P_t = 1 / P- + |k_t|^2 / (d r_t)"}[design.covariance]
            rule = (f"P- = {change};  K_t = P- k_t / (k_t^T P- k_t + r_t);  {after};  S- = {keep('S')};  "
                    "S_t = S- + K_t (v_t - S-^T k_t)^T")
        return Choices(f"matrix and its {held}", "l2 over noise", words, "natural gradient: the Kalman gain",
                       f"{rule};  o_t = S_t^T q_t")

    @staticmethod
    def retained(design: FilterDesign) -> tuple[str, Any]:
        """The retention in words, and how it keeps a matrix of this name."""
        per = design.retention.per
        by = "fixed decay per head" if design.retention.gate == "fixed" else f"decay per {per}, chosen by the input"
        before = {"none": "", "head": "a_t ", "channel": "Diag(a_t) "}[per]
        return "none" if per == "none" else by, lambda name: f"{before}{name}_{{t-1}}"

    @classmethod
    def cost(cls, design: FilterDesign, site: Any) -> Cost:
        matrix = design.matrix
        heads, _, dim_key, _ = matrix.sizes(site.width)
        square = heads * dim_key**2
        total = Matrix.cost(matrix, site)
        if design.process == "fading":
            total += Decay.cost(design.fading, site)
        if design.covariance == "information":
            if design.ridge.kind == "learned":
                total += Cost(params=heads * dim_key)
            if design.query == "gated":
                total += site.linear_cost(site.width, heads, bias=True, role="gate")
            return total + Cost(flops_per_token=2.0 * square * (design.solver.iterations + 1), state=4 * square)
        total += Cost(params=heads)
        total += (site.linear_cost(site.width, heads, bias=True, role="gate") if design.noise.per == "input"
                  else Cost(params=heads))
        if design.covariance == "full":
            return total + Cost(flops_per_token=(6.0 if site.publish else 4.0) * square, state=4 * square)
        return total + Cost(state=4 * heads * (1 if design.covariance == "isotropic" else dim_key))


def inverse_softplus(y: float) -> float:
    return math.log(math.expm1(y))
