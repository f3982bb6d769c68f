"""What a recipe may say about a matrix memory (kernel K1): the four choices and the projections around them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from postformer.design.base import Design, word
from postformer.memory.shared_design import AnyLocal, AnyRead, Local, MatrixHeads, Read, several


class Retention(Design):
    """What is forgotten: S <- Diag(exp g) S, g <= 0."""

    per: Literal["none", "head", "channel"] = "none"
    gate: Literal["mamba", "gla", "sigmoid", "stretched", "fixed"] | None = None
    """mamba: g = -exp(A) softplus(W x + b); gla: logsigmoid(W x + b) / 16; sigmoid: logsigmoid(W x + b); stretched: the
    same drawn out by a twentieth and cut at 0 (1712.01312), so that a token may forget nothing at all; fixed:
    g_h = log(1 - 2^(-5-h)) (RetNet)"""
    rank: int | Literal["dim-value"] | None = None
    """Of W, for a gate per channel; None: full"""

    @model_validator(mode="after")
    def _gate(self) -> Retention:
        if self.per == "none" and self.gate is not None:
            raise ValueError(f"retention.gate is '{self.gate}' but nothing is forgotten: set per: head or channel")
        if self.per != "none" and self.gate is None:
            raise ValueError("retention needs a gate: mamba, gla, sigmoid, stretched or fixed")
        if self.gate == "fixed" and self.per == "channel":
            raise ValueError("retention gate 'fixed' is one number per head: set per: head, or gate: mamba")
        if self.rank is not None and self.per != "channel":
            raise ValueError("retention.rank is only for a gate per channel")
        return self


class Update(Design):
    """The inner optimiser: one or several steps on the inner loss per token."""

    kind: Literal["gradient", "implicit"] = "gradient"
    """gradient: a step along the gradient at the state before it. implicit: the exact minimum of
    |S - S_{t-1}|^2 + rate |S^T k - v|^2, stable for keys of any norm (Longhorn, 2407.14207)"""
    rate: Literal["one", "sigmoid", "double-sigmoid", "stretched"] | None = None
    """one: 1; sigmoid: in (0, 1); double-sigmoid: in (0, 2); stretched: in [0, 2], a sigmoid drawn out by a twentieth
    at both ends and cut there (1712.01312), so that a reflection is exact. None: sigmoid for l2, one for dot"""
    steps: int = Field(default=1, ge=1, le=8)
    """Steps per token, each with its own key, value and rate (DeltaProduct)"""


Feature = Literal["silu", "elu1", "relu", "softmax", "l2norm"]


class MatrixDesign(Design):
    kind: Literal["matrix"] = "matrix"
    parameterisation: str = "qkv"
    """How x becomes the kernel's arguments: qkv, or a paper's own (mamba2, rwkv7, hgrn2, mlstm; comba,
    gated-deltanet-2 and preconditioned, which go by the choices below as qkv does)"""
    heads: MatrixHeads = MatrixHeads()
    loss: Literal["dot", "l2"] = "dot"
    retention: Annotated[Retention, word("per")] = Retention()
    update: Annotated[Update, word("kind")] = Update()
    features: Annotated[tuple[Feature, ...], several] = ()
    """Feature maps of q and k, in order; elu1 is elu(x) + 1"""
    position: Literal["none", "rope"] = "none"
    """rope: q and k rotated by position, neighbours paired (RetNet's xPos without its decay)"""
    normaliser: Literal["none", "sum"] = "none"
    """sum: o divided by the sum of the weights (a ones column of v)"""
    local: AnyLocal = Local()
    read: AnyRead = Read()
    value_residual: str | None = None
    """Name of a published value that v is interpolated with (RWKV-7)"""
    forget_at: Literal["segment", "document", "stream"] = "document"

    @model_validator(mode="after")
    def _sense(self) -> MatrixDesign:
        from postformer.memory.rules import resolve  # its files import this one

        rule = resolve(self.parameterisation)
        if self.local.kind not in rule.local:
            raise ValueError(f"parameterisation '{self.parameterisation}' has no local mixing '{self.local.kind}'; "
                             f"set local: {' or '.join(rule.local)}")
        if self.heads.key and not rule.grouped:
            raise ValueError(f"parameterisation '{self.parameterisation}' has one key head per value head; "
                             "leave heads.key out")
        if self.value_residual and self.parameterisation != "rwkv7":
            raise ValueError("value_residual belongs to parameterisation: rwkv7")
        fields = type(self).model_fields
        fixed = {name for name in rule.fixed if getattr(self, name) != fields[name].default}
        if fixed:
            raise ValueError(f"'{min(fixed)}' is fixed by parameterisation '{self.parameterisation}'; "
                             "leave it out, or use parameterisation: qkv")
        rule.check(self)
        return self

    @property
    def rate(self) -> str:
        return self.update.rate or ("sigmoid" if self.loss == "l2" else "one")

    @property
    def reflects(self) -> bool:
        """Steps may go past their target, as far as its mirror image."""
        return self.rate in ("double-sigmoid", "stretched")

    def sizes(self, width: int) -> tuple[int, int, int, int]:
        """(value heads, key heads, dim_key, dim_value)"""
        h = self.heads
        key = h.key or h.value
        if h.value % key:
            raise ValueError(f"heads.value is {h.value}; it must be a multiple of heads.key ({key})")
        dim_key, dim_value = h.dims(width)
        if self.position == "rope" and dim_key % 2:
            raise ValueError(f"position: rope turns pairs of channels; dim_key is {dim_key}, make it even")
        return h.value, key, dim_key, dim_value
