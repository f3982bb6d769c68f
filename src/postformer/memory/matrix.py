"""Matrix memory (kernel K1): linear attention, gated and delta rules, their multi-step forms.

    S_t = Diag(exp g_t) S_{t-1} + w_t (u_t - X_t^T e_t)^T + k_add_t v_add_t^T,    o_t = S_t^T q_t

The parameterisation (memory/rules) maps x to the kernel's arguments; here they are run and read.
Limits: memory and retention are linear in S; q and k are [dim_key], v is [dim_value] per head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from postformer.contract.affine import GDR, AffineMemory
from postformer.contract.context import Context
from postformer.contract.mixer import Traits
from postformer.contract.state import State
from postformer.design.choices import Choices
from postformer.design.cost import Cost
from postformer.design.registry import register
from postformer.memory.matrix_design import MatrixDesign
from postformer.memory.read import HeadRead
from postformer.memory.rules import resolve


@register(MatrixDesign)
class Matrix(HeadRead, AffineMemory):
    def __init__(self, design: MatrixDesign, site: Any) -> None:
        super().__init__()
        self.design, self.forget_at = design, design.forget_at
        heads, groups, dim_key, dim_value = design.sizes(site.width)
        self.params = resolve(design.parameterisation)(design, site)
        self.shape = (heads, dim_key, self.params.columns)
        self.wanted = site.publish
        self.make_read(design.read, site, heads, dim_value, groups)

    def initial_local(self, batch: int) -> State:
        return self.params.initial(batch)

    def rule(self, x: Tensor, state: State, ctx: Context) -> tuple[GDR, State]:
        return self.params(x, state, ctx)

    def read(self, o: Tensor, x: Tensor, rule: GDR) -> Tensor:
        aux = rule.aux
        o = o.transpose(1, 2)
        if "floor" in aux:
            o = o[..., :-1] / (torch.maximum(o[..., -1:].abs(), aux["floor"].transpose(1, 2)) + 1e-6).to(o.dtype)
        elif self.design.normaliser == "sum":
            o = o[..., :-1] / (o[..., -1:] + 1e-6)
        o = o.flatten(-2)
        if "skip" in aux:
            o = o + aux["skip"]
        return self.finish(o, x, gate=aux.get("gate"), bonus=aux.get("bonus"))

    def publish(self, rule: GDR, o: Tensor) -> Mapping[str, Any]:
        return {name: rule.aux[name] for name in self.wanted}

    @classmethod
    def traits(cls, design: MatrixDesign) -> Traits:
        free = design.local.kind == "none" and resolve(design.parameterisation).soft_gates
        return Traits(
            soft_gates=free, native_emit=free, taps=resolve(design.parameterisation).taps,
            inputs=resolve(design.parameterisation).inputs,
            publishes=("value",) if design.parameterisation == "rwkv7" else (),
            reads=(design.value_residual,) if design.value_residual else (),
        )

    @classmethod
    def choices(cls, design: MatrixDesign) -> Choices:
        return resolve(design.parameterisation).choices(design)

    @classmethod
    def cost(cls, design: MatrixDesign, site: Any) -> Cost:
        heads, groups, dim_key, dim_value = design.sizes(site.width)
        params = resolve(design.parameterisation)
        total = params.cost(design, site) + cls.read_cost(design.read, site, heads, dim_value, groups)
        columns = dim_value + (design.normaliser == "sum" or params.normalised)
        flops = params.flops(design) * heads * dim_key * columns
        return total + Cost(flops_per_token=flops, state=4 * heads * dim_key * columns)
